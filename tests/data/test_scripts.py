"""Python files of a project that make rows: imported as scripts of their folder are, and named where they fail."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from graftline.data.rows import rows_from_objects
from graftline.data.scripts import documents_of, made_by
from graftline.errors import DataError, SourceError

PAIR = """from __future__ import annotations

import json
from dataclasses import dataclass

@dataclass
class Pair:
    prompt: str
    completion: str

def rows(source):
    for line in source.open():
        yield Pair(**json.loads(line))
"""
SOURCE = '{"prompt": "Q", "completion": "A"}\n{"prompt": "R", "completion": "B"}\n'
OBJECTS = [{"prompt": "Q", "completion": "A"}, {"prompt": "R", "completion": "B"}]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.jsonl"
    path.write_text(SOURCE, encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    paths, modules = list(sys.path), set(sys.modules)
    yield
    assert sys.path == paths
    assert not {name for name in set(sys.modules) - modules if "prepare" in name or "helpers" in name}


def script(folder: Path, code: str, name: str = "prepare.py") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(code, encoding="utf-8")
    return folder / name


def test_dataclasses_work_and_are_rows(tmp_path: Path, source: Path) -> None:
    assert list(made_by(script(tmp_path, PAIR), "rows", source)) == OBJECTS


@pytest.mark.parametrize("how", ["from helpers import clean", "from .helpers import clean", "import helpers"])
def test_files_beside_a_script_can_be_imported_also_while_it_runs(tmp_path: Path, source: Path, how: str) -> None:
    call = "helpers.clean" if how == "import helpers" else "clean"
    loop = f"for line in source.open():\n        yield {call}(json.loads(line))\n"
    code = f"import json\n\ndef rows(source):\n    {how}\n    {loop}"
    for folder, answer in (("a", "A"), ("b", "B")):  # each has helpers that differ
        made = script(tmp_path / folder, code)
        script(tmp_path / folder, f"def clean(row):\n    return row | {{'completion': {answer!r}}}\n", "helpers.py")
        assert [row["completion"] for row in made_by(made, "rows", source)] == [answer] * 2


TABLES = [
    "pandas.read_json(source, lines=True)",
    "pyarrow.Table.from_pylist(objects)",
    "pyarrow.RecordBatch.from_pylist(objects)",
    "pyarrow.Table.from_pylist(objects).to_reader()",
    "iter([pandas.DataFrame(objects[:1]), pyarrow.Table.from_pylist(objects[1:])])",
    "objects",
    "(dict(one) for one in objects)",
]


@pytest.mark.parametrize("table", TABLES)
def test_tables_and_whatever_yields_rows_may_be_returned(tmp_path: Path, source: Path, table: str) -> None:
    code = (
        "import pandas, pyarrow, json\n\ndef rows(source):\n"
        f"    objects = [json.loads(line) for line in source.open()]\n    return {table}\n"
    )
    assert list(made_by(script(tmp_path, code), "rows", source)) == OBJECTS


def test_what_a_table_has_no_value_for_is_not_there_and_lists_are_lists(tmp_path: Path, source: Path) -> None:
    code = """import numpy, pandas, pyarrow
turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
calls = [{"function": {"name": "f", "arguments": {"x": 1}}}]
call = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": None, "tool_calls": calls}]
def rows(source):
    if source.name == "arrow":
        return pyarrow.Table.from_pylist([{"messages": turns, "system": None}, {"messages": call, "system": "S"}])
    return pandas.DataFrame({"messages": [numpy.array(turns, dtype=object), call], "system": [float("nan"), "S"]})
"""
    made = script(tmp_path, code)
    pandas_rows, arrow_rows = (
        rows_from_objects(made_by(made, "rows", Path(name)), origin="prepare.py") for name in ("pandas", "arrow")
    )
    assert pandas_rows == arrow_rows
    assert [len(row.messages) for row in arrow_rows] == [2, 3]
    assert arrow_rows[1].messages[-1].turn["tool_calls"][0]["function"]["arguments"] == {"x": 1}


BROKEN = [
    ("import nothing_of_this_name\n", "line 1 cannot be imported: ModuleNotFoundError"),
    ("def rows(source:\n", "cannot be imported: SyntaxError: .*line 1"),
    ("import sys\nsys.exit(3)\n", "line 2 cannot be imported: SystemExit: 3"),
    ("def row(source): ...\n", "has no function rows"),
    ("rows = 3\n", "has no function rows"),
    ("def rows(source):\n    pass\n", r"rows\(\) returned NoneType; expected an iterable of rows, or a table"),
    ("def rows(source):\n    return {'prompt': 'Q'}\n", r"rows\(\) returned dict"),
    ("def rows(source):\n    return 'Q'\n", r"rows\(\) returned str"),
    ("def rows(source):\n    yield {}\n    yield {}['q']\n", r"line 3: rows\(\) failed after 1 rows: KeyError: 'q'"),
    (
        "import pandas\ndef rows(source):\n    return pandas.DataFrame([['a', 'b', 'c']], columns=['p', 'q', 'q'])\n",
        r"rows\(\) returned a table that has q more than once",
    ),
    (
        "class Mute(Exception):\n    def __str__(self):\n        raise ValueError\ndef rows(source):\n    raise Mute\n",
        r"line 5: rows\(\) failed after 0 rows: Mute, whose text cannot be made",
    ),
    ("def rows(source):\n    yield {'p': 10**5000}\n", r"failed after 0 rows: ValueError: a number of 16610 bits"),
    ("def rows():\n    return []\n", r"rows\(\) failed after 0 rows: TypeError"),
    ("def rows(source):\n    raise SystemExit('no')\n", r"line 2: rows\(\) failed after 0 rows: SystemExit: no"),
]


@pytest.mark.parametrize(("code", "message"), BROKEN)
def test_a_script_that_fails_is_named_with_its_line(tmp_path: Path, source: Path, code: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"prepare\.py.*{message}"):
        list(made_by(script(tmp_path, code), "rows", source))


def test_named_tuples_are_rows(tmp_path: Path, source: Path) -> None:
    code = "from typing import NamedTuple\nclass R(NamedTuple):\n    prompt: str\n    completion: str\n"
    made = script(tmp_path, code + "def rows(source):\n    yield R('Q', 'A')\n")
    assert list(made_by(made, "rows", source)) == [{"prompt": "Q", "completion": "A"}]


def test_an_error_of_our_own_is_passed_on(tmp_path: Path, source: Path) -> None:
    code = (
        "from graftline.errors import SourceError\n\ndef rows(source):\n    raise SourceError('the archive is empty')\n"
    )
    with pytest.raises(SourceError, match=r"^the archive is empty$"):
        list(made_by(script(tmp_path, code), "rows", source))


def test_documents_are_texts(tmp_path: Path, source: Path) -> None:
    made = script(tmp_path, "def documents(source):\n    yield 'one'\n    yield 2\n")
    with pytest.raises(DataError, match="document 2 is int; expected text"):
        list(documents_of(made, source))
