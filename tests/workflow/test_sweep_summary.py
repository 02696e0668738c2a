"""Means by variant, differences by seed, what is missing and what failed: as JSON, as text and on the page."""

import json
from pathlib import Path
from typing import Any

from graftline.digest import write_json
from graftline.workflow.sweep_cells import SweepCell, result_path, summarize, write_summary

ACCURACY = {("small", 0): 0.80, ("small", 1): 0.90, ("large", 0): 0.82, ("large", 1): 0.93}


def cell(variant: str, seed: int) -> SweepCell:
    sections = {"evaluate": {"metric": "accuracy"}, "adapter": {"size": variant}, "train": {"seed": seed}}
    return SweepCell("pets", variant, {}, seed, sections, {})


CELLS = [cell("small", 0), cell("small", 1), cell("large", 0), cell("large", 1)]


def result(one: SweepCell) -> dict[str, Any]:
    return {
        "revision": "a" * 40,
        "results": {
            "train": {"loss_last": 1.0, "trained_parameters": 12},
            "train_cost": {"seconds": 2.0},
            "evaluate": {
                "base": {"accuracy": 0.1},
                "candidate": {"accuracy": ACCURACY[one.variant, one.seed], "labels": {"cat": {}}},
            },
        },
    }


def test_means_and_paired_differences_are_over_the_seeds() -> None:
    view = summarize(CELLS, {one.name: result(one) for one in CELLS})
    small, large = view.variants
    assert (round(small.metrics["accuracy"].mean, 3), small.difference) == (0.85, None)
    assert small.metrics["accuracy"].low is not None
    assert small.metrics["accuracy"].low < 0.3  # two seeds that differ by 0.1 show little
    assert small.metrics["accuracy"].high == 1.0  # 1.49 by Student's t alone
    assert small.metrics["train_seconds"].low == 2.0
    assert large.difference is not None
    assert round(large.difference.mean, 3) == 0.025
    assert large.values == ((0, 0.82), (1, 0.93))
    assert view.seeds == (0, 1)
    assert view.columns == ("accuracy", "loss_last", "train_seconds", "trained_parameters")


def test_what_is_not_done_is_counted_and_shown(tmp_path: Path) -> None:
    for one in CELLS[:3]:
        write_json(result_path(tmp_path, one), result(one))
    write_summary(tmp_path, CELLS, [(CELLS[3], "the loss is <nan>")])
    assert json.loads((tmp_path / "summary.json").read_text())["variants"][1]["missing"] == 1
    text = (tmp_path / "summary.txt").read_text()
    assert "not done: 1 cell; run again to go on" in text
    assert "Two seeds tell little" in text
    page = (tmp_path / "sweep.html").read_text()
    assert "1 to do" in page
    assert "Two seeds tell little" in page
    assert "the loss is &lt;nan&gt;" in page
    assert page.count('class="seed"') == 3


def test_a_sweep_of_which_nothing_is_done_has_a_page(tmp_path: Path) -> None:
    write_summary(tmp_path, CELLS)
    assert "not run" in (tmp_path / "summary.txt").read_text()
    assert "<svg" not in (tmp_path / "sweep.html").read_text()


def test_cells_of_different_commits_are_marked() -> None:
    results = {one.name: result(one) | {"revision": str(one.seed) * 40} for one in CELLS}
    assert len(summarize(CELLS, results).revisions) == 2
