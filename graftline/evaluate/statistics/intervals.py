"""Intervals for means and ratios of sums: percentile, BCa and studentized bootstraps, and Student's t over seeds."""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import norm
from scipy.stats import t as student

from graftline.errors import EvaluationError

# Paired bootstrap of a mean or a ratio of sums, by item, by document or by cluster, percentile and BCa.
#
# The statistic is sum(d_i) / sum(w_i) over resampled units: with d_i = a_i - b_i and w_i = 1 the mean paired
# difference; with sums of NLL and token counts the difference of token-weighted NLL. Resampled units are items, or
# whole clusters. Source: Efron and Tibshirani 1993, chapters 13 and 14.

Floats = npt.NDArray[np.float64]
NUM_RESAMPLES = 10_000
_CHUNK_ELEMENTS = 4_000_000


@dataclass(frozen=True)
class Bootstrap:
    """A resampled estimate. ``acceleration`` and ``bias`` (z0) are 0 for percentile limits.

    ``resampled`` is sorted.
    """

    estimate: float
    resampled: Floats
    acceleration: float = 0.0
    bias: float = 0.0

    @property
    def standard_error(self) -> float:
        """Standard deviation of the resampled estimates."""
        return float(np.std(self.resampled, ddof=1))

    def lower_limit(self, alpha: float) -> float:
        """One-sided 1 - alpha lower limit."""
        return self._quantile(float(norm.ppf(alpha)))

    def upper_limit(self, alpha: float) -> float:
        """One-sided 1 - alpha upper limit."""
        return self._quantile(float(norm.isf(alpha)))

    def p_value(self, bound: float) -> float:
        """One-sided p-value of H0 "the true value is at most ``bound``": the alpha whose lower limit is the bound.

        Never below 1 / (resamples + 1).
        """
        at_most = int(np.searchsorted(self.resampled, bound, side="right"))
        share = (at_most + 1) / (len(self.resampled) + 1)
        if at_most == len(self.resampled):
            return 1.0
        moved = float(norm.ppf(share)) - self.bias
        return max(float(norm.cdf(moved / (1 + self.acceleration * moved) - self.bias)), 1 / (len(self.resampled) + 1))

    def mirrored(self) -> "Bootstrap":
        """The bootstrap of the negated values."""
        return Bootstrap(-self.estimate, -self.resampled[::-1], -self.acceleration, -self.bias)

    def _quantile(self, z: float) -> float:
        shifted = self.bias + z
        share = norm.cdf(self.bias + shifted / (1 - self.acceleration * shifted))
        return float(np.quantile(self.resampled, share))


def bootstrap_ratio(
    sums: Sequence[float] | Floats,
    weights: Sequence[float] | Floats | None = None,
    *,
    clusters: Sequence[Hashable] | None = None,
    bias_corrected: bool = True,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Bootstrap:
    """Bootstrap sum(sums) / sum(weights).

    Args:
        sums: one value an item, for a paired comparison the candidate's minus the reference's.
        weights: one positive value an item; 1 each if not given.
        clusters: a name an item; items of one name are drawn together.
        bias_corrected: BCa if true, percentile otherwise.
        num_resamples: how many times to resample.
        seed: of the generator; equal seeds give equal results.

    Raises:
        EvaluationError: fewer than two units, lengths that differ, values not finite or weights not positive.
    """
    d, w = require_units(sums, weights, clusters)
    estimate = float(d.sum() / w.sum())
    resampled = np.sort(_resample(d, w, num_resamples, np.random.default_rng(seed)))
    if not bias_corrected or resampled[0] == resampled[-1]:
        return Bootstrap(estimate, resampled)
    return Bootstrap(estimate, resampled, _acceleration(d, w), bias_correction(resampled, estimate))


def require_units(
    sums: Sequence[float] | Floats,
    weights: Sequence[float] | Floats | None,
    clusters: Sequence[Hashable] | None = None,
) -> tuple[Floats, Floats]:
    """The units to resample: checked values and weights, summed by cluster where clusters are given.

    Raises:
        EvaluationError: fewer than two units, lengths that differ, values not finite or weights not positive.
    """
    d = np.asarray(sums, dtype=np.float64)
    w = np.ones_like(d) if weights is None else np.asarray(weights, dtype=np.float64)
    if d.ndim != 1 or d.shape != w.shape or (clusters is not None and len(clusters) != len(d)):
        raise EvaluationError(f"sums {d.shape}, weights {w.shape} and clusters must be one value an item each")
    if not (np.isfinite(d).all() and np.isfinite(w).all() and (w > 0).all()):
        raise EvaluationError("every value must be finite and every weight positive; check the scores")
    if clusters is not None:
        index: dict[Hashable, int] = {}
        places = [index.setdefault(name, len(index)) for name in clusters]
        d, w = (np.bincount(places, weights=part).astype(np.float64) for part in (d, w))
    if len(d) < 2:
        raise EvaluationError(f"{len(d)} items or clusters; a bootstrap needs at least two")
    return d, w


def draw(
    num_units: int, num_resamples: int, rng: np.random.Generator, *, num_drawn: int | None = None
) -> Iterator[npt.NDArray[np.int64]]:
    """Units of all resamples, (resamples, ``num_drawn`` or all units), in pieces that bound the memory."""
    size = num_drawn or num_units
    step = max(1, _CHUNK_ELEMENTS // size)
    for start in range(0, num_resamples, step):
        yield rng.integers(0, num_units, (min(step, num_resamples - start), size))


def _resample(d: Floats, w: Floats, num_resamples: int, rng: np.random.Generator) -> Floats:
    pieces = draw(len(d), num_resamples, rng)
    return np.concatenate([d[drawn].sum(axis=1) / w[drawn].sum(axis=1) for drawn in pieces])


def _acceleration(d: Floats, w: Floats) -> float:
    """BCa's a from the jackknife: sum(u^3) / (6 sum(u^2)^1.5), u = mean of the leave-one-out estimates minus each."""
    left_out = (d.sum() - d) / (w.sum() - w)
    u = left_out.mean() - left_out
    scale = float((u**2).sum()) ** 1.5
    return float((u**3).sum()) / (6 * scale) if scale > 0 else 0.0


def bias_correction(resampled: Floats, estimate: float) -> float:
    """BCa's z0: the normal quantile of the share of resamples below the estimate, ties counted half."""
    below = (np.searchsorted(resampled, estimate, "left") + np.searchsorted(resampled, estimate, "right")) / 2
    # One resample on the other side is the least that this number of resamples can tell.
    share = min(max(below / len(resampled), 1 / (len(resampled) + 1)), 1 - 1 / (len(resampled) + 1))
    return float(norm.ppf(share))


# Studentized bootstrap (bootstrap-t) of a ratio of sums: what gates use for means.
#
# One-sided limits of skewed data err less often than BCa's (docs/gates.md), because every resample is measured in its
# own standard error. Source: Efron and Tibshirani 1993, chapter 12; Hall 1988, Ann. Statist. 16:927.
#
# A resample holds half as many units as the sample (m out of n, Bickel, Götze and van Zwet 1997, Statist. Sinica 7:1):
# a small sample of skewed data hides its longest tail, and t* of fewer units, more skewed, makes up for that. With all
# n units, a candidate on the bound passed 6 to 7 % of the time at alpha 0.05, with half of them 4 to 5 %.
#
#     r = sum(d) / sum(w)      se² = sum((d - r w)²) / sum(w)²      t* = (r* - r) / se*
#     limits: r - q(1 - alpha) se  and  r - q(alpha) se, q the quantiles of t*


@dataclass(frozen=True)
class Studentized:
    """An estimate, its ``standard_error`` and the sorted ``pivots`` t* of its resamples."""

    estimate: float
    standard_error: float
    pivots: Floats

    def lower_limit(self, alpha: float) -> float:
        """One-sided 1 - alpha lower limit."""
        return self.estimate - float(np.quantile(self.pivots, 1 - alpha)) * self.standard_error

    def upper_limit(self, alpha: float) -> float:
        """One-sided 1 - alpha upper limit."""
        return self.estimate - float(np.quantile(self.pivots, alpha)) * self.standard_error

    def p_value(self, bound: float) -> float:
        """One-sided p-value of H0 "the true value is at most ``bound``"; never below 1 / (resamples + 1)."""
        if self.standard_error == 0:
            return 1 / (len(self.pivots) + 1) if self.estimate > bound else 1.0
        pivot = (self.estimate - bound) / self.standard_error
        at_least = len(self.pivots) - int(np.searchsorted(self.pivots, pivot, side="left"))
        return (at_least + 1) / (len(self.pivots) + 1)

    def mirrored(self) -> "Studentized":
        """The same for the negated values."""
        return Studentized(-self.estimate, self.standard_error, -self.pivots[::-1])


def studentized_ratio(
    sums: Sequence[float] | Floats,
    weights: Sequence[float] | Floats,
    *,
    clusters: Sequence[Hashable] | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Studentized:
    """Bootstrap sum(sums) / sum(weights), one value of each an item; items of one cluster are drawn together.

    Raises:
        EvaluationError: fewer than two items or clusters, lengths that differ, values not finite, or weights not
            positive.
    """
    d, w = require_units(sums, weights, clusters)
    moments = np.stack([d, w, d * d, d * w, w * w])
    estimate, error = _ratio(moments.sum(axis=1, keepdims=True))
    pivots = []
    for drawn in draw(len(d), num_resamples, np.random.default_rng(seed), num_drawn=max(2, len(d) // 2)):
        resampled, errors = _ratio(np.stack([moment[drawn].sum(axis=1) for moment in moments]))
        # A resample of one item again and again has no error of its own: it says nothing about the pivot.
        pivots.append((resampled - estimate) / np.where(errors > 0, errors, np.inf))
    return Studentized(float(estimate[0]), float(error[0]), np.sort(np.concatenate(pivots)))


def _ratio(moments: Floats) -> tuple[Floats, Floats]:
    """The ratio and its linearized standard error from the sums of d, w, d², d w and w²."""
    d, w, dd, dw, ww = moments
    ratio = d / w
    squares = dd - 2 * ratio * dw + ratio * ratio * ww
    # Below this share of its parts the sum of squares is rounding.
    return ratio, np.where(squares > 1e-12 * dd, np.sqrt(np.maximum(squares, 0)), 0.0) / w


# How much a number changes with the seed: means over repeated trainings with Student's t intervals.
#
# mean ± t_{1-alpha/2, n-1} · s / sqrt(n), s with n - 1 in its denominator (Student 1908). Two variants that were
# trained with the same seeds saw the same rows in the same order: their difference is taken seed by seed, which removes
# what the seeds have in common.


@dataclass(frozen=True)
class SeedEstimate:
    """A mean over ``num_seeds`` trainings; without a second training there is no interval."""

    mean: float
    low: float | None
    high: float | None
    num_seeds: int


EVERY_NUMBER = (-math.inf, math.inf)


def mean_over_seeds(
    values: Sequence[float], *, alpha: float = 0.05, bounds: tuple[float, float] = EVERY_NUMBER
) -> SeedEstimate:
    """Mean of one number over seeds and its two-sided 1 - alpha interval.

    The interval ends at ``bounds``, between which the number lies by its definition: 0 and 1 for an accuracy. What is
    cut off holds no possible mean, so the interval covers the mean as often as before.

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
    return SeedEstimate(mean, max(mean - half, bounds[0]), min(mean + half, bounds[1]), count)


def difference_over_seeds(
    values: Mapping[int, float],
    reference: Mapping[int, float],
    *,
    alpha: float = 0.05,
    bounds: tuple[float, float] = EVERY_NUMBER,
) -> SeedEstimate | None:
    """Mean of ``values`` minus ``reference`` over the seeds that both have; None if they share none.

    ``bounds`` are those of the two numbers; their difference lies within the distance between them.
    """
    shared = sorted(values.keys() & reference.keys())
    if not shared:
        return None
    width = bounds[1] - bounds[0]
    return mean_over_seeds([values[seed] - reference[seed] for seed in shared], alpha=alpha, bounds=(-width, width))
