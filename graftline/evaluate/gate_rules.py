"""What a gate asks, and which numbers of an evaluation it is about."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from graftline.errors import EvaluationError
from graftline.evaluate.scores import ItemScore, Scores, Section

Direction = Literal["higher", "lower"]
Test = Literal["non-inferiority", "superiority", "equivalence", "limit"]
Kind = Literal["rate", "mean"]


@dataclass(frozen=True)
class GateRule:
    """One condition on a candidate. Differences are in the metric's unit.

    ``test``: ``non-inferiority``: not worse than ``against`` by ``margin`` or more; ``superiority``: better by more
    than ``margin``; ``equivalence``: within ``margin`` on both sides; ``limit``: on the good side of ``limit``, without
    a reference. ``alpha`` is the one-sided error, over all gates together (Holm). With fewer than ``min_items`` items
    the gate is inconclusive.

    Raises:
        EvaluationError: an unknown test or direction, a negative margin, an alpha outside of (0, 0.5), no ``against``
            or no ``limit`` where needed.
    """

    metric: str
    direction: Direction
    test: Test
    margin: float = 0.0
    alpha: float = 0.05
    min_items: int = 100
    against: str | None = None
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.test not in get_args(Test) or self.direction not in get_args(Direction) or self.min_items < 1:
            raise EvaluationError(
                f"the gate on {self.metric} has test {self.test!r}, direction {self.direction!r} and min_items "
                f"{self.min_items}; expected one of {', '.join(get_args(Test))}, one of "
                f"{', '.join(get_args(Direction))} and at least 1"
            )
        if not (math.isfinite(self.margin) and self.margin >= 0 and 0 < self.alpha < 0.5):
            raise EvaluationError(
                f"the gate on {self.metric} has margin {self.margin} and alpha {self.alpha}; "
                "expected a margin of at least 0 and an alpha between 0 and 0.5"
            )
        if self.test == "equivalence" and self.margin == 0:
            raise EvaluationError(f"the gate on {self.metric} asks for equivalence within 0; give a margin above 0")
        if self.test == "limit" and (self.limit is None or not math.isfinite(self.limit)):
            raise EvaluationError(f"the gate on {self.metric} has limit {self.limit}; a limit gate needs a number")
        if self.test != "limit" and not self.against:
            raise EvaluationError(
                f"the gate on {self.metric} compares with nothing; set against: base, production or a version"
            )

    @property
    def sign(self) -> int:
        """1 where higher is better, -1 where lower is."""
        return 1 if self.direction == "higher" else -1


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
