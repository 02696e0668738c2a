"""The conditions of gates and guards, and the numbers of an evaluation that they test."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from graftline.errors import EvaluationError
from graftline.evaluate.scores import ItemScore, Scores, Section
from graftline.settings.model import Direction, Gate, Pipeline

Kind = Literal["rate", "mean"]


@dataclass(frozen=True)
class MetricSample:
    """A metric's values per item, sorted by id: the metric is sum(values) / sum(weights).

    ``kind`` ``rate`` means that every value is 0 or 1 and every weight 1.
    """

    ids: tuple[str, ...]
    values: tuple[float, ...]
    weights: tuple[float, ...]
    kind: Kind
    clusters: tuple[str, ...] | None = None
    """Cluster of each item (items drawn together); None: all items are independent."""

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
    """None if the row's own answer is the only option: there was nothing to choose."""
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
"""Metrics with a value per item. Any other name is looked up in `Scores.numbers`."""


def sample(scores: Scores, metric: str) -> MetricSample:
    """The metric's values per item.

    Raises:
        EvaluationError: the evaluation did not measure it.
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
    return MetricSample(
        tuple(row.item_id for row in rows),
        tuple(value for value in values if value is not None),
        tuple(float(spec.weight(row)) for row in rows),
        spec.kind,
    )


def in_clusters(found: MetricSample, clusters: Mapping[str, str]) -> MetricSample:
    """The sample with its items' clusters; unchanged if there are none, or if no two items share one.

    Raises:
        EvaluationError: an item has no cluster, though others have.
    """
    if not clusters:
        return found
    if missing := [one for one in found.ids if one not in clusters]:
        raise EvaluationError(
            f"{len(missing)} of {len(found.ids)} items have no cluster, such as {missing[0]}; run the fetch stage again"
        )
    names = tuple(clusters[one] for one in found.ids)
    return found if len(set(names)) == len(names) else replace(found, clusters=names)


def number(scores: Scores, metric: str, *, of: str) -> float:
    """A measured number; ``of`` names the model in errors.

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


# Guards: conditions of every pipeline besides its own gates, unless switched off by name.
#
# The observed value decides a guard (`graftline.evaluate.gates`), not a test. Limits are wide: a candidate that breaks
# one is broken, and a sound candidate must not stay inconclusive because rows are few. Guards are excluded from the
# correction of the gates' p-values and so cost them no power.

MIN_STOP_RATE = 0.9
"""Minimum share of answers that end."""
MAX_STOP_RATE_LOSS = 0.05
"""Maximum loss of that share against production's."""
MAX_NLL_RISE = 1.0
"""Maximum NLL of the rows' own answers above production's, in nats per token."""
MAX_FORGETTING = 1.0
"""Maximum NLL of general text above the base's, in nats per token. The demo's adapter reaches 0.7."""


class GuardRule(Gate):
    """A condition of the guard ``guard``, a key of `graftline.settings.model.Guards`."""

    guard: str


def pipeline_rules(pipeline: Pipeline) -> dict[str, Gate]:
    """All conditions of a pipeline on a candidate, by name: its gates, then its guards.

    Guards are `GuardRule`; their names start with ``guard: ``, which a gate's name cannot. A gate on the same metric
    does not replace a guard: both apply.
    """
    return pipeline.gates | {name: rule for name, rule in _guards(pipeline) if getattr(pipeline.guards, rule.guard)}


def _guards(pipeline: Pipeline) -> Iterator[tuple[str, GuardRule]]:
    yield from _stops("guard: stops", "option_stop_rate")
    if pipeline.evaluate.answers is not None:
        yield from _stops("guard: stops (free answers)", "stop_rate")
    yield "guard: likelihood", _not_worse("likelihood", "nll", "lower", MAX_NLL_RISE, against="production")
    yield "guard: training", _training()
    yield "guard: leakage", _limit("leakage", "leaked_rows", "lower", 0.0)
    yield "guard: template", _limit("template", "template_mismatches", "lower", 0.0)
    if pipeline.evaluate.forgetting is not None:
        yield "guard: forgetting", _not_worse("forgetting", "forgetting_nll", "lower", MAX_FORGETTING, against="base")


def _stops(name: str, metric: str) -> Iterator[tuple[str, GuardRule]]:
    yield name, _limit("stops", metric, "higher", MIN_STOP_RATE)
    loss = _not_worse("stops", metric, "higher", MAX_STOP_RATE_LOSS, against="production")
    yield f"{name} against production", loss


def _limit(guard: str, metric: str, direction: Direction, limit: float) -> GuardRule:
    return GuardRule(guard=guard, metric=metric, direction=direction, test="limit", limit=limit, min_items=1)


def _not_worse(guard: str, metric: str, direction: Direction, margin: float, *, against: str) -> GuardRule:
    return GuardRule(
        guard=guard,
        metric=metric,
        direction=direction,
        test="non-inferiority",
        margin=margin,
        against=against,
        min_items=1,
    )


def _training() -> GuardRule:
    """Compares two numbers of the candidate itself; `gates.judge_guard` handles this guard separately."""
    return GuardRule(
        guard="training",
        metric="training_loss_end",
        direction="lower",
        test="superiority",
        margin=0.0,
        against="training_loss_start",
        min_items=1,
    )
