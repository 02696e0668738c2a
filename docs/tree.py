"""Writes docs/tree.md: every file of the project with the first sentence of its docstring. `make docs` runs it."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("flows", "tasks", "graftline", "studies", "examples")


def describe(path: Path) -> str:
    """The first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s", first)[0]


def render() -> str:
    """The page."""
    lines = ["# Every file in a sentence", "", "Made from the docstrings by `make docs`; a test compares.", ""]
    for folder in FOLDERS:
        for directory in sorted({path.parent for path in (ROOT / folder).rglob("*.py")}):
            files = [path for path in sorted(directory.glob("*.py")) if path.name not in ("__init__.py", "__main__.py")]
            package = directory / "__init__.py"
            about = describe(package) if package.is_file() else ""
            lines += [f"## {directory.relative_to(ROOT).as_posix()}/", "", *([about, ""] if about else [])]
            lines += ["| file | what |", "|---|---|"]
            lines += [
                f"| [{path.name}](../{path.relative_to(ROOT).as_posix()}) | {cell(describe(path))} |" for path in files
            ]
            lines.append("")
    return "\n".join(lines)


def cell(text: str) -> str:
    """Text that stays within a cell of a Markdown table."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    (ROOT / "docs" / "tree.md").write_text(render(), encoding="utf-8")
