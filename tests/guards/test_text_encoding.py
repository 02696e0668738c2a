"""Text is UTF-8 by name: what a locale calls text is ASCII on one machine and Latin-1 on the next."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = sorted(path for folder in ("graftline", "flows", "tasks") for path in (ROOT / folder).rglob("*.py"))
_COMPRESSED = {"gzip", "bz2", "lzma"}
_TEMPORARY = {"NamedTemporaryFile", "TemporaryFile", "SpooledTemporaryFile"}


def nameless(source: str) -> list[int]:
    """Lines that turn bytes into text, or text into bytes, in whatever encoding the locale has."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return sorted(call.lineno for call in calls if _is_nameless(call))


def _is_nameless(call: ast.Call) -> bool:
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    name, owner = _names(call)
    if {"text", "universal_newlines"} & keywords.keys() and {"capture_output", "stdout", "stdin"} & keywords.keys():
        return True  # A program that is not ours may print anything: encoding and errors, which imply text.
    if {"capture_output", "stdout"} & keywords.keys() and "encoding" in keywords:
        return "errors" not in keywords
    if "encoding" in keywords or None in keywords:  # `**options` may hold it.
        return False
    if name in ("read_text", "write_text"):
        # `graftline.digest.write_text` is a function: it encodes by itself.
        return isinstance(call.func, ast.Attribute) and len(call.args) <= (name == "write_text")
    if name in ("open", "fdopen") or name in _TEMPORARY:
        return _is_opened_as_text(call, name, owner)
    return name in ("TextIOWrapper", "FileHandler")


def _names(call: ast.Call) -> tuple[str, str]:
    """``gzip.open(…)`` -> open, gzip."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr, call.func.value.id if isinstance(call.func.value, ast.Name) else ""
    return (call.func.id if isinstance(call.func, ast.Name) else ""), ""


def _is_opened_as_text(call: ast.Call, name: str, owner: str) -> bool:
    is_function = isinstance(call.func, ast.Name) or owner in _COMPRESSED | {"io", "os"}
    position = 1 if is_function and name not in _TEMPORARY else 0
    given = [keyword.value for keyword in call.keywords if keyword.arg == "mode"] or call.args[position : position + 1]
    if not given:
        # Temporary and compressed files are bytes unless asked; a class that opens something takes an argument.
        return name not in _TEMPORARY and owner not in _COMPRESSED and (is_function or not call.args)
    mode = given[0].value if isinstance(given[0], ast.Constant) else None
    if not isinstance(mode, str) or not re.fullmatch(r"[rwaxbt+]{1,4}", mode):
        return False
    return "t" in mode if owner in _COMPRESSED else "b" not in mode


@pytest.mark.parametrize(
    ("source", "is_nameless"),
    [
        ("path.read_text()", True),
        ("path.read_text('utf-8')", False),
        ("path.write_text(text)", True),
        ("write_text(path, text)", False),
        ("open(path)", True),
        ("open(path, 'rb')", False),
        ("path.open()", True),
        ("path.open('a')", True),
        ("path.open('xb')", False),
        ("path.open(mode='w', encoding='utf-8')", False),
        ("Weights.open(folder)", False),
        ("gzip.open(path, 'rt')", True),
        ("gzip.open(path)", False),
        ("os.fdopen(handle, 'w')", True),
        ("NamedTemporaryFile('w')", True),
        ("NamedTemporaryFile()", False),
        ("subprocess.run(command, capture_output=True, text=True)", True),
        ("subprocess.run(command, capture_output=True, encoding='utf-8')", True),
        ("subprocess.run(command, capture_output=True, encoding='utf-8', errors='replace')", False),
        ("subprocess.run(command, capture_output=True)", False),
        ("io.TextIOWrapper(stream)", True),
        ("logging.FileHandler(path)", True),
    ],
)
def test_the_guard_knows_what_depends_on_the_locale(source: str, is_nameless: bool) -> None:
    assert bool(nameless(source)) is is_nameless


def test_every_text_names_its_encoding() -> None:
    lines = {path.relative_to(ROOT).as_posix(): nameless(path.read_text(encoding="utf-8")) for path in OURS}
    assert len(lines) > 100
    assert {path: found for path, found in lines.items() if found} == {}, (
        'name encoding="utf-8"; for programs errors= too'
    )
