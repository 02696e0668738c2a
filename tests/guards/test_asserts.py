"""``python -O`` removes assertions: they may tell a type checker what is so, never do something or refuse something."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = sorted(path for folder in ("graftline", "flows", "tasks") for path in (ROOT / folder).rglob("*.py"))


def working(source: str) -> list[int]:
    """Lines of assertions that are more than a note about a type."""
    return [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert) and not _is_note(node)]


def _is_note(node: ast.Assert) -> bool:
    match node.test:
        case ast.Compare(left=ast.Name() | ast.Attribute(), ops=[ast.IsNot()], comparators=[ast.Constant(value=None)]):
            return True
        case ast.Call(func=ast.Name(id="isinstance")):
            return True
    return False


@pytest.mark.parametrize(
    ("source", "works"),
    [
        ("assert value is not None", False),
        ("assert self.value is not None", False),
        ("assert isinstance(key, Key)", False),
        ("assert self.has_bucket", True),
        ("assert check(key)", True),
        ("assert look() is not None", True),
        ("assert count > 0, 'nothing'", True),
    ],
)
def test_the_guard_knows_an_assertion_that_works(source: str, works: bool) -> None:
    assert bool(working(source)) is works


def test_no_assertion_works() -> None:
    lines = {path.relative_to(ROOT).as_posix(): working(path.read_text(encoding="utf-8")) for path in OURS}
    assert len(lines) > 100
    assert {path: found for path, found in lines.items() if found} == {}, "raise an error: python -O removes this"
