"""No file over 600 lines and no function over 60: past that somebody has to scroll to understand one idea."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("graftline", "tasks", "flows", "studies", "examples")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 600, 60


def test_there_are_files_to_look_at() -> None:
    assert len(FILES) > 100


def test_files_and_functions_are_short() -> None:
    too_long = [line for path in FILES for line in offenders(path)]
    assert not too_long, "\n".join(["cut these at an idea:", *too_long])


def offenders(path: Path) -> list[str]:
    """A line for the file, and one for each of its functions, that is too long."""
    text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
    lines = len(text.splitlines())
    found = [f"{name}: {lines} lines, at most {MAX_FILE_LINES}"] if lines > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(f"{name}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}")
    return found
