"""What an evaluation measures, and what switches each metric on: a gate that asks for anything else could never pass.

`graftline.evaluate` computes them; a test holds the two lists together.
"""

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from graftline.settings.model import Direction, Gate, Pipeline

UNQUANTIZED = "unquantized"
ALWAYS_SCORED = ("base", "production")
GENERATED = ("exact_match", "f1", "rouge_l")
"""Metrics of free answers that a pipeline may be about."""


@dataclass(frozen=True)
class Metric:
    """``better``: its good direction, None where neither is. ``switch``: the key that makes the evaluation measure it.

    ``num_items``: how many items have a value, as far as the file says; None for a measured number.
    """

    better: Direction | None
    switch: str
    is_on: Callable[[Pipeline], bool]
    num_items: Callable[[Pipeline], int] | None = None


MANY = 2**31
"""Items of a general task: what the harness holds is not known here."""


def _rows(pipeline: Pipeline) -> int:
    return pipeline.data.evaluation_rows


def _answers(pipeline: Pipeline) -> int:
    answers = pipeline.evaluate.answers
    return min(_rows(pipeline), answers.max_rows or MANY) if answers else 0


def _documents(pipeline: Pipeline) -> int:
    forgetting = pipeline.evaluate.forgetting
    return forgetting.max_documents if forgetting else 0


def _always(pipeline: Pipeline) -> bool:
    return True


def _has_answers(pipeline: Pipeline) -> bool:
    return pipeline.evaluate.answers is not None


def _is_merged(pipeline: Pipeline) -> bool:
    return pipeline.package.merged


def _is_timed(pipeline: Pipeline) -> bool:
    return pipeline.evaluate.latency_tokens is not None


def _has_miub(pipeline: Pipeline) -> bool:
    return pipeline.evaluate.miub_rows is not None


METRICS: dict[str, Metric] = {
    "accuracy": Metric("higher", "data.labels", lambda pipeline: pipeline.data.labels is not None, _rows),
    "nll": Metric("lower", "", _always, _rows),
    "option_stop_rate": Metric("higher", "", _always, _rows),
    "forgetting_nll": Metric("lower", "evaluate.forgetting", lambda p: p.evaluate.forgetting is not None, _documents),
    "general_accuracy": Metric(
        "higher", "evaluate.harness", lambda pipeline: pipeline.evaluate.harness is not None, lambda _: MANY
    ),
    **{name: Metric("higher", "evaluate.answers", _has_answers, _answers) for name in (*GENERATED, "stop_rate")},
    "forbidden_answers": Metric(
        "lower", "evaluate.answers.forbidden", lambda p: bool(p.evaluate.answers and p.evaluate.answers.forbidden)
    ),
    **{
        name: Metric("lower", "", _always)
        for name in (
            "leaked_rows",
            "leaked_rows_exact",
            "leaked_rows_normalized",
            "leaked_rows_near",
            "template_mismatches",
            "adapter_bytes",
            "training_loss_start",
            "training_loss_end",
            "training_losses_not_finite",
        )
    },
    "training_steps": Metric(None, "", _always),
    **{
        name: Metric("lower", "evaluate.latency_tokens", _is_timed)
        for name in ("latency_seconds", "latency_ratio", "latency_ratio_low")
    },
    **{
        name: Metric(None, "evaluate.miub_rows", _has_miub)
        for name in ("miub", "miub_low", "miub_high", "miub_frozen_term", "miub_adapter_term", "miub_norm_ratio")
    },
    **{
        name: Metric("lower", "package.merged", _is_merged)
        for name in (
            "merged_bytes",
            "merged_failures",
            "merged_max_logit_difference",
            "merged_mean_kl",
            "merged_nll_change",
        )
    },
    "merged_argmax_agreement": Metric("higher", "package.merged", _is_merged),
}
"""By name; those without ``num_items`` are measured numbers."""


def gate_problems(gate: Gate, pipeline: Pipeline) -> Iterator[tuple[str, str]]:
    """Why this pipeline's evaluation cannot answer a gate: key and message."""
    metric = METRICS.get(gate.metric)
    known = [name for name, found in METRICS.items() if found.num_items or gate.test == "limit"]
    if metric is None or gate.metric not in known:
        near = difflib.get_close_matches(gate.metric, known, n=1)
        if metric is not None:
            advice = "write `test: limit`, it is one number and has no items to compare"
        else:
            advice = f"did you mean {near[0]}?" if near else "docs/gates.md describes them"
        yield "metric", f"given {gate.metric!r}; expected one of {', '.join(known)}; {advice}"
        return
    if not metric.is_on(pipeline):
        yield "metric", f"given {gate.metric}, which is not measured; set `{metric.switch}`"
        return
    if metric.better not in (None, gate.direction):
        yield "direction", f"given {gate.direction}; expected {metric.better} for {gate.metric}"
    if metric.num_items and gate.min_items > metric.num_items(pipeline):
        yield (
            "min_items",
            f"given {gate.min_items}, but {gate.metric} has {metric.num_items(pipeline)} items; expected at most that",
        )
    scored = (*ALWAYS_SCORED, *pipeline.evaluate.references)
    if gate.test != "limit" and gate.against is not None and gate.against not in scored:
        yield (
            "against",
            f"given {gate.against!r}, which is not scored; expected one of {', '.join(scored)}: add it to "
            "`evaluate.references`",
        )
