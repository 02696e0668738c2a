"""flows/ and tasks/ are a project's own: a flow reads as a sentence, and a task is one call of the package."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for name in ("flows", "tasks") for path in (ROOT / name).glob("*.py"))
TASKS = [path for path in FILES if path.parent.name == "tasks" and path.name != "__init__.py"]
PLACES = {"original_base", "trained_base"}
"""They say where a model lies, as ``at.folder`` says of a stage's outputs."""


def test_every_file_of_flows_and_tasks_has_at_most_60_lines() -> None:
    assert len(FILES) > 15
    lengths = {f"{path.parent.name}/{path.name}": len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > 60} == {}


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_a_task_is_one_call_of_the_package(path: Path) -> None:
    functions = {node.name: node for node in ast.parse(path.read_text(encoding="utf-8")).body if hasattr(node, "name")}
    assert functions.keys() == {"run", "main"}
    _docstring, *work = functions["run"].body
    assert len(work) == 1
    calls = [node for node in ast.walk(work[0]) if isinstance(node, ast.Call)]
    outer, *places = [ast.unparse(call.func) for call in calls]
    assert work[0].value is calls[0], f"{outer} is not the whole of the statement"
    assert {name for name in places if name not in PLACES and not name.startswith("at.")} == set()
