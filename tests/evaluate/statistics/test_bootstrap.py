"""Oracle: scipy.stats.bootstrap."""

import numpy as np
import pytest
from scipy.stats import bootstrap, norm, ttest_1samp

from graftline.errors import EvaluationError
from graftline.evaluate.statistics import intervals
from graftline.evaluate.statistics.intervals import Bootstrap, bias_correction, bootstrap_ratio

SKEWED = np.random.default_rng(3).exponential(1.0, 60) - 0.8


@pytest.mark.parametrize("method", ["percentile", "BCa"])
def test_limits_of_the_mean_agree_with_scipys(method: str) -> None:
    expected = bootstrap(
        (SKEWED,), np.mean, n_resamples=20_000, confidence_level=0.9, method=method, rng=np.random.default_rng(0)
    ).confidence_interval
    ours = bootstrap_ratio(SKEWED, bias_corrected=method == "BCa", num_resamples=20_000)
    assert (ours.lower_limit(0.05), ours.upper_limit(0.05)) == pytest.approx((expected.low, expected.high), abs=0.01)


def test_bca_limits_equal_scipys_on_the_same_resamples() -> None:
    theirs = bootstrap(
        (SKEWED,), np.mean, n_resamples=5_000, confidence_level=0.9, method="BCa", rng=np.random.default_rng(0)
    )
    resampled = np.sort(theirs.bootstrap_distribution)
    acceleration = bootstrap_ratio(SKEWED, num_resamples=10).acceleration
    ours = Bootstrap(SKEWED.mean(), resampled, acceleration, bias_correction(resampled, SKEWED.mean()))
    low, high = theirs.confidence_interval
    assert (ours.lower_limit(0.05), ours.upper_limit(0.05)) == pytest.approx((low, high), rel=1e-6)


def test_limits_of_a_ratio_agree_with_scipys_paired_bootstrap() -> None:
    rng = np.random.default_rng(5)
    tokens = rng.integers(5, 80, 70).astype(float)
    sums = tokens * rng.normal(0.05, 0.2, 70)
    expected = bootstrap(
        (sums, tokens),
        lambda d, w, axis=-1: d.sum(axis=axis) / w.sum(axis=axis),
        paired=True,
        n_resamples=20_000,
        confidence_level=0.9,
        rng=rng,
    ).confidence_interval
    ours = bootstrap_ratio(sums, tokens, num_resamples=20_000)
    assert ours.estimate == pytest.approx(sums.sum() / tokens.sum())
    assert (ours.lower_limit(0.05), ours.upper_limit(0.05)) == pytest.approx((expected.low, expected.high), abs=0.004)


@pytest.mark.parametrize("bias_corrected", [True, False])
def test_the_p_value_at_the_lower_limit_is_alpha(bias_corrected: bool) -> None:
    ours = bootstrap_ratio(SKEWED, bias_corrected=bias_corrected)
    for alpha in (0.01, 0.05, 0.3):
        assert ours.p_value(ours.lower_limit(alpha)) == pytest.approx(alpha, abs=0.003)


def test_the_p_value_is_close_to_the_t_tests_for_normal_differences() -> None:
    differences = np.random.default_rng(0).normal(0.1, 1.0, 400)
    expected = ttest_1samp(differences, 0.0, alternative="greater").pvalue
    assert bootstrap_ratio(differences).p_value(0.0) == pytest.approx(expected, abs=0.01)


def test_the_p_value_never_claims_more_than_the_resamples_can_tell() -> None:
    ours = bootstrap_ratio(SKEWED, num_resamples=999)
    assert ours.p_value(-100.0) == pytest.approx(1 / 1000)
    assert ours.p_value(100.0) == 1.0


def test_the_mirror_image_is_the_bootstrap_of_the_negated_values() -> None:
    ours, mirrored = bootstrap_ratio(SKEWED), bootstrap_ratio(SKEWED).mirrored()
    assert abs(ours.acceleration) > 0.01
    assert mirrored.estimate == -ours.estimate
    for alpha in (0.01, 0.05, 0.2):
        assert mirrored.lower_limit(alpha) == pytest.approx(-ours.upper_limit(alpha), abs=1e-9)
        assert mirrored.upper_limit(alpha) == pytest.approx(-ours.lower_limit(alpha), abs=1e-9)


def test_clusters_are_drawn_whole() -> None:
    rng = np.random.default_rng(1)
    by_cluster = np.repeat(rng.normal(0, 1, 30), 20)
    names = np.repeat(np.arange(30), 20).tolist()
    alone = bootstrap_ratio(by_cluster)
    clustered = bootstrap_ratio(by_cluster, clusters=names)
    assert clustered.estimate == pytest.approx(alone.estimate)
    # 20 equal items a cluster carry the information of one: the error is sqrt(20) times as large.
    assert clustered.standard_error / alone.standard_error == pytest.approx(20**0.5, rel=0.1)


def test_equal_seeds_give_equal_results_and_other_seeds_do_not() -> None:
    assert bootstrap_ratio(SKEWED, seed=4).resampled.tolist() == bootstrap_ratio(SKEWED, seed=4).resampled.tolist()
    assert bootstrap_ratio(SKEWED, seed=4).resampled.tolist() != bootstrap_ratio(SKEWED, seed=5).resampled.tolist()


def test_differences_that_are_all_equal_give_a_point() -> None:
    ours = bootstrap_ratio([0.0] * 20)
    assert (ours.lower_limit(0.05), ours.upper_limit(0.05)) == (0.0, 0.0)
    assert ours.p_value(-0.01) < 0.001
    assert ours.p_value(0.0) == 1.0


@pytest.mark.parametrize(
    ("sums", "weights", "clusters", "message"),
    [
        ([1.0], None, None, "1 items"),
        ([1.0, 2.0], None, ["a", "a"], "1 items or clusters"),
        ([1.0, 2.0], [1.0], None, "one value an item"),
        ([1.0, 2.0], None, ["a"], "one value an item"),
        ([1.0, float("nan")], None, None, "finite"),
        ([1.0, 2.0], [1.0, 0.0], None, "positive"),
    ],
)
def test_samples_that_cannot_be_resampled_are_refused(sums, weights, clusters, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        bootstrap_ratio(sums, weights, clusters=clusters)


def test_a_p_value_counts_the_bound_s_own_side_and_one_more() -> None:
    """Phipson and Smyth 2010: (b + 1) / (m + 1)."""
    nine = Bootstrap(0.5, np.arange(1, 10) / 10)
    assert nine.p_value(0.25) == pytest.approx(3 / 10)
    assert nine.p_value(0.05) == pytest.approx(1 / 10)
    assert nine.p_value(0.9) == 1.0


def test_a_mirrored_bootstrap_is_sorted_and_turned_around() -> None:
    turned = Bootstrap(2.0, np.array([1.0, 2.0, 4.0]), 0.1, -0.2).mirrored()
    assert turned.resampled.tolist() == [-4.0, -2.0, -1.0]
    assert (turned.estimate, turned.acceleration, turned.bias) == (-2.0, -0.1, 0.2)


def test_the_seed_is_zero_unless_another_is_given() -> None:
    given, default = (bootstrap_ratio(SKEWED, num_resamples=20, **seed) for seed in ({"seed": 0}, {}))
    assert default.resampled.tolist() == given.resampled.tolist()
    assert default.resampled.tolist() != bootstrap_ratio(SKEWED, num_resamples=20, seed=1).resampled.tolist()


@pytest.mark.parametrize(("sums", "num_resamples"), [([0.0] * 3 + [1.0], 2), ([0.0] * 9 + [1.0], 3)])
def test_resamples_are_corrected_unless_all_are_equal(sums: list[float], num_resamples: int) -> None:
    found = bootstrap_ratio(sums, num_resamples=num_resamples)
    assert len(set(found.resampled.tolist())) == 2
    assert found.acceleration > 0
    assert found.bias != 0
    equal = bootstrap_ratio([1.0, 1.0], num_resamples=num_resamples)
    assert (equal.estimate, equal.acceleration, equal.bias) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize(("num_units", "expected"), [(4, [2, 2, 2, 1]), (10, [1] * 7)])
def test_resamples_are_drawn_in_pieces_and_no_more_than_asked_for(
    num_units: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intervals, "_CHUNK_ELEMENTS", 8)
    pieces = list(intervals.draw(num_units, 7, np.random.default_rng(0)))
    assert [len(piece) for piece in pieces] == expected
    assert all(piece.shape[1] == num_units for piece in pieces)


def test_units_that_are_all_equal_have_no_acceleration() -> None:
    assert bootstrap_ratio(np.full(4, 2.0), np.ones(4), num_resamples=20).acceleration == 0.0


def test_the_acceleration_of_a_ratio_leaves_out_one_unit_at_a_time() -> None:
    sums, weights = np.array([1.0, 4.0, 2.0, 9.0]), np.array([1.0, 2.0, 4.0, 3.0])
    left_out = np.array([np.delete(sums, i).sum() / np.delete(weights, i).sum() for i in range(4)])
    u = left_out.mean() - left_out
    expected = (u**3).sum() / (6 * (u**2).sum() ** 1.5)
    assert bootstrap_ratio(sums, weights, num_resamples=20).acceleration == pytest.approx(expected)


@pytest.mark.parametrize(
    ("estimate", "share"),
    [(2.0, 1 / 2), (2.5, 3 / 4), (0.0, 1 / 5), (9.0, 4 / 5)],
    ids=["ties count half", "between", "below all", "above all"],
)
def test_the_bias_is_the_quantile_of_the_share_below_and_never_of_none_or_all(estimate: float, share: float) -> None:
    assert bias_correction(np.array([1.0, 2.0, 2.0, 3.0]), estimate) == pytest.approx(norm.ppf(share))
