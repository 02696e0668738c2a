"""Several tests at once (Holm 1979), and equivalence as two one-sided tests (Schuirmann 1987)."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from scipy.stats import t

from graftline.errors import EvaluationError


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values: the i-th smallest of m (from 0) times m - i, made monotone, at most 1.

    The probability of any false rejection among those with an adjusted p-value at most alpha is at most alpha.
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def equivalence_p_value(p_not_below: float, p_not_above: float) -> float:
    """Two one-sided tests: the larger of the two p-values ("at most the low bound", "at least the high bound")."""
    return max(p_not_below, p_not_above)


def paired_tost(differences: npt.ArrayLike, low: float, high: float) -> float:
    """p-value of H0 "the mean difference lies outside of (low, high)", by two one-sided paired t-tests.

    Raises:
        EvaluationError: fewer than two differences, or bounds in the wrong order.
    """
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or len(d) < 2 or not low < high:
        raise EvaluationError(f"{d.size} differences with bounds {low} and {high}; at least two and low < high needed")
    mean, error = float(d.mean()), float(d.std(ddof=1)) / len(d) ** 0.5
    if error == 0:
        return 0.0 if low < mean < high else 1.0
    above_low = float(t.sf((mean - low) / error, len(d) - 1))
    below_high = float(t.cdf((mean - high) / error, len(d) - 1))
    return equivalence_p_value(above_low, below_high)
