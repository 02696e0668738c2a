"""Intervals over seeds, and verdicts."""

import math

import pytest
from scipy import stats

from studies.survey.arms import arm, decide, difference, estimate
from studies.survey.grid import TUNING_SEED


def test_the_interval_is_students() -> None:
    found = estimate([1.0, 2.0, 4.0])
    low, high = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem([1.0, 2.0, 4.0]))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_one_seed_decides_nothing() -> None:
    found = estimate([-5.0])
    assert math.isinf(found.high)
    assert decide(found, wanted_below=0) == "not decided"


def test_differences_are_taken_seed_by_seed() -> None:
    found = difference({0: 1.0, 1: 2.0, 2: 9.0}, {0: 0.5, 1: 1.5, 3: 0.0})
    assert (found.mean, found.seeds) == (0.5, 2)
    assert (found.low, found.high) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("values", "verdict"), [([-3.0, -3.1], "supported"), ([3.0, 3.1], "not supported"), ([-1.0, 1.0], "not decided")]
)
def test_verdicts(values: list[float], verdict: str) -> None:
    assert decide(estimate(values), wanted_below=0) == verdict


def test_the_seed_of_the_tuning_is_no_result() -> None:
    cells = [{"arm": "lora", "seed": seed} for seed in (0, 1, TUNING_SEED)] + [{"arm": "dora", "seed": 2}]
    assert sorted(arm(cells, "lora")) == [0, 1]
