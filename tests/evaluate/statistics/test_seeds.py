import math

import numpy as np
import pytest
from scipy import stats

from graftline.errors import EvaluationError
from graftline.evaluate.statistics.intervals import SeedEstimate, difference_over_seeds, mean_over_seeds


def test_the_interval_is_student_s() -> None:
    values = [0.81, 0.84, 0.79, 0.88]
    found = mean_over_seeds(values, alpha=0.1)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert (found.mean, found.num_seeds) == (pytest.approx(np.mean(values)), 4)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_one_seed_has_no_interval_and_none_is_an_error() -> None:
    assert mean_over_seeds([3.0]) == SeedEstimate(3.0, None, None, 1)
    with pytest.raises(EvaluationError, match="at least one seed"):
        mean_over_seeds([])


def test_a_difference_is_paired_by_seed() -> None:
    ours, theirs = {0: 0.81, 1: 0.92, 2: 0.70, 9: 0.0}, {2: 0.69, 1: 0.89, 0: 0.80, 5: 1.0}
    found = difference_over_seeds(ours, theirs)
    expected = stats.ttest_rel([0.81, 0.92, 0.70], [0.80, 0.89, 0.69]).confidence_interval(0.95)
    assert found is not None
    assert found.num_seeds == 3
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert difference_over_seeds({0: 1.0}, {1: 1.0}) is None


def test_an_interval_ends_where_its_number_does() -> None:
    assert mean_over_seeds([0.9, 1.0], bounds=(0.0, 1.0)).high == 1.0
    assert mean_over_seeds([0.9, 1.0], bounds=(0.0, 1.0)).low == mean_over_seeds([0.9, 1.0]).low
    assert mean_over_seeds([70.0, 88.0], bounds=(0.0, math.inf)).low == 0.0
    found = difference_over_seeds({0: 1.0, 1: 0.1}, {0: 0.0, 1: 0.5}, bounds=(0.0, 1.0))
    assert found is not None
    assert (found.low, found.high) == (-1.0, 1.0)
    half = difference_over_seeds({0: 1.0, 1: 0.5}, {0: 0.5, 1: 1.0}, bounds=(0.5, 1.0))
    assert half is not None
    assert (half.low, half.high) == (-0.5, 0.5)


def test_a_difference_has_the_interval_of_its_alpha() -> None:
    ours, theirs = {0: 0.81, 1: 0.92, 2: 0.70}, {0: 0.80, 1: 0.89, 2: 0.69}
    found = difference_over_seeds(ours, theirs, alpha=0.5)
    assert found == mean_over_seeds([ours[seed] - theirs[seed] for seed in range(3)], alpha=0.5)
    assert found != difference_over_seeds(ours, theirs)
