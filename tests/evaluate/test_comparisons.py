import numpy as np
import pytest

from graftline.evaluate.comparisons import check_limit, compare
from graftline.evaluate.gate_rules import MetricSample
from graftline.evaluate.statistics.intervals import bootstrap_ratio
from tests.sections import gate_section

RNG = np.random.default_rng(4)
TOKENS = RNG.lognormal(4, 1, 200).astype(int) + 5
IDS = tuple(f"d{i:03}" for i in range(200))
RULE = gate_section("forgetting_nll", "lower", "non-inferiority", margin=0.1, against="base")


def documents(per_token: np.ndarray) -> MetricSample:
    return MetricSample(IDS, tuple(per_token * TOKENS), tuple(map(float, TOKENS)), "mean")


BASE = RNG.normal(3.0, 0.4, 200)
CHANGED = BASE + RNG.normal(0.3, 0.1, 200)


def test_the_deviation_of_one_document_gives_the_bootstraps_standard_error() -> None:
    found = compare(RULE, documents(CHANGED), documents(BASE))
    resampled = bootstrap_ratio((CHANGED - BASE) * TOKENS, TOKENS)
    assert found.deviation / 200**0.5 == pytest.approx(resampled.standard_error, rel=0.1)
    # Far from zero, the differences themselves vary mostly with the lengths; their deviation would be wrong.
    assert np.std((CHANGED - BASE) * TOKENS) / TOKENS.mean() > 2 * found.deviation


def test_goodness_above_the_bound_is_the_distance() -> None:
    found = compare(RULE, documents(CHANGED), documents(BASE))
    assert found.distance == pytest.approx(0.1 - found.difference)
    limit = check_limit(gate_section("forgetting_nll", "lower", "limit", limit=3.0), documents(CHANGED))
    assert limit.distance == pytest.approx(3.0 - limit.candidate)


def test_changing_sides_changes_the_sign_and_the_p_values() -> None:
    forward, back = (compare(RULE, documents(a), documents(b)) for a, b in ((CHANGED, BASE), (BASE, CHANGED)))
    assert back.difference == pytest.approx(-forward.difference)
    assert back.interval == pytest.approx((-forward.interval[1], -forward.interval[0]), abs=0.002)
    assert forward.p_broken < 0.001 < 0.999 < forward.p_holds
    assert back.p_holds < 0.001 < 0.999 < back.p_broken
