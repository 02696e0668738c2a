"""Sides of a comparison measured turn about on a shared machine: what counts are ratios within a round."""

import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np

CONFIDENCE = 0.95
_RESAMPLES = 2000


def turns(sides: Mapping[str, Callable[[], float]], num_rounds: int, *, seed: int = 0) -> dict[str, list[float]]:
    """Seconds of every side in every round, after one warm-up each; the order within a round is random.

    Each side returns the seconds that it took itself, so that it can leave its preparation out.
    """
    for side in sides.values():
        side()
    rng = np.random.default_rng(seed)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(num_rounds):
        for name in rng.permutation(list(sides)):
            seconds[str(name)].append(sides[str(name)]())
    return seconds


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Median of the rounds' ratios, and its bootstrap interval (percentile, 95 %)."""
    ratios = np.asarray(numerator) / np.asarray(denominator)
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (_RESAMPLES, len(ratios))), axis=1)
    low, high = np.quantile(medians, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {
        "median": round(float(np.median(ratios)), 3),
        "low": round(float(low), 3),
        "high": round(float(high), 3),
        "rounds": len(ratios),
    }


def rate(count: int, seconds: Sequence[float]) -> float:
    """Things a second, at the median."""
    return round(count / statistics.median(seconds), 1)
