import numpy as np
import pytest
from scipy.stats import ttest_rel

from graftline.errors import EvaluationError
from studies.serving import paired_tost


def test_tost_is_the_larger_of_two_one_sided_t_tests() -> None:
    rng = np.random.default_rng(2)
    first = rng.normal(0, 1, 50)
    second = first + rng.normal(0.05, 0.2, 50)
    above = ttest_rel(second + 0.1, first, alternative="greater").pvalue
    below = ttest_rel(second - 0.1, first, alternative="less").pvalue
    assert paired_tost(second - first, -0.1, 0.1) == pytest.approx(max(above, below))


def test_tost_of_constant_differences_depends_on_the_bounds_alone() -> None:
    assert paired_tost([0.0] * 5, -0.1, 0.1) == 0.0
    assert paired_tost([0.5] * 5, -0.1, 0.1) == 1.0


def test_tost_refuses_what_it_cannot_test() -> None:
    with pytest.raises(EvaluationError, match="at least two"):
        paired_tost([0.0], -1, 1)
    with pytest.raises(EvaluationError, match="low < high"):
        paired_tost([0.0, 1.0], 1, -1)
