"""The column `data.cluster`: read from what was fetched, for the rows that were kept."""

import json
from pathlib import Path
from typing import Any

import pytest

from graftline.data.preparation import cluster_values
from graftline.data.rows import read_rows
from graftline.errors import DataError
from tests.sections import data_section


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(index: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"question {index}", "completion": f" {index}", **more}


def test_each_row_has_the_value_of_its_own_line(tmp_path: Path) -> None:
    path = write(tmp_path, [row(0, user="ä"), row(1, user=7), row(2, user="b")])
    rows = read_rows(path)
    section = data_section(cluster="user")
    assert cluster_values(section, path, [rows[2], rows[0], rows[1]], root=tmp_path) == ["b", "ä", "7"]


def test_rows_without_a_value_are_told_together_with_their_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path, [row(0, user="a"), row(1), row(2, user=None), row(3, user=1.5), row(4, user=""), row(5, user=True)]
    )
    with pytest.raises(DataError) as caught:
        cluster_values(data_section(cluster="user"), path, read_rows(path), root=tmp_path)
    text = str(caught.value)
    for told in (
        "row 2: 'user' is missing",
        "row 3: 'user' is missing",
        "row 4: 'user' is 1.5",
        "row 5",
        "row 6: 'user' is True",
    ):
        assert told in text
    assert "row 1:" not in text


def test_rows_that_a_script_makes_have_the_value_that_it_gives(tmp_path: Path) -> None:
    source = write(tmp_path, [row(0), row(1)])
    (tmp_path / "make.py").write_text(
        "import json\n\n\ndef rows(source):\n    for i, line in enumerate(open(source)):\n"
        "        yield {**json.loads(line), 'document': f'd{i}'}\n"
    )
    rows = read_rows(source)
    section = data_section(cluster="document", prepare="make.py")
    assert cluster_values(section, source, rows, root=tmp_path) == ["d0", "d1"]
