"""Searches with Optuna itself, over trainings that are made up: a loss that follows from the settings, evaluation by
evaluation.
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graftline.digest import write_json
from graftline.errors import ConfigError, GraftlineError
from graftline.workflow.searching import Search, Space
from graftline.workflow.sweep_cells import SweepCell, SweepPlace, result_path
from graftline.workflow.sweeping import asked, parser
from tests.line.project import write_yaml
from tests.workflow.tiny_project import PIPELINE, tiny_settings

optuna = pytest.importorskip("optuna", reason="the extra `search` is not installed")

SPACE: Space = {"train.learning_rate": ["1e-5..1e-1"], "adapter.rank": ["2..16"], "adapter.method": ["lora", "dora"]}
BEST_RATE, EVALUATIONS = 1e-3, 9


class EnoughError(Exception):
    """The search is killed."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    pipeline = tiny_settings()
    pipeline["train"] |= {"held_out_rows": 20, "evaluate_every": 2}
    write_yaml(tmp_path, {"pipelines": {PIPELINE: pipeline}, "channels": {"production": {}}})
    return tmp_path


def loss_at(overrides: dict[str, Any], number: int) -> float:
    """Best at one rate whatever the rest, and lower from evaluation to evaluation."""
    return 1 + abs(math.log10(overrides["train.learning_rate"] / BEST_RATE)) + 1 / number


class Trainings:
    """Trainings that take no time; after so many, the search is killed."""

    def __init__(self, out: Path, *, most: int = 10**9, fails_above: float = math.inf) -> None:
        self.out, self.most, self.fails_above, self.seen = out, most, fails_above, list[tuple[dict[str, Any], int]]()

    def __call__(self, cell: SweepCell, watch: Callable[[str], None]) -> None:
        if len(self.seen) == self.most:
            raise EnoughError
        self.seen.append((cell.overrides, 0))
        if cell.overrides.get("train.learning_rate", 0) > self.fails_above:
            raise GraftlineError("the loss is not finite")
        history = []
        for number in range(1, EVALUATIONS + 1):
            loss = loss_at({"train.learning_rate": BEST_RATE} | cell.overrides, number)
            self.seen[-1] = cell.overrides, number
            watch(f"train: after step {2 * number} of {2 * EVALUATIONS} the held-out loss is {loss:.6g}")
            history.append({"step": 2 * number, "loss": loss, "held_out_loss": loss})
        write_result(self.out, cell, history)


def write_result(out: Path, cell: SweepCell, history: list[dict[str, float]]) -> None:
    results = {
        "train": {"loss_last": 1.0, "trained_parameters": 1},
        "history": history,
        "train_cost": {"seconds": 1.0},
        "evaluate": {"candidate": {"accuracy": 0.5}},
    }
    write_json(result_path(out, cell), {"revision": "0", "results": results})


def open_search(root: Path, out: Path, space: Space = SPACE, *, seed: int = 0) -> Search:
    return Search(SweepPlace(root, "0", out, None), PIPELINE, space, seed=seed)


def run(root: Path, out: Path, space: Space = SPACE, *, count: int, **how: Any) -> tuple[Search, Trainings]:
    """A search that is killed after so many trainings."""
    found, trainings = open_search(root, out, space), Trainings(out, most=count, **how)
    with pytest.raises(EnoughError):
        found.run(trainings, deadline=math.inf)
    return found, trainings


def test_bad_trainings_are_stopped_early_and_good_settings_found(root: Path, tmp_path: Path) -> None:
    found, trainings = run(root, tmp_path / "out", count=24)
    best = found.ranked()[0]
    assert abs(math.log10(best.overrides["train.learning_rate"] / BEST_RATE)) < 0.2
    assert best.held_out_loss == loss_at(best.overrides, EVALUATIONS)
    ended = {number for _, number in trainings.seen}
    assert ended <= {1, 3, 9}  # the evaluations that decide, and the end
    states = [trial.state for trial in found.trials]
    assert states.count("stopped") > 8
    away = [abs(math.log10(trial.overrides["train.learning_rate"] / BEST_RATE)) for trial in found.trials]
    assert statistics.median(away[10:]) < 0.8  # 1.0 where they are drawn at random
    found.finish()
    text = (tmp_path / "out" / "search.txt").read_text(encoding="utf-8")
    assert text.startswith(f"24 cells tried: {states.count('complete')} to the end, {states.count('stopped')} stopped")
    assert f"train.learning_rate={best.overrides['train.learning_rate']}" in text.splitlines()[2]
    assert json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))["pipeline"] == PIPELINE


def test_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(root: Path, tmp_path: Path) -> None:
    whole, _ = run(root, tmp_path / "whole", count=10)
    for count in (1, 4, 5):
        parts, _ = run(root, tmp_path / "parts", count=count)
    assert parts.trials == whole.trials
    assert {trial.state for trial in whole.trials} == {"complete", "stopped"}
    other = open_search(root, tmp_path / "other", seed=1)
    with pytest.raises(EnoughError):
        other.run(Trainings(tmp_path / "other", most=3), deadline=math.inf)
    assert other.trials != whole.trials[:3]


def test_a_training_that_fails_is_told_and_its_neighbourhood_avoided(root: Path, tmp_path: Path) -> None:
    found, _ = run(root, tmp_path / "out", {"train.learning_rate": ["1e-5..1e-1"]}, count=16, fails_above=0.01)
    failed = [number for number, trial in enumerate(found.trials) if trial.state == "failed"]
    assert failed
    assert len([number for number in failed if number >= 8]) <= 2
    found.finish()
    text = (tmp_path / "out" / "search.txt").read_text(encoding="utf-8")
    assert text.count("the loss is not finite") == len(failed)


def test_a_cell_of_an_earlier_sweep_is_not_run_again_and_a_small_space_ends(root: Path, tmp_path: Path) -> None:
    out, space = tmp_path / "out", {"adapter.rank": [2, 4], "adapter.targets": ["all-linear", ["q_proj"]]}
    found = open_search(root, out, space)
    known = {"adapter.rank": 4, "adapter.targets": ["q_proj"]}
    write_result(out, found._cell(known), [{"step": 2, "loss": 3.0, "held_out_loss": 0.25}])
    trainings = Trainings(out)
    found.run(trainings, deadline=math.inf)
    assert len(found.trials) == 4
    assert known not in [overrides for overrides, _ in trainings.seen]
    assert (found.ranked()[0].overrides, found.ranked()[0].held_out_loss) == (known, 0.25)


def test_no_cell_is_started_after_the_deadline(root: Path, tmp_path: Path) -> None:
    found = open_search(root, tmp_path / "out")
    found.run(Trainings(tmp_path / "out", most=0), deadline=time.time() - 1)
    assert found.trials == []
    found.finish()
    assert "0 cells tried" in (tmp_path / "out" / "search.txt").read_text(encoding="utf-8")


def test_ranges_are_whole_numbers_or_few_digits_within_their_ends(root: Path, tmp_path: Path) -> None:
    space = {"train.learning_rate": ["0.00012345..0.00012389"], "adapter.rank": ["4..6"]}
    found, _ = run(root, tmp_path / "out", space, count=4)
    for trial in found.trials:
        assert trial.overrides["adapter.rank"] in (4, 5, 6)
        assert 0.00012345 <= trial.overrides["train.learning_rate"] <= 0.00012389


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "given --search without --set"),
        ({"adapter.rank": ["8..4"]}, r"given adapter\.rank=8\.\.4; expected LOW\.\.HIGH with LOW below HIGH"),
        ({"adapter.rank": ["4..8", 16]}, r"expected one range LOW\.\.HIGH, or values"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(root: Path, tmp_path: Path, space: Space, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_search(root, tmp_path / "out", space)


def test_a_setting_that_does_not_exist_is_refused_before_anything_runs(root: Path, tmp_path: Path) -> None:
    found = open_search(root, tmp_path / "out", {"adapter.rnak": ["2..4"]})
    with pytest.raises(ConfigError, match="did you mean `rank`"):
        found.run(Trainings(tmp_path / "out"), deadline=math.inf)


def test_a_pipeline_without_held_out_rows_and_a_folder_of_another_search_are_refused(
    root: Path, tmp_path: Path
) -> None:
    run(root, tmp_path / "out", count=1)
    with pytest.raises(ConfigError, match=r"search\.json is of another search .* give another folder with --out"):
        open_search(root, tmp_path / "out", seed=5)
    write_yaml(root, {"pipelines": {PIPELINE: tiny_settings()}, "channels": {"production": {}}})
    with pytest.raises(ConfigError, match=r"compares losses on held-out rows, and pets has none; set its"):
        open_search(root, tmp_path / "new")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--set adapter.rank=2..4 --seeds 0", "given a range for adapter.rank; expected values, or --search"),
        ("--search --set adapter.rank=2..4", "given --search without --budget"),
        ("--search --set adapter.rank=2..4 --budget 1 --workers 2", "cells run one after another"),
        ("--search --set adapter.rank=2..4 --budget 1 --seeds 0,1", "one seed"),
        ("--search --budget 1", "given --search without --set"),
    ],
)
def test_a_command_line_that_contradicts_itself_is_refused(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        asked(parser().parse_args([PIPELINE, *line.split()]))


def test_the_budget_and_the_space_reach_the_flow() -> None:
    given = parser().parse_args([PIPELINE, "--search", "--set", "adapter.rank=2..4", "--budget", "1.5"])
    assert asked(given) == {"space": {"adapter.rank": ["2..4"]}, "minutes": 1.5, "seeds": [0], "out": None}
