"""Oracles: Fagerland, Lydersen, Laake 2014 (children before and after transplantation: 1, 1, 7, 12), scipy, and the
definitions computed by brute force.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest, norm

from graftline.errors import EvaluationError
from graftline.evaluate.statistics.proportions import (
    PairedCounts,
    count_pairs,
    difference_p_value,
    few_units_p_value,
    mcnemar,
    mcnemar_exact,
    mcnemar_mid_p,
    rate_p_value,
    tango_interval,
    tango_score,
    wilson_interval,
)

PUBLISHED = PairedCounts(both=1, gained=1, lost=7, neither=12)


def test_mcnemar_equals_the_published_exact_and_mid_p_values() -> None:
    assert mcnemar_exact(PUBLISHED) == pytest.approx(0.0703, abs=5e-5)
    assert mcnemar_mid_p(PUBLISHED) == pytest.approx(0.0391, abs=5e-5)


def test_tango_equals_the_published_interval() -> None:
    assert tango_interval(PUBLISHED, alpha=0.05) == pytest.approx((-0.517, -0.026), abs=5e-4)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (3, 9), (9, 3), (5, 5), (0, 12)])
def test_mcnemar_exact_is_the_binomial_test_on_discordant_items(gained: int, lost: int) -> None:
    counts = PairedCounts(10, gained, lost, 4)
    expected = binomtest(gained, gained + lost, 0.5).pvalue if gained + lost else 1.0
    assert mcnemar_exact(counts) == pytest.approx(expected)


def test_mcnemar_is_exact_for_few_discordant_items_and_mid_p_for_many() -> None:
    few, many = PairedCounts(10, 8, 16, 4), PairedCounts(10, 8, 17, 4)
    assert mcnemar(few) == mcnemar_exact(few) != mcnemar_mid_p(few)
    assert mcnemar(many) == mcnemar_mid_p(many) != mcnemar_exact(many)


def test_mcnemar_mid_p_of_an_even_split_is_at_most_one() -> None:
    assert mcnemar_mid_p(PairedCounts(0, 5, 5, 0)) == pytest.approx(1.0)
    assert mcnemar_mid_p(PairedCounts(3, 0, 0, 0)) == 1.0


def test_mcnemar_mid_p_of_one_discordant_item_is_a_half() -> None:
    assert mcnemar_mid_p(PairedCounts(3, 1, 0, 0)) == pytest.approx(0.5)


@pytest.mark.parametrize(("successes", "total"), [(0, 20), (7, 20), (20, 20)])
def test_wilson_equals_scipys(successes: int, total: int) -> None:
    expected = binomtest(successes, total).proportion_ci(method="wilson")
    assert wilson_interval(successes, total, alpha=0.05) == pytest.approx((expected.low, expected.high))


def constrained_score(counts: PairedCounts, d: float) -> float:
    """Tango's statistic with the constrained maximum likelihood found numerically instead of by the closed form."""
    n, b, c = counts.total, counts.gained, counts.lost

    def negative_log_likelihood(lost_share: float) -> float:
        shares = np.clip([lost_share + d, lost_share, 1 - 2 * lost_share - d], 1e-300, None)
        return -float(np.array([b, c, n - b - c]) @ np.log(shares))

    found = minimize_scalar(
        negative_log_likelihood, bounds=(max(0.0, -d), (1 - d) / 2), method="bounded", options={"xatol": 1e-12}
    )
    return float((b - c - n * d) / np.sqrt(n * (2 * found.x + d - d * d)))


@pytest.mark.parametrize("d", [-0.3, -0.02, 0.0, 0.05, 0.4])
@pytest.mark.parametrize("counts", [PUBLISHED, PairedCounts(200, 30, 20, 50), PairedCounts(80, 5, 12, 3)])
def test_the_tango_score_equals_the_numerically_constrained_one(counts: PairedCounts, d: float) -> None:
    assert tango_score(counts, d) == pytest.approx(constrained_score(counts, d), rel=1e-4, abs=1e-4)


@settings(max_examples=200, deadline=None)
@given(st.tuples(*[st.integers(0, 40)] * 4).filter(any))
def test_the_interval_holds_the_estimate_stays_in_range_and_mirrors(cells: tuple[int, int, int, int]) -> None:
    counts = PairedCounts(*cells)
    mirrored = PairedCounts(counts.both, counts.lost, counts.gained, counts.neither)
    low, high = tango_interval(counts, alpha=0.1)
    assert -1 - 1e-9 <= low <= counts.difference + 1e-9
    assert counts.difference - 1e-9 <= high <= 1 + 1e-9
    assert tango_interval(mirrored, alpha=0.1) == pytest.approx((-high, -low), abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.tuples(st.integers(0, 60), st.integers(6, 40), st.integers(6, 40), st.integers(0, 60)))
def test_the_p_value_at_an_interval_limit_is_alpha(cells: tuple[int, int, int, int]) -> None:
    counts = PairedCounts(*cells)
    low, _ = tango_interval(counts, alpha=0.1)
    if low > -0.999:
        p_value, method = difference_p_value(counts, low)
        assert method == "Tango score"
        assert p_value == pytest.approx(0.05, abs=1e-6)


@pytest.mark.parametrize("total", [1, 2, 3, 5])
def test_the_interval_is_every_difference_that_the_score_does_not_reject(total: int) -> None:
    """At the ends of the range too, where all items were gained or lost."""
    z = float(norm.isf(0.05))
    for cells in itertools.product(range(total + 1), repeat=4):
        if sum(cells) != total:
            continue
        counts = PairedCounts(*cells)
        low, high = tango_interval(counts, alpha=0.1)
        for difference in np.linspace(-0.9995, 0.9995, 68):
            if min(abs(difference - low), abs(difference - high)) > 1e-4:
                assert (low < difference < high) == (abs(tango_score(counts, difference)) < z), (counts, difference)
        if counts.difference == 1:
            assert high == 1
        if counts.difference == -1:
            assert low == -1


def test_an_interval_of_very_many_items_ends_at_the_end_of_the_range() -> None:
    counts = PairedCounts(1, 0, 10**9 - 1, 0)  # where the search would begin, the score is not beyond the quantile
    low, high = tango_interval(counts, alpha=0.05)
    assert low == -1
    assert counts.difference < high < -1 + 1e-8


def test_the_score_of_items_that_never_differ() -> None:
    counts = PairedCounts(5, 0, 0, 5)
    assert tango_score(counts, 0.0) == 0.0
    assert (tango_score(counts, 1.0), tango_score(counts, -1.0)) == (-np.inf, np.inf)
    # q = 0, so that the variance is n d (1 - d).
    assert tango_score(PairedCounts(1, 0, 0, 0), 0.1) == pytest.approx(-0.1 / (0.1 * 0.9) ** 0.5)


def test_few_discordant_items_use_exact_binomial_p_values() -> None:
    counts = PairedCounts(280, 2, 1, 17)
    p_value, method = difference_p_value(counts, -0.02)
    assert method == "exact binomial"
    assert p_value == pytest.approx(binomtest(1, 300, 0.02, alternative="less").pvalue)
    p_value, method = difference_p_value(PairedCounts(280, 8, 1, 11), 0.0)
    assert method == "exact McNemar"
    assert p_value == pytest.approx(binomtest(8, 9, 0.5, alternative="greater").pvalue)
    assert difference_p_value(PairedCounts(280, 8, 2, 10), 0.0)[1] == "Tango score", "ten are not few"
    assert difference_p_value(PairedCounts(280, 2, 1, 17), 0.02)[1] == "Tango score", "neither is exact above 0"


def test_a_loss_that_no_model_can_have_is_ruled_out_for_certain() -> None:
    assert difference_p_value(PairedCounts(280, 2, 1, 17), -1.5) == (0.0, "exact binomial")


def test_models_that_agree_on_every_item_are_non_inferior_only_with_enough_items() -> None:
    assert difference_p_value(PairedCounts(50, 0, 0, 50), -0.02)[0] > 0.05
    assert difference_p_value(PairedCounts(150, 0, 0, 50), -0.02)[0] < 0.05


def test_the_rate_p_value_is_exact() -> None:
    assert rate_p_value(198, 200, 0.95) == pytest.approx(binomtest(198, 200, 0.95, alternative="greater").pvalue)
    with pytest.raises(EvaluationError, match="5 successes of 3"):
        rate_p_value(5, 3, 0.9)


def test_pairs_are_counted_by_cell() -> None:
    counts = count_pairs([True, True, False, False, True], [True, False, True, False, False])
    assert counts == PairedCounts(1, 2, 1, 1)
    assert counts.difference == pytest.approx(0.2)
    with pytest.raises(ValueError, match="shorter"):
        count_pairs([True, True], [True])
    assert norm.sf(tango_score(counts, 0.0)) < 0.5


def test_counts_of_nothing_are_refused() -> None:
    with pytest.raises(EvaluationError, match="at least one item"):
        PairedCounts(0, 0, 0, 0)
    for place in range(4):
        with pytest.raises(EvaluationError, match="not counts"):
            PairedCounts(*(-1 if at == place else 3 for at in range(4)))


def test_an_interval_of_all_successes_ends_at_one_though_its_sum_is_rounded_above() -> None:
    assert wilson_interval(15, 15, alpha=0.01)[1] == 1.0


@pytest.mark.parametrize(
    ("below", "above", "fall", "expected"),
    [
        pytest.param(2, 1, -0.1, 0.0, id="a bound above says nothing"),
        pytest.param(1, 3, 0.0, 5 / 16, id="no fall: the sign test"),
        pytest.param(1, 0, 0.5, 11 / 1024, id="the share of units below"),
        pytest.param(9, 0, 1.5, 0.0, id="more than a unit can lose: of ten, one did not fall"),
        pytest.param(10, 0, 1.5, 1.0, id="more than a unit can lose: all fell"),
    ],
)
def test_few_units_are_judged_by_the_binomial_distribution(
    below: int, above: int, fall: float, expected: float
) -> None:
    assert few_units_p_value(10, below=below, above=above, fall=fall) == pytest.approx(expected)


def test_a_rate_above_one_is_never_exceeded() -> None:
    assert rate_p_value(10, 10, 1.5) == 1.0
    assert rate_p_value(10, 10, 0.5) == pytest.approx(1 / 1024)
