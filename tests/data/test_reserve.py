"""Rows kept back for promotions: written apart, neither trained on nor evaluated, and said so beside the figures."""

import json
from pathlib import Path
from typing import Any

import pytest

from graftline.data.mixing import FetchedSource
from graftline.data.preparation import EVALUATION, RESERVE, TRAINING, prepare_rows
from graftline.data.rows import Message, Row, read_rows, write_rows
from graftline.errors import DataError
from graftline.registry.reserve import ROWS
from graftline.release.pages.run_page import judged_by
from graftline.settings.data import EvaluationRows, RowSource
from graftline.workflow.assembling import _collect as collect
from tests.sections import data_section

WORDS = ("river", "stone", "lamp", "violin", "engine", "harvest", "comet", "ladder")


def row(number: int) -> Row:
    prompt = " ".join(WORDS[number // 8**place % 8] + str(number * 7919 % 97) for place in range(4))
    return Row((Message("user", prompt, False), Message("assistant", "A", True)), number + 1)


def prepare(
    folder: Path, rows: list[Row], *, frozen: list[Row] | None = None, leaks: str = "error", **given: Any
) -> Any:
    write_rows(folder / "rows.jsonl", rows)
    source = FetchedSource(RowSource(source="path:rows.jsonl"), (("rows.jsonl", folder / "rows.jsonl"),))
    section, fixed = data_section(evaluation_rows=8, **given), None
    if frozen:
        write_rows(folder / "frozen.jsonl", frozen)
        of = EvaluationRows(source="path:frozen.jsonl", sha256="0" * 64, leaks=leaks)  # type: ignore[arg-type]
        section, fixed = section.replace(evaluation=of), FetchedSource(of, (("f", folder / "frozen.jsonl"),))
    return prepare_rows(section, [source], fixed, root=folder, out=folder / "out")


def prompts(path: Path) -> set[str]:
    return {each.prompt for each in read_rows(path)}


def test_the_reserve_lies_in_a_folder_that_looks_like_the_evaluation_s(tmp_path: Path) -> None:
    rows, out = [row(number) for number in range(40)], tmp_path / "out"
    prepare(tmp_path, rows)
    assert not (out / RESERVE).exists()
    before = (out / EVALUATION).read_bytes()
    prepare(tmp_path, rows, reserve_rows=6)
    assert (out / EVALUATION).read_bytes() == before
    sides = [prompts(out / name) for name in (TRAINING, EVALUATION, f"{RESERVE}/{EVALUATION}")]
    assert [*map(len, sides)] == [26, 8, 6]
    assert len(set.union(*sides)) == 40
    assert (out / RESERVE / "general.jsonl").read_bytes() == b""


def test_a_repeat_of_a_row_that_is_kept_back_is_not_trained_on(tmp_path: Path) -> None:
    rows, out = [row(number) for number in range(40)], tmp_path / "out"
    again = [Row(each.messages, each.source_line + 40) for each in rows]
    found = prepare(tmp_path, rows + again, reserve_rows=6, duplicates="keep")
    assert len(read_rows(out / TRAINING)) == 2 * 26
    assert len(read_rows(out / RESERVE / EVALUATION)) == 6
    assert not prompts(out / TRAINING) & prompts(out / RESERVE / EVALUATION)
    assert len(found.dropped["duplicates"]) == 8 + 6


def test_a_row_that_every_run_evaluates_is_not_kept_back(tmp_path: Path) -> None:
    rows, out = [row(number) for number in range(40)], tmp_path / "out"
    prepare(tmp_path, rows, reserve_rows=6)
    seen = [each for each in rows if each.prompt in prompts(out / RESERVE / EVALUATION)][:2]
    with pytest.raises(DataError, match=r"data.reserve_rows: 2 rows .* are, or are nearly, rows of data.evaluation"):
        prepare(tmp_path, rows, frozen=seen, reserve_rows=6)
    prepare(tmp_path, rows, frozen=seen, leaks="drop", reserve_rows=6)
    assert len(read_rows(out / RESERVE / EVALUATION)) == 6
    assert not prompts(out / RESERVE / EVALUATION) & {each.prompt for each in seen}


def test_beside_the_figures_stands_that_none_comes_from_the_reserve(tmp_path: Path) -> None:
    for name, text in (("train", "{}\n" * 3), ("evaluation", "{}\n" * 2)):
        (tmp_path / "fetch").mkdir(exist_ok=True)
        (tmp_path / "fetch" / f"{name}.jsonl").write_text(text)
    (tmp_path / "gate").mkdir()
    gate = {"metric": "accuracy", "num_items": 2, "guard": None}
    (tmp_path / "gate" / "verdict.json").write_text(json.dumps({"gates": [gate]}))
    assert "promotions" not in judged_by(data_section(), tmp_path)
    told = judged_by(data_section(reserve_rows=300), tmp_path)
    assert told.startswith("2 evaluation rows (drawn from the source); the gates on accuracy chose this release")
    assert told.endswith("; none comes from the 300 rows that only promotions look at")


def test_the_reserve_travels_with_the_release(tmp_path: Path) -> None:
    runs, base, out = tmp_path / "runs", tmp_path / "base", tmp_path / "package"
    for name in ("train/adapter/a", "evaluate/scores/a", "gate/verdict.json", "gate/verdict.md", "merge/parity.json"):
        (runs / name).parent.mkdir(parents=True, exist_ok=True)
        (runs / name).write_text("a")
    collect(runs, base, out)
    assert not (out / RESERVE).exists()
    (runs / "fetch" / RESERVE).mkdir(parents=True)
    (runs / "fetch" / RESERVE / EVALUATION).write_text("rows")
    collect(runs, base, tmp_path / "other")
    assert (tmp_path / "other" / ROWS).read_text() == "rows"
