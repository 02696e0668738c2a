import numpy as np
import pytest
from scipy.stats import norm

from graftline.errors import EvaluationError
from studies.looks import spending_boundaries, spent_alpha


@pytest.mark.parametrize(
    ("looks", "published"),
    [
        (1, [1.960]),
        (2, [2.963, 1.969]),
        (3, [3.710, 2.511, 1.993]),
        (5, [4.877, 3.357, 2.680, 2.290, 2.031]),
    ],
)
def test_boundaries_equal_the_published_ones(looks: int, published: list[float]) -> None:
    """Lan-DeMets, O'Brien-Fleming type, one-sided 0.025, equally spaced looks."""
    shares = [(look + 1) / looks for look in range(looks)]
    assert spending_boundaries(shares, alpha=0.025) == pytest.approx(published, abs=1e-3)


def test_all_alpha_is_spent_at_the_end_and_rising_before() -> None:
    spent = [spent_alpha(share, alpha=0.05) for share in (0.2, 0.5, 0.8, 1.0)]
    assert spent == sorted(spent)
    assert spent[-1] == pytest.approx(0.05)


def test_simulated_looks_err_as_often_as_declared_and_unadjusted_looks_do_not() -> None:
    shares = [0.3, 0.6, 1.0]
    rng = np.random.default_rng(0)
    steps = rng.normal(0, 1, (40_000, 3)) * np.sqrt(np.diff([0.0, *shares]))
    z = steps.cumsum(axis=1) / np.sqrt(shares)
    stopped = (z > spending_boundaries(shares, alpha=0.05)).any(axis=1).mean()
    assert stopped == pytest.approx(0.05, abs=0.004)
    assert (z > norm.isf(0.05)).any(axis=1).mean() > 0.09


@pytest.mark.parametrize("shares", [[], [0.0, 1.0], [0.5, 0.5], [0.8, 0.4], [0.5, 1.2]])
def test_looks_out_of_order_are_refused(shares: list[float]) -> None:
    with pytest.raises(EvaluationError, match="rising"):
        spending_boundaries(shares, alpha=0.05)
