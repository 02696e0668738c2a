"""A hundred nights of gates: how does true quality change, and what do the rows that decided show of it?

Every night a candidate is made from what production holds and judged by a gate with a margin of 0.02, one-sided alpha
0.05 (`graftline.evaluate.statistics`, the gates' own tests). Each regime says which rows judge:

same       the same rows every night
reserve    the same rows; candidates that pass are judged again on a second set, also the same every night
fresh      new rows every night, never used for training or judging before

and whether there is an anchor (`graftline.evaluate.anchor`): a pinned release that a candidate must also be as good as,
and that moves only to a candidate shown to be better.

accuracy     right or wrong: 3 % of the items change either way, 0.870 at the start; Tango's score and the exact tests
continuous   a mean weighted by tokens: noise of the same variance, correlated 0.7 from model to model, 0 at the start;
             the studentized bootstrap, with 200 resamples instead of 10,000

The truth is the expected value of the model in production, which the simulation knows. The tables are those of
docs/promotion.md.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any, Literal

import numpy as np

from graftline.evaluate.anchor import MOVE_ALPHA
from graftline.evaluate.statistics.intervals import studentized_ratio
from graftline.evaluate.statistics.proportions import PairedCounts, difference_p_value
from studies.harness import Json, Setting

MARGIN, ALPHA = 0.02, 0.05
START = 0.87
CHURN = 0.03
"""Share of items that a retraining gains, and as many that it loses."""
DEVIATION, CORRELATION = 0.316, 0.7
"""Of one item's noise, and from one model to the next: a difference then has the variance of 3 % churn, 0.06."""
RESAMPLES = 200
SLOPE, SPREAD = -0.003, 0.006
MOST_LOSS, MOST_BIAS, MOST_COST = 1.25 * MARGIN, 0.01, 0.01

Rows = Literal["same", "reserve", "fresh"]
Candidates = Literal["equal", "worse", "mixed"]
CANDIDATES: dict[Candidates, tuple[float, float]] = {"equal": (0.0, 0.0), "worse": (SLOPE, 0.0), "mixed": (0.0, SPREAD)}
"""Mean and standard deviation of a candidate's true change against production."""
IN_WORDS = {"equal": "equal", "worse": "each 0.3 points worse", "mixed": "mixed, sd 0.6 points"}
Array = np.ndarray
Generator = np.random.Generator


@dataclass(frozen=True)
class Regime:
    """Which rows judge, how many, and whether there is an anchor."""

    candidates: Candidates
    items: int
    rows: Rows
    anchor: bool


@dataclass(frozen=True)
class Metric:
    """How one metric is simulated: ``draw`` the first model's values, ``retrain`` to the next, ``p_value`` of a pair.

    ``retrain`` takes values, the true level and its change. ``p_value(candidate, reference, weights, bound)`` is that
    of "the candidate is not better than the reference by more than the bound".
    """

    start: float
    draw: Callable[[Generator, int], Array]
    retrain: Callable[[Generator, Array, float, float], Array]
    p_value: Callable[[Array, Array, Array, float], float]


def _draw_right(rng: Generator, count: int) -> Array:
    return rng.random(count) < START


def _retrain_right(rng: Generator, right: Array, level: float, change: float) -> Array:
    lost, gained = CHURN / level, (CHURN + change) / max(1 - level, 1e-9)
    if gained < 0 or gained > 1:  # what cannot be gained is not lost either, so that the level changes as it should
        gained = min(max(gained, 0.0), 1.0)
        lost = (gained * (1 - level) - change) / level
    draw = rng.random(len(right))
    return np.where(right, draw >= lost, draw < gained)


def _p_of_right(ours: Array, theirs: Array, _weights: Array, bound: float) -> float:
    both, gained, lost = (int(np.count_nonzero(kind)) for kind in (ours & theirs, ours & ~theirs, ~ours & theirs))
    return difference_p_value(PairedCounts(both, gained, lost, len(ours) - both - gained - lost), bound)[0]


def _draw_values(rng: Generator, count: int) -> Array:
    return rng.normal(0, DEVIATION, count)


def _retrain_values(rng: Generator, values: Array, level: float, change: float) -> Array:
    fresh = rng.normal(0, DEVIATION * np.sqrt(1 - CORRELATION**2), len(values))
    return level + change + CORRELATION * (values - level) + fresh


def _p_of_values(ours: Array, theirs: Array, weights: Array, bound: float) -> float:
    return studentized_ratio((ours - theirs) * weights, weights, num_resamples=RESAMPLES).p_value(bound)


METRICS = {
    "accuracy": Metric(START, _draw_right, _retrain_right, _p_of_right),
    "continuous": Metric(0.0, _draw_values, _retrain_values, _p_of_values),
}


@dataclass(frozen=True)
class Ending:
    """One run after all nights."""

    promoted: int
    better: int
    """Candidates that were truly better."""
    better_promoted: int
    true: float
    shown: float
    """The figure of the model in production on the rows that judge on the last night."""
    on_card: float
    """The figure of that model on the day of its promotion, on the rows that let it in."""


def run(metric: Metric, regime: Regime, nights: int, seed: tuple[int, ...]) -> Ending:
    """All nights of one channel; of one seed, the candidates of every regime change by the same amounts."""
    mean, spread = CANDIDATES[regime.candidates]
    changes = np.random.default_rng([*seed, 0]).normal(mean, spread, nights)
    rng = np.random.default_rng([*seed, 1])
    is_fresh, items = regime.rows == "fresh", regime.items
    production = metric.draw(rng, items * (nights if is_fresh else 2))
    weights = np.ones(len(production)) if production.dtype == bool else rng.integers(5, 40, len(production)) / 20.0
    anchor, level, first = production, metric.start, slice(0, items)
    shown, on_card, promoted, better, better_promoted = level, level, 0, 0, 0
    last = slice(items, 2 * items) if regime.rows == "reserve" else first

    def passes(candidate: Array, reference: Array, rows: slice, bound: float, alpha: float) -> bool:
        return metric.p_value(candidate[rows], reference[rows], weights[rows], bound) <= alpha

    for drawn in changes.tolist():
        change = min(drawn, 1 - level) if production.dtype == bool else drawn
        candidate = metric.retrain(rng, production, level, change)
        good = passes(candidate, production, first, -MARGIN, ALPHA)
        good = good and (last == first or passes(candidate, production, last, -MARGIN, ALPHA))
        good = good and (not regime.anchor or passes(candidate, anchor, last, -MARGIN, ALPHA))
        better, better_promoted = better + (change > 0), better_promoted + (change > 0 and good)
        if good:
            moves = regime.anchor and passes(candidate, anchor, last, 0.0, MOVE_ALPHA)
            production, level, promoted = candidate, level + change, promoted + 1
            anchor = candidate if moves else anchor
            on_card = float(np.average(candidate[last], weights=weights[last]))
        shown = float(np.average(production[last], weights=weights[last]))
        if is_fresh:  # rows of earlier nights are no longer used to judge
            production, anchor, weights = production[items:], anchor[items:], weights[items:]
    return Ending(promoted, better, better_promoted, level, shown, on_card)


def cell(regime: Regime, *, metric: str, seed: int, runs: int, nights: int) -> Json:
    """One regime: means over runs, and the standard error of the loss and of the bias over runs."""
    kind = METRICS[metric]
    place = (seed, list(METRICS).index(metric), list(CANDIDATES).index(regime.candidates))
    ends = [run(kind, regime, nights, (*place, number)) for number in range(runs)]
    true, shown, on_card = (np.array([getattr(end, name) for end in ends]) for name in ("true", "shown", "on_card"))
    better = sum(end.better for end in ends)
    return asdict(regime) | {
        "promoted": round(float(np.mean([end.promoted for end in ends])), 1),
        "of_better": round(sum(end.better_promoted for end in ends) / better, 3) if better else None,
        "true": round(float(true.mean()), 4),
        "worst": round(float(true.min()), 4),
        "shown": round(float(shown.mean()), 4),
        "loss": round(float(kind.start - true.mean()), 4),
        "loss_error": round(_error(true), 4),
        "bias": round(float((shown - true).mean()), 4),
        "bias_error": round(_error(shown - true), 4),
        "bias_on_card": round(float((on_card - true).mean()), 4),
    }


def _error(values: Array) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def regimes(sizes: tuple[int, ...]) -> Iterator[Regime]:
    """Every regime of these numbers of rows."""
    kinds: tuple[Rows, ...] = ("same", "reserve", "fresh")
    for candidates in CANDIDATES:
        for items in sizes:
            for rows in kinds:
                for anchor in (False, True):
                    yield Regime(candidates, items, rows, anchor)


def table(setting: Setting, metric: str, sizes: tuple[int, ...], runs: int) -> Json:
    """Every cell of one metric, and whether the targets are met."""
    made = partial(cell, metric=metric, seed=setting.seed, runs=setting.turns(runs), nights=setting.size(100, 10))
    chosen = list(regimes(setting.size(sizes, sizes[:1])))
    if setting.threads > 1:
        with ProcessPoolExecutor(setting.threads, mp_context=get_context("spawn")) as pool:
            cells = list(pool.map(made, chosen))
    else:
        cells = [made(regime) for regime in chosen]
    found: Json = {"margin": MARGIN, "runs": setting.turns(runs), "cells": cells}
    return found | {"targets": targets(cells), "markdown": markdown(cells)}


def targets(cells: list[Json]) -> list[Json]:
    """The targets for fresh rows with an anchor, at the largest number of rows: name, result and bound."""
    items = max(cell["items"] for cell in cells)

    def at(candidates: Candidates, anchor: bool) -> Json:
        wanted = {"candidates": candidates, "items": items, "rows": "fresh", "anchor": anchor}
        return next(cell for cell in cells if {name: cell[name] for name in wanted} == wanted)

    worse, mixed, free = at("worse", True), at("mixed", True), at("mixed", False)
    biases = {name: at(name, True)["bias"] for name in CANDIDATES}
    checks = [
        ("loss after steadily worse candidates", worse["loss"], MOST_LOSS, worse["loss"] <= MOST_LOSS),
        *(
            (f"shown minus true, {name} candidates", bias, MOST_BIAS, abs(bias) <= MOST_BIAS)
            for name, bias in biases.items()
        ),
        (
            "cost of the anchor with mixed candidates",
            round(free["true"] - mixed["true"], 4),
            MOST_COST,
            free["true"] - mixed["true"] <= MOST_COST,
        ),
    ]
    return [{"target": name, "found": found, "bound": bound, "met": met} for name, found, bound, met in checks]


def markdown(cells: list[Json]) -> list[str]:
    """A line a regime: true value at the end / shown / share of the truly better candidates that were promoted."""
    head = ["items, rows, anchor", *(IN_WORDS[name] for name in CANDIDATES)]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---|" * len(CANDIDATES)]
    by_regime: dict[tuple[Any, ...], list[Json]] = {}
    for found in cells:
        by_regime.setdefault((found["items"], found["rows"], found["anchor"]), []).append(found)
    for (items, rows, anchor), row in by_regime.items():
        shares = ["" if found["of_better"] is None else f" / {found['of_better']:.2f}" for found in row]
        values = [
            f"{found['true']:.3f} / {found['shown']:.3f}{share}" for found, share in zip(row, shares, strict=True)
        ]
        lines.append(f"| {items:,}, {rows}, {'yes' if anchor else 'no'} | {' | '.join(values)} |")
    return lines


def accuracy(setting: Setting) -> Json:
    """Right or wrong items."""
    return table(setting, "accuracy", (300, 1000), runs=40)


def continuous(setting: Setting) -> Json:
    """A mean weighted by tokens."""
    return table(setting, "continuous", (1000,), runs=8)


PARTS = {"accuracy": accuracy, "continuous": continuous}
