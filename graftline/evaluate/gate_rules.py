"""Which numbers of an evaluation a gate is about."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from graftline.errors import EvaluationError
from graftline.evaluate.scores import ItemScore, Scores, Section

Kind = Literal["rate", "mean"]


@dataclass(frozen=True)
class Sample:
    """A metric by item, in the order of sorted ids: the metric is sum(values) / sum(weights).

    ``kind`` ``rate`` means that every value is 0 or 1 and every weight 1.
    """

    ids: tuple[str, ...]
    values: tuple[float, ...]
    weights: tuple[float, ...]
    kind: Kind

    @property
    def mean(self) -> float:
        """The metric over all items."""
        return sum(self.values) / sum(self.weights)


@dataclass(frozen=True)
class _Metric:
    section: Section
    kind: Kind
    value: Callable[[Any], float | None]
    weight: Callable[[Any], float] = lambda row: 1.0


def _is_right(row: ItemScore) -> float | None:
    """None where the row's own answer is its only option: there was nothing to choose."""
    return float(row.correct) if len(row.log_likelihoods) > 1 else None


METRICS: dict[str, _Metric] = {
    "accuracy": _Metric("items", "rate", _is_right),
    "nll": _Metric("items", "mean", lambda row: row.nll, lambda row: row.num_tokens),
    "option_stop_rate": _Metric("items", "rate", lambda row: None if row.stop is None else float(row.stop)),
    "general_accuracy": _Metric("general", "rate", _is_right),
    "forgetting_nll": _Metric("documents", "mean", lambda row: row.nll, lambda row: row.num_tokens),
    "exact_match": _Metric("answers", "rate", lambda row: float(row.exact_match)),
    "f1": _Metric("answers", "mean", lambda row: row.f1),
    "rouge_l": _Metric("answers", "mean", lambda row: row.rouge_l),
    "stop_rate": _Metric("answers", "rate", lambda row: float(row.stop)),
}
"""Metrics with a value an item. Any other name is looked up in `Scores.numbers`."""


def sample(scores: Scores, metric: str) -> Sample:
    """The metric's values by item.

    Raises:
        EvaluationError: the evaluation holds nothing for it.
    """
    spec = METRICS[metric]
    rows: Sequence[Any] = sorted(getattr(scores, spec.section), key=lambda row: row.item_id)
    values = [spec.value(row) for row in rows]
    missing = [row.item_id for row, value in zip(rows, values, strict=True) if value is None]
    if not rows or missing:
        what = (
            f"{len(missing)} of {len(rows)} {spec.section} have none, such as {missing[0]}" if missing else "no items"
        )
        raise EvaluationError(f"{metric} was not measured ({spec.section}: {what}); evaluate it, or drop the gate")
    return Sample(
        tuple(row.item_id for row in rows),
        tuple(value for value in values if value is not None),
        tuple(float(spec.weight(row)) for row in rows),
        spec.kind,
    )


def number(scores: Scores, metric: str, *, of: str) -> float:
    """A measured number; ``of`` says whose, for the error.

    Raises:
        EvaluationError: it was not measured, or is not finite.
    """
    if metric not in scores.numbers:
        raise EvaluationError(
            f"{metric} was not measured for the {of}; known there: "
            f"{', '.join(sorted([*METRICS, *scores.numbers]))}: evaluate it, or drop the gate"
        )
    value = scores.numbers[metric]
    if not math.isfinite(value):
        raise EvaluationError(f"{metric} of the {of} is {value}; a gate needs a finite number")
    return value
