import numpy as np
import pytest
from scipy.stats import ttest_rel

from graftline.errors import EvaluationError
from graftline.evaluate.statistics.error_rates import equivalence_p_value, holm, paired_tost


def test_holm_equals_the_worked_example() -> None:
    """R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") is 0.03 0.06 0.06 0.02."""
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert list(adjusted) == ["a", "b", "c", "d"]
    assert list(adjusted.values()) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_never_exceeds_one_and_keeps_a_single_test() -> None:
    assert holm({"a": 0.7, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({"a": 0.04}) == {"a": 0.04}
    assert holm({}) == {}


def test_tost_is_the_larger_of_two_one_sided_t_tests() -> None:
    rng = np.random.default_rng(2)
    first = rng.normal(0, 1, 50)
    second = first + rng.normal(0.05, 0.2, 50)
    above = ttest_rel(second + 0.1, first, alternative="greater").pvalue
    below = ttest_rel(second - 0.1, first, alternative="less").pvalue
    assert paired_tost(second - first, -0.1, 0.1) == pytest.approx(max(above, below))
    assert equivalence_p_value(0.2, 0.01) == 0.2


def test_tost_of_constant_differences_depends_on_the_bounds_alone() -> None:
    assert paired_tost([0.0] * 5, -0.1, 0.1) == 0.0
    assert paired_tost([0.5] * 5, -0.1, 0.1) == 1.0


def test_tost_refuses_what_it_cannot_test() -> None:
    with pytest.raises(EvaluationError, match="at least two"):
        paired_tost([0.0], -1, 1)
    with pytest.raises(EvaluationError, match="low < high"):
        paired_tost([0.0, 1.0], 1, -1)
