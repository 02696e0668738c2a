import numpy as np
import pytest
from scipy.stats import t, ttest_1samp

from graftline.errors import EvaluationError
from graftline.evaluate.statistics.intervals import bootstrap_ratio, studentized_ratio

RNG = np.random.default_rng(3)
TOKENS = RNG.lognormal(4, 0.5, 80)
SUMS = (RNG.exponential(1.0, 80) - 0.8) * TOKENS


def test_limits_equal_those_computed_resample_by_resample() -> None:
    """The definition, with the same draws: half as many units as there are."""
    found = studentized_ratio(SUMS, TOKENS, num_resamples=400, seed=5)
    drawn = np.random.default_rng(5).integers(0, 80, (400, 40))
    ratio = SUMS.sum() / TOKENS.sum()

    def error(d: np.ndarray, w: np.ndarray) -> float:
        return float(np.sqrt(((d - d.sum() / w.sum() * w) ** 2).sum()) / w.sum())

    pivots = [(SUMS[i].sum() / TOKENS[i].sum() - ratio) / error(SUMS[i], TOKENS[i]) for i in drawn]
    assert found.standard_error == pytest.approx(error(SUMS, TOKENS))
    assert found.lower_limit(0.05) == pytest.approx(ratio - np.quantile(pivots, 0.95) * error(SUMS, TOKENS))
    assert found.upper_limit(0.05) == pytest.approx(ratio - np.quantile(pivots, 0.05) * error(SUMS, TOKENS))


def test_normal_differences_give_the_t_tests_limits_and_p_value() -> None:
    values = np.random.default_rng(0).normal(0.1, 1.0, 60)
    found = studentized_ratio(values, np.ones(60), num_resamples=40_000)
    half = t.isf(0.05, 59) * values.std(ddof=1) / 60**0.5
    assert found.lower_limit(0.05) == pytest.approx(values.mean() - half, abs=0.015)
    assert found.p_value(0.0) == pytest.approx(ttest_1samp(values, 0.0, alternative="greater").pvalue, abs=0.01)


def test_the_p_value_at_the_lower_limit_is_alpha_and_never_zero() -> None:
    found = studentized_ratio(SUMS, TOKENS)
    for alpha in (0.01, 0.05, 0.3):
        assert found.p_value(found.lower_limit(alpha)) == pytest.approx(alpha, abs=0.001)
    assert found.p_value(-1e9) == pytest.approx(1 / 10_001)


def test_the_mirror_image_is_that_of_the_negated_values() -> None:
    mirrored, negated = studentized_ratio(SUMS, TOKENS).mirrored(), studentized_ratio(-SUMS, TOKENS)
    assert mirrored.estimate == pytest.approx(negated.estimate)
    assert mirrored.lower_limit(0.05) == pytest.approx(negated.lower_limit(0.05))
    assert mirrored.p_value(0.1) == pytest.approx(negated.p_value(0.1))


def test_values_that_are_all_in_proportion_give_a_point() -> None:
    found = studentized_ratio(0.5 * TOKENS, TOKENS, num_resamples=99)
    assert found.lower_limit(0.05) == found.upper_limit(0.05) == pytest.approx(0.5)
    assert found.p_value(0.4) == 0.01
    assert found.p_value(0.6) == 1.0
    assert studentized_ratio([2.0, 2.0], [4.0, 4.0]).p_value(0.5) == 1.0, "a point on the bound is not above it"


def test_the_error_scales_with_the_values_however_small() -> None:
    whole, small = studentized_ratio(SUMS, TOKENS, num_resamples=9), studentized_ratio(1e-6 * SUMS, TOKENS)
    assert small.standard_error == pytest.approx(1e-6 * whole.standard_error)


def test_a_resample_of_few_units_holds_two_of_them() -> None:
    """One unit drawn alone has no error of its own, and three of three are not half."""
    values = np.array([0.0, 1.0, 5.0])
    found = studentized_ratio(values, np.ones(3), num_resamples=2_000)
    pairs = {(a, b) for a in values for b in values if a != b}
    possible = {0.0} | {((a + b) / 2 - 2.0) / (abs(a - b) / 8**0.5) for a, b in pairs}
    assert {round(pivot, 9) for pivot in found.pivots.tolist()} == {round(pivot, 9) for pivot in possible}


def test_skewed_losses_are_passed_less_often_than_with_bca() -> None:
    rng = np.random.default_rng(1)
    passed = {"studentized": 0, "bca": 0}
    for _ in range(300):
        tokens = rng.lognormal(4.5, 0.7, 60)
        worse = (0.02 + (rng.exponential(1, 60) - 1) * 0.08) * tokens
        passed["studentized"] += studentized_ratio(worse, tokens, num_resamples=499).upper_limit(0.05) < 0.02
        passed["bca"] += bootstrap_ratio(worse, tokens, num_resamples=499).upper_limit(0.05) < 0.02
    assert passed["studentized"] < passed["bca"]
    assert passed["studentized"] / 300 < 0.07


def test_what_cannot_be_resampled_is_refused() -> None:
    with pytest.raises(EvaluationError, match="1 items"):
        studentized_ratio([1.0], [1.0])
