"""How much a number changes with the seed: means over repeated trainings with Student's t intervals.

mean ± t_{1-alpha/2, n-1} · s / sqrt(n), s with n - 1 in its denominator (Student 1908). Two variants that were trained
with the same seeds saw the same rows in the same order: their difference is taken seed by seed, which removes what the
seeds have in common.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from graftline.errors import EvaluationError


@dataclass(frozen=True)
class SeedEstimate:
    """A mean over ``num_seeds`` trainings; without a second training there is no interval."""

    mean: float
    low: float | None
    high: float | None
    num_seeds: int


def mean_over_seeds(values: Sequence[float], *, alpha: float = 0.05) -> SeedEstimate:
    """Mean of one number over seeds and its two-sided 1 - alpha interval.

    Raises:
        EvaluationError: there is no value.
    """
    if not values:
        raise EvaluationError("no value to take a mean of; at least one seed is expected")
    sample = np.asarray(values, dtype=float)
    mean, count = float(sample.mean()), len(sample)
    if count == 1:
        return SeedEstimate(mean, None, None, 1)
    half = float(student.ppf(1 - alpha / 2, count - 1) * sample.std(ddof=1) / math.sqrt(count))
    return SeedEstimate(mean, mean - half, mean + half, count)


def difference_over_seeds(
    values: Mapping[int, float], reference: Mapping[int, float], *, alpha: float = 0.05
) -> SeedEstimate | None:
    """Mean of ``values`` minus ``reference`` over the seeds that both have; None if they share none."""
    shared = sorted(values.keys() & reference.keys())
    return mean_over_seeds([values[seed] - reference[seed] for seed in shared], alpha=alpha) if shared else None
