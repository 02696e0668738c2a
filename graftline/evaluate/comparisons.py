"""Statistics of one gate: estimate, interval, and p-values for and against its condition.

Everything is computed on goodness: the difference, signed by the gate's direction so that higher is better. The
condition is "goodness above bound": bound = -margin for non-inferiority, +margin for superiority, and both sides for
equivalence (two one-sided tests).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
from scipy.stats import binomtest

from graftline.evaluate.gate_rules import Kind, MetricSample
from graftline.evaluate.statistics.error_rates import (
    DEFAULT_POWER,
    Power,
    enough,
    equal_candidate_power,
    equal_discordant_share,
    equal_mean_power,
    equivalence_p_value,
    paired_deviation,
)
from graftline.evaluate.statistics.intervals import Studentized, studentized_ratio
from graftline.evaluate.statistics.proportions import (
    EXACT_BELOW_DISCORDANT,
    PairedCounts,
    count_pairs,
    difference_p_value,
    few_units_p_value,
    mcnemar,
    rate_p_value,
    tango_interval,
)
from graftline.settings.gate_metrics import METRICS
from graftline.settings.model import Gate


@dataclass(frozen=True)
class Comparison:
    """The evidence of the items on one condition.

    ``candidate`` and ``reference`` are the metric's values; ``difference`` and ``interval`` (two-sided, 1 - 2 alpha)
    are candidate minus reference, or the candidate's value itself for a limit. ``p_holds`` is the p-value of the null
    hypothesis "the condition does not hold", ``p_broken`` that of "it holds". ``distance`` is goodness above the bound
    (negative below it), ``deviation`` the standard deviation of one item's contribution to it. ``p_no_change``:
    two-sided, of "no difference". ``equal_discordant_share``: for paired rates, the share of items on which an equally
    good candidate would differ. ``num_clusters`` and ``design_effect`` (variance relative to that of independent items)
    are set for clustered items; ``deviation`` then includes the effect of clustering. ``projected``: for rates,
    ``p_holds`` and ``p_broken`` of another number of items in the same proportions.
    """

    num_items: int
    candidate: float
    reference: float | None
    difference: float
    interval: tuple[float, float]
    p_holds: float
    p_broken: float
    distance: float
    deviation: float
    method: str
    p_no_change: float | None = None
    equal_discordant_share: float | None = None
    projected: Callable[[int], tuple[float, float]] | None = None
    num_clusters: int | None = None
    design_effect: float | None = None


def compare(rule: Gate, candidate: MetricSample, reference: MetricSample) -> Comparison:
    """Compare two models on the same items, paired by id."""
    if candidate.kind == reference.kind == "rate" and candidate.clusters is None:
        return _compare_rates(rule, candidate, reference)
    return _compare_means(rule, candidate, reference)


def check_limit(rule: Gate, candidate: MetricSample) -> Comparison:
    """Compare a candidate's metric with the rule's limit."""
    limit = rule.limit if rule.limit is not None else 0.0
    if candidate.kind == "rate" and candidate.clusters is None:
        return _rate_limit(rule, candidate, limit)
    return _mean_limit(rule, candidate, limit)


def _bound(rule: Gate) -> float:
    return rule.margin if rule.test == "superiority" else -rule.margin


def _compare_rates(rule: Gate, candidate: MetricSample, reference: MetricSample) -> Comparison:
    ours, theirs = [value > 0 for value in candidate.values], [value > 0 for value in reference.values]
    counts = count_pairs(ours, theirs)
    good = counts if rule.sign > 0 else _mirror(counts)
    p_holds, p_broken = _p_values_of_counts(rule, good)
    _, method = difference_p_value(good, _bound(rule))
    return Comparison(
        num_items=counts.total,
        candidate=candidate.mean,
        reference=reference.mean,
        difference=counts.difference,
        interval=tango_interval(counts, alpha=2 * rule.alpha),
        p_holds=p_holds,
        p_broken=p_broken,
        distance=_distance(rule, good.difference, _bound(rule)),
        deviation=paired_deviation(counts.discordant / counts.total, counts.difference),
        method=method,
        p_no_change=mcnemar(counts),
        equal_discordant_share=equal_discordant_share(counts),
        projected=lambda num_items: _p_values_of_counts(rule, _scaled(good, num_items)),
    )


def _p_values_of_counts(rule: Gate, good: PairedCounts) -> tuple[float, float]:
    """`_p_values` of paired counts; in ``good``, more gained is better."""
    bad = _mirror(good)
    return _p_values(
        rule, _bound(rule), lambda x: difference_p_value(good, x)[0], lambda x: difference_p_value(bad, -x)[0]
    )


PValue = Callable[[float], float]


def _p_values(rule: Gate, bound: float, not_above: PValue, not_below: PValue) -> tuple[float, float]:
    """P-values of the null hypotheses "the condition does not hold" and "it holds".

    Args:
        rule: the gate.
        bound: the value that goodness must exceed, unless the test is equivalence.
        not_above: p-value of "goodness is at most x", as a function of x.
        not_below: p-value of "goodness is at least x", as a function of x.
    """
    if rule.test != "equivalence":
        return not_above(bound), not_below(bound)
    low, high = -rule.margin, rule.margin
    p_outside = equivalence_p_value(not_above(low), not_below(high))
    return p_outside, min(1.0, 2 * min(not_below(low), not_above(high)))


def _distance(rule: Gate, goodness: float, bound: float) -> float:
    """How far inside the condition's bounds the estimate lies."""
    return rule.margin - abs(goodness) if rule.test == "equivalence" else goodness - bound


def _scaled(counts: PairedCounts, num_items: int) -> PairedCounts:
    share = num_items / counts.total
    gained, lost, neither = (round(count * share) for count in (counts.gained, counts.lost, counts.neither))
    return PairedCounts(max(0, num_items - gained - lost - neither), gained, lost, neither)


def _mirror(counts: PairedCounts) -> PairedCounts:
    return PairedCounts(counts.both, counts.lost, counts.gained, counts.neither)


def _compare_means(rule: Gate, candidate: MetricSample, reference: MetricSample) -> Comparison:
    differences = np.subtract(candidate.values, reference.values)
    found = studentized_ratio(differences, candidate.weights, clusters=candidate.clusters)
    base = _from_bootstrap(rule, found, candidate, reference, deviation=_ratio_deviation(differences, candidate))
    if not _is_share(rule):
        return base
    units = _unit_means(rule.sign * differences, candidate)
    return _with_few_units(rule, base, units, bound=_bound(rule), usual=(0.0, 0.0))


def _mean_limit(rule: Gate, candidate: MetricSample, limit: float) -> Comparison:
    above = np.subtract(candidate.values, np.multiply(limit, candidate.weights))
    found = studentized_ratio(above, candidate.weights, clusters=candidate.clusters)
    base = _from_bootstrap(rule, found, candidate, None, deviation=_ratio_deviation(above, candidate))
    low, high = base.interval
    base = replace(base, difference=candidate.mean, interval=(low + limit, high + limit))
    if not _is_share(rule):
        return base
    worst, best = (0.0, 1.0) if rule.sign > 0 else (-1.0, 0.0)
    units = _unit_means(rule.sign * np.asarray(candidate.values), candidate)
    return _with_few_units(rule, base, units, bound=rule.sign * limit, usual=(best, worst))


def _is_share(rule: Gate) -> bool:
    """Whether every item's value lies between 0 and 1."""
    return rule.metric in METRICS and METRICS[rule.metric].most == 1.0


def _unit_means(goodness: np.ndarray, candidate: MetricSample) -> np.ndarray:
    """Mean goodness of each cluster, or of each item where there are none, (num_units,)."""
    _, place = np.unique(candidate.clusters or candidate.ids, return_inverse=True)
    means: np.ndarray = np.bincount(place, weights=goodness) / np.bincount(place)
    return means


def _with_few_units(
    rule: Gate, found: Comparison, units: np.ndarray, *, bound: float, usual: tuple[float, float]
) -> Comparison:
    """A bootstrap's p-values, but never below those of `few_units_p_value` where hardly any unit differs.

    ``usual``: the value that such units have where the condition holds, and where it is broken.
    """

    def p_values(num_items: int) -> tuple[float, float]:
        share = num_items / found.num_items

        def not_above(x: float) -> float:
            return _p_of_few(units - usual[0], x - usual[0], share)

        def not_below(x: float) -> float:
            return _p_of_few(usual[1] - units, usual[1] - x, share)

        return _p_values(rule, bound, not_above, not_below)

    holds, broken = p_values(found.num_items)
    return replace(found, p_holds=max(found.p_holds, holds), p_broken=max(found.p_broken, broken), projected=p_values)


def _p_of_few(above_usual: np.ndarray, bound: float, share: float) -> float:
    """P-value of "the mean is at most ``bound``", for ``share`` times as many units; 0 where enough of them differ."""
    counts = (int((above_usual < 0).sum()), int((above_usual > 0).sum()), len(above_usual))
    below, above, total = (round(count * share) for count in counts)
    if below + above >= EXACT_BELOW_DISCORDANT:
        return 0.0
    return few_units_p_value(total, below=below, above=above, fall=-bound)


def _from_bootstrap(
    rule: Gate, found: Studentized, candidate: MetricSample, reference: MetricSample | None, *, deviation: float
) -> Comparison:
    bound = 0.0 if reference is None else _bound(rule)
    good, bad = (found, found.mirrored()) if rule.sign > 0 else (found.mirrored(), found)
    p_holds, p_broken = _p_values(rule, bound, good.p_value, lambda x: bad.p_value(-x))
    # Clustered items carry less information: the deviation grows by the square root of the design effect.
    effect = _design_effect(found, deviation, candidate)
    return Comparison(
        num_items=len(candidate.ids),
        candidate=candidate.mean,
        reference=None if reference is None else reference.mean,
        difference=found.estimate,
        interval=(found.lower_limit(rule.alpha), found.upper_limit(rule.alpha)),
        p_holds=p_holds,
        p_broken=p_broken,
        distance=_distance(rule, good.estimate, bound),
        deviation=deviation if effect is None else deviation * math.sqrt(effect),
        method="bootstrap-t" if effect is None else "bootstrap-t by cluster",
        num_clusters=None if candidate.clusters is None else len(set(candidate.clusters)),
        design_effect=effect,
        p_no_change=None if reference is None else min(1.0, 2 * min(found.p_value(0.0), found.mirrored().p_value(0.0))),
    )


def _design_effect(found: Studentized, deviation: float, candidate: MetricSample) -> float | None:
    """Variance of the estimate relative to that of as many independent items (Kish 1965); 1 if nothing varies."""
    if candidate.clusters is None:
        return None
    num_clusters = len(set(candidate.clusters))
    by_cluster = found.standard_error**2 * num_clusters / (num_clusters - 1)
    by_item = deviation**2 / len(candidate.ids)
    return by_cluster / by_item if by_item > 0 else 1.0


def _ratio_deviation(differences: np.ndarray, candidate: MetricSample) -> float:
    """Standard deviation of an item's contribution to the ratio of sums: (d_i - r w_i) / mean(w), by linearization."""
    weights = np.asarray(candidate.weights)
    residuals = differences - differences.sum() / weights.sum() * weights
    return float(np.std(residuals, ddof=1) / weights.mean())


def _rate_limit(rule: Gate, candidate: MetricSample, limit: float) -> Comparison:
    total, hits = len(candidate.ids), int(sum(candidate.values))

    def p_values(num_items: int) -> tuple[float, float]:
        found = round(hits * num_items / total)
        above = rate_p_value(found, num_items, limit)
        below = rate_p_value(num_items - found, num_items, 1 - limit)
        return (above, below) if rule.sign > 0 else (below, above)

    p_holds, p_broken = p_values(total)
    interval = binomtest(hits, total).proportion_ci(confidence_level=1 - 2 * rule.alpha, method="exact")
    rate = candidate.mean
    return Comparison(
        num_items=total,
        candidate=rate,
        reference=None,
        difference=rate,
        interval=(float(interval.low), float(interval.high)),
        p_holds=p_holds,
        p_broken=p_broken,
        distance=rule.sign * (rate - limit),
        deviation=(rate * (1 - rate)) ** 0.5,
        method="exact binomial",
        projected=p_values,
    )


# Power: how often a gate passes a candidate as good as its reference, and the warning if that is rare.

POWER_TESTS = ("non-inferiority", "equivalence")
"""Tests that an equally good candidate should pass; `superiority` demands more."""


@lru_cache(maxsize=4096)
def gate_power(kind: Kind, test: str, margin: float, num_items: int, *, spread: float, alpha: float) -> Power:
    """The power of a gate with one of `POWER_TESTS`.

    Args:
        kind: whether the metric is a rate or a mean.
        test: the gate's test.
        margin: the gate's margin, in the metric's unit.
        num_items: items that both models are scored on.
        spread: for a rate, the share of items on which two equally good models differ; for a mean, the standard
            deviation of one item's difference.
        alpha: the gate's alpha.
    """
    two_sided = test == "equivalence"
    if kind == "rate":
        rate = partial(equal_candidate_power, discordant_share=spread, alpha=alpha, two_sided=two_sided)
        return enough(rate, margin, num_items)
    mean = partial(equal_mean_power, deviation=spread, alpha=alpha, two_sided=two_sided)
    return enough(mean, margin, num_items)


def weakness(power: Power, margin: float, num_items: int) -> str | None:
    """A warning if power is below 0.8, with the margin or number of items that would reach it; None otherwise."""
    if power.value >= DEFAULT_POWER:
        return None
    cures = []
    if power.margin is not None:
        cures.append(f"a margin of {power.margin:g} with {num_items} items")
    if power.num_items is not None:
        cures.append(f"about {power.num_items:,} items with the margin of {margin:g}")
    would = f"; {' or '.join(cures)} would make it 8 of 10" if cures else ""
    return f"a candidate that is exactly as good passes this gate {power.value:.0%} of the time{would}"
