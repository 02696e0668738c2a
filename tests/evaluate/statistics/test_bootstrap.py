"""Oracle: scipy.stats.bootstrap."""

import numpy as np
import pytest
from scipy.stats import bootstrap, ttest_1samp

from graftline.errors import EvaluationError
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
