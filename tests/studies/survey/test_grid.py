"""The study in a minute: real text, one small model, every kind of cell, results that are gone on with, the page."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graftline.errors import TrainError
from studies.survey import cells, family, page, text
from studies.survey.__main__ import OutOfTimeError, Results, read
from studies.survey.cells import Cell

ROOT = Path(__file__).resolve().parents[3]
CELL = Cell(
    arm="lora", size="xs", method="lora", learning_rate=1e-2, seed=0, steps=30, marks=(10, 30), measures_miub=True
)
pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    text.make(folder / "text", root=ROOT)
    family.make("xs", folder / "text", folder / "family" / "xs", steps=60)
    return folder


@pytest.fixture(scope="module")
def loaded(data: Path) -> text.Text:
    return text.load(data / "text")


def test_nothing_of_the_test_rows_is_in_the_corpus(data: Path, loaded: text.Text) -> None:
    import torch

    corpus = loaded.tokenizer.decode(torch.load(data / "text" / "corpus.pt").long())
    prompts = [loaded.tokenizer.decode(row.input_ids).partition("\nCategory:")[0] for row in loaded.test]
    assert len(prompts) == text.NUM_TEST
    assert not [prompt for prompt in prompts if f"{prompt}\nCategory:" in corpus]
    assert not {tuple(row.input_ids) for row in loaded.test} & {tuple(row.input_ids) for row in loaded.training}


@pytest.mark.parametrize(
    "cell",
    [
        CELL,
        replace(CELL, arm="full", method="full", learning_rate=1e-3, measures_miub=False),
        replace(CELL, arm="loftq", bits=2.5, paired=True, alpha=8.0, measures_miub=False),
        replace(CELL, arm="houlsby", method="houlsby", measures_miub=False),
    ],
    ids=lambda cell: cell.arm,
)
def test_a_cell_learns_and_can_be_had_again(data: Path, loaded: text.Text, cell: Cell) -> None:
    first, again = (cells.run(cell, loaded, data / "family") for _ in range(2))
    assert first["after"]["test"] < first["before"]["test"] - 0.3
    assert [look["step"] for look in first["curve"]] == [0, 10, 30]
    without = {"cpu_seconds": None}
    assert first | without == again | without
    assert ("miub" in first) == cell.measures_miub
    assert ("weight_error" in first) == (cell.bits < 16)


def test_what_is_done_is_not_run_again_and_what_fails_is_kept(tmp_path: Path) -> None:
    ran = []

    def run(cell: Cell) -> dict[str, Any]:
        ran.append(cell)
        return {"arm": cell.arm}

    results = Results(tmp_path, run, deadline=time.time() + 60)
    for _ in range(2):
        assert results.of("methods")(CELL) == {"arm": "lora"}
    assert ran == [CELL]
    assert list(read(tmp_path / "methods.json")["cells"]) == [CELL.name]
    with pytest.raises(OutOfTimeError):
        Results(tmp_path, run, deadline=0).of("methods")(replace(CELL, seed=1))


def test_what_needs_no_training_is_done_even_when_the_minutes_are_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from studies.survey import __main__ as survey

    started = []

    def run(part: str, **_: object) -> None:
        started.append(part)
        if part != "page":
            raise OutOfTimeError

    monkeypatch.setattr(survey, "run", run)
    assert survey.main(["methods", "laws", "page", "--minutes", "0"]) == 0
    assert started == ["methods", "laws", "page"]
    assert "methods: the minutes are over" in capsys.readouterr().out


def test_a_training_that_explodes_is_a_result(data: Path, loaded: text.Text, monkeypatch: pytest.MonkeyPatch) -> None:
    from studies.survey.__main__ import _runner

    def explode(*_: object) -> None:
        raise TrainError("the loss is not a number\nmore")

    monkeypatch.setattr(cells, "run", explode)
    assert _runner(loaded, data / "family")(CELL)["failed"] == "the loss is not a number"


def test_a_page_can_be_made_of_few_results(data: Path, loaded: text.Text, tmp_path: Path) -> None:
    found = {}
    for method in ("full", "lora"):
        for seed in (0, 1):
            cell = replace(CELL, arm=method, method=method, seed=seed, measures_miub=False, learning_rate=3e-3)
            found[cell.name] = cells.run(cell, loaded, data / "family")
    (tmp_path / "methods.json").write_text(json.dumps({"cells": found}))
    rendered = page.render(tmp_path)
    assert "of full fine-tuning's gain" in rendered
    assert "the part `laws` is not complete" in rendered
