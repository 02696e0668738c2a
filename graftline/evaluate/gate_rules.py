"""The conditions of gates and guards, and the numbers of an evaluation that they test."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

from graftline.errors import EvaluationError
from graftline.evaluate.macro_f1 import paired_values, values_of
from graftline.evaluate.scores import AnswerScore, ItemScore, Scores, Section
from graftline.settings.gate_metrics import anchor_gates
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
class MetricSpec:
    """A metric with a value per item: where it is scored, and an item's value and weight."""

    section: Section
    kind: Kind
    value: Callable[[Any], float | None]
    weight: Callable[[Any], float] = lambda row: 1.0
    of_all: Callable[[Sequence[Any]], Iterable[float]] | None = None
    """Values that depend on the other items; ``value`` then only says whether an item was measured."""


def _is_right(row: ItemScore) -> float | None:
    """None if the row's own answer is the only option: there was nothing to choose."""
    return float(row.correct) if len(row.log_likelihoods) > 1 else None


def _own(name: str, row: AnswerScore) -> float | None:
    return row.own.get(name)


METRICS: dict[str, MetricSpec] = {
    "accuracy": MetricSpec("items", "rate", _is_right),
    "macro_f1": MetricSpec("items", "mean", _is_right, of_all=values_of),
    "class_nll": MetricSpec("items", "mean", lambda row: row.class_nll if len(row.log_likelihoods) > 1 else None),
    "nll": MetricSpec("items", "mean", lambda row: row.nll, lambda row: row.num_tokens),
    "option_stop_rate": MetricSpec("items", "rate", lambda row: None if row.stop is None else float(row.stop)),
    "general_accuracy": MetricSpec("general", "rate", _is_right),
    "forgetting_nll": MetricSpec("documents", "mean", lambda row: row.nll, lambda row: row.num_tokens),
    "exact_match": MetricSpec("answers", "rate", lambda row: float(row.exact_match)),
    "f1": MetricSpec("answers", "mean", lambda row: row.f1),
    "rouge_l": MetricSpec("answers", "mean", lambda row: row.rouge_l),
    "stop_rate": MetricSpec("answers", "rate", lambda row: float(row.stop)),
    **{name: MetricSpec("answers", "rate", partial(_own, name)) for name in ("json_valid", "json_equal")},
    **{
        name: MetricSpec("answers", "mean", partial(_own, name))
        for name in ("field_precision", "field_recall", "field_f1", "judge")
    },
}
"""Metrics that every version measures; `spec_of` knows those of a project too."""


def spec_of(scores: Scores, metric: str) -> MetricSpec | None:
    """How a metric with a value per item is read; None if it is a number (`Scores.numbers`) or unknown."""
    if metric in METRICS or not any(metric in answer.own for answer in scores.answers):
        return METRICS.get(metric)
    values = {answer.own.get(metric) for answer in scores.answers}
    return MetricSpec("answers", "rate" if values <= {0.0, 1.0} else "mean", partial(_own, metric))


def sample(scores: Scores, metric: str) -> MetricSample:
    """The metric's values per item.

    Raises:
        EvaluationError: the evaluation did not measure it.
    """
    spec = spec_of(scores, metric)
    if spec is None:
        raise EvaluationError(f"{metric} was not measured; evaluate it, or drop the gate")
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
        tuple(float(value) for value in (spec.of_all(rows) if spec.of_all else values) if value is not None),
        tuple(float(spec.weight(row)) for row in rows),
        spec.kind,
    )


def paired_samples(candidate: Scores, reference: Scores, metric: str) -> tuple[MetricSample, MetricSample]:
    """A metric's values of two models on the same items; errors as `sample`."""
    ours, theirs = sample(candidate, metric), sample(reference, metric)
    if metric != "macro_f1":
        return ours, theirs
    pair = (sorted(scores.items, key=lambda row: row.item_id) for scores in (candidate, reference))
    first, second = (tuple(values.tolist()) for values in paired_values(*pair))
    return replace(ours, values=first), replace(theirs, values=second)


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


Slices = Mapping[str, Mapping[str, str]]
"""By column, the value of each row's item that has one."""
NO_SLICES: Slices = MappingProxyType({})


def in_slice(found: MetricSample, wanted: Mapping[str, str] | None, slices: Slices) -> MetricSample:
    """The items with the wanted value of a column (a gate's ``slice``); all of them if none is wanted.

    Raises:
        EvaluationError: no item has it.
    """
    for column, value in (wanted or {}).items():
        by_id = slices.get(column, {})
        places = [at for at, one in enumerate(found.ids) if by_id.get(one) == value]
        if not places:
            known = ", ".join(sorted({*by_id.values()})[:10]) or "nothing"
            raise EvaluationError(f"no evaluation row has {column} = {value}; there is {known}")
        found = replace(
            found,
            ids=tuple(found.ids[at] for at in places),
            values=tuple(found.values[at] for at in places),
            weights=tuple(found.weights[at] for at in places),
            clusters=None if found.clusters is None else tuple(found.clusters[at] for at in places),
        )
    return found


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


def with_anchor(rules: Mapping[str, Gate]) -> dict[str, Gate]:
    """Rules of a pipeline with those against the anchor (`anchor_gates`), to which guards have no counterpart."""
    gates = {name: rule for name, rule in rules.items() if not isinstance(rule, GuardRule)}
    return gates | anchor_gates(gates) | {name: rule for name, rule in rules.items() if name not in gates}


def pipeline_rules(pipeline: Pipeline) -> dict[str, Gate]:
    """All conditions of a pipeline on a candidate, by name: its gates, then its guards; `with_anchor` adds to them.

    Guards are `GuardRule`; their names start with ``guard: ``, which a gate's name cannot. A gate on the same metric
    does not replace a guard: both apply.
    """
    return pipeline.gates | {name: rule for name, rule in _guards(pipeline) if getattr(pipeline.guards, rule.guard)}


def _guards(pipeline: Pipeline) -> Iterator[tuple[str, GuardRule]]:
    classifies = pipeline.train.objective.classifies
    if not classifies:
        yield from _stops("guard: stops", "option_stop_rate")
    if pipeline.evaluate.answers is not None:
        yield from _stops("guard: stops (free answers)", "stop_rate")
    likelihood = "class_nll" if classifies else "nll"
    yield "guard: likelihood", _not_worse("likelihood", likelihood, "lower", MAX_NLL_RISE, against="production")
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
