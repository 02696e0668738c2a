"""The column `data.cluster`: read from what was fetched, for the rows that were kept."""

import json
from pathlib import Path
from typing import Any

import pytest

from graftline.data.mixing import FetchedSource, column_values, read_sources
from graftline.errors import DataError
from tests.sections import data_section


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(column: str, *paths: Path, root: Path, prepare: str | None = None, last: int | None = None) -> list[str]:
    section = data_section(prepare=prepare).all_sources[0]
    sources = [FetchedSource(section, ((path.name, path),)) for path in paths]
    rows, spans = read_sources(sources, root)
    return column_values([column], sources, spans, rows[-last:] if last else rows[::-1], root)[column]


def row(index: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"question {index}", "completion": f" {index}", **more}


def test_each_row_has_the_value_of_its_own_line(tmp_path: Path) -> None:
    path = write(tmp_path, [row(0, user="ä"), row(1, user=7), row(2, user="b")])
    assert read("user", path, root=tmp_path) == ["b", "7", "ä"]
    assert read("user", path, root=tmp_path, last=1) == ["b"]


def test_rows_of_several_files_have_the_values_of_their_own(tmp_path: Path) -> None:
    first = write(tmp_path, [row(0, user="a"), row(1, user="b")])
    (tmp_path / "more").mkdir()
    second = write(tmp_path / "more", [row(2, user="c")])
    assert read("user", first, second, root=tmp_path) == ["c", "b", "a"]


def test_rows_without_a_value_are_told_together_with_their_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path, [row(0, user="a"), row(1), row(2, user=None), row(3, user=1.5), row(4, user=""), row(5, user=True)]
    )
    with pytest.raises(DataError) as caught:
        read("user", path, root=tmp_path)
    text = str(caught.value)
    for told in (
        "rows.jsonl:2: 'user' is missing",
        "rows.jsonl:3: 'user' is missing",
        "rows.jsonl:4: 'user' is 1.5",
        "rows.jsonl:5: ",
        "rows.jsonl:6: 'user' is True",
    ):
        assert told in text
    assert "rows.jsonl:1:" not in text


def test_rows_that_a_script_makes_have_the_value_that_it_gives(tmp_path: Path) -> None:
    source = write(tmp_path, [row(0), row(1)])
    (tmp_path / "make.py").write_text(
        "import json\n\n\ndef rows(source):\n    for i, line in enumerate(open(source)):\n"
        "        yield {**json.loads(line), 'document': f'd{i}'}\n"
    )
    assert read("document", source, root=tmp_path, prepare="make.py") == ["d1", "d0"]


def test_a_slice_may_be_missing_or_true(tmp_path: Path) -> None:
    path = write(tmp_path, [row(0, user=True), row(1), row(2, user=None), row(3, user=7), row(4, user="")])
    section = data_section().all_sources[0]
    sources = [FetchedSource(section, ((path.name, path),))]
    rows, spans = read_sources(sources, tmp_path)
    found = column_values(["user", "none"], sources, spans, rows, tmp_path, for_slices=True)
    assert found == {"user": ["true", "", "", "7", ""], "none": [""] * 5}


def test_a_script_is_run_once_for_all_columns(tmp_path: Path) -> None:
    source = write(tmp_path, [row(0), row(1)])
    (tmp_path / "make.py").write_text(
        "from pathlib import Path\n\n\ndef rows(source):\n    with open(Path(source).parent / 'runs', 'a') as runs:\n"
        "        runs.write('x')\n    for i in range(2):\n"
        "        yield {'prompt': f'question {i}', 'completion': 'a', 'user': 'u', 'language': i}\n"
    )
    sources = [FetchedSource(data_section(prepare="make.py").all_sources[0], (("rows.jsonl", source),))]
    rows, spans = read_sources(sources, tmp_path)
    found = column_values(["user", "language"], sources, spans, rows, tmp_path, for_slices=True)
    assert found == {"user": ["u", "u"], "language": ["0", "1"]}
    assert (tmp_path / "runs").read_text() == "xx"  # once for the rows, once for both columns


def test_a_slice_of_a_list_or_a_fraction_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, [row(0, user="a"), row(1, user=[1]), row(2, user=0.5)])
    section = data_section().all_sources[0]
    sources = [FetchedSource(section, ((path.name, path),))]
    rows, spans = read_sources(sources, tmp_path)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: 'user' is \[1\]; `data\.slices` asks for(.|\n)*jsonl:3: "):
        column_values(["user"], sources, spans, rows, tmp_path, for_slices=True)
