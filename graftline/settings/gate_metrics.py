"""The metrics of an evaluation and what enables each: a gate that asks for anything else could never pass.

`graftline.evaluate` computes them; a test keeps the two lists in sync.
"""

import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from graftline.settings.channels import ChannelPolicy
from graftline.settings.model import Direction, Gate, Pipeline

UNQUANTIZED = "unquantized"
PRODUCTION, ANCHOR = "production", "anchor"
ALWAYS_SCORED = ("base", PRODUCTION, ANCHOR)
JSON = ("json_equal", "field_f1")
GENERATED = ("exact_match", "f1", "rouge_l", *JSON)
"""Free-answer metrics that may be a pipeline's metric."""
FROM_LOG_PROBABILITIES = (
    "accuracy",
    "macro_f1",
    "class_nll",
    "nll",
    "option_stop_rate",
    "general_accuracy",
    "forgetting_nll",
)
"""Metrics that a server can only give with log-probabilities of a prompt (``evaluate.engine``)."""
OF_ENGINES = ("engine_label_agreement", "engine_answer_agreement", "engine_nll_difference")
"""Metrics that compare a server with our own code."""


@dataclass(frozen=True)
class Metric:
    """``better``: the better direction, None if neither is. ``switch``: the key that enables the measurement.

    ``num_items``: number of items with a value, as far as the file says; None for a measured number. ``least`` and
    ``most``: bounds of its values. ``is_rate``: every item is right or wrong.
    """

    better: Direction | None
    switch: str
    is_on: Callable[[Pipeline], bool]
    num_items: Callable[[Pipeline], int] | None = None
    least: float = 0.0
    most: float = math.inf
    is_rate: bool = False


OF_ALL_ROWS = ("macro_f1",)
"""Metrics whose value of a row depends on the other rows."""
NOT_OF_ROWS = ("forgetting_nll", "general_accuracy")
"""Metrics whose items are not the evaluation rows."""
MANY = 2**31
"""Stands for a number of items that is unknown here: of a general task, which the harness holds, or another file."""


def _rows(pipeline: Pipeline) -> int:
    # The number of rows of another source is known only after reading it.
    return MANY if pipeline.data.evaluation else pipeline.data.evaluation_rows


def _answers(pipeline: Pipeline) -> int:
    answers = pipeline.evaluate.answers
    return min(_rows(pipeline), answers.max_rows or MANY) if answers else 0


def _documents(pipeline: Pipeline) -> int:
    forgetting = pipeline.evaluate.forgetting
    return forgetting.max_documents if forgetting else 0


def _has_options(pipeline: Pipeline) -> bool:
    return bool(pipeline.data.options)


def _writes(pipeline: Pipeline) -> bool:
    return not pipeline.train.objective.classifies


def _always(pipeline: Pipeline) -> bool:
    return True


def _has_answers(pipeline: Pipeline) -> bool:
    return pipeline.evaluate.answers is not None


def _is_json(pipeline: Pipeline) -> bool:
    return bool(pipeline.evaluate.answers and pipeline.evaluate.answers.json_schema)


def _has_judge(pipeline: Pipeline) -> bool:
    return bool(pipeline.evaluate.answers and pipeline.evaluate.answers.judge)


def _is_merged(pipeline: Pipeline) -> bool:
    return pipeline.package.merged


def _is_timed(pipeline: Pipeline) -> bool:
    return pipeline.evaluate.latency_tokens is not None


def _has_miub(pipeline: Pipeline) -> bool:
    return pipeline.evaluate.miub_rows is not None


def _labels_on_engine(pipeline: Pipeline) -> bool:
    return pipeline.evaluate.engine is not None and bool(pipeline.data.options)


def _answers_on_engine(pipeline: Pipeline) -> bool:
    return pipeline.evaluate.engine is not None and pipeline.evaluate.answers is not None


def _rate(switch: str, is_on: Callable[[Pipeline], bool], num_items: Callable[[Pipeline], int]) -> Metric:
    return Metric("higher", switch, is_on, num_items, most=1.0, is_rate=True)


METRICS: dict[str, Metric] = {
    "accuracy": _rate("data.labels", _has_options, _rows),
    "macro_f1": Metric("higher", "data.labels", _has_options, _rows, most=1.0),
    "class_nll": Metric("lower", "data.labels", _has_options, _rows),
    "nll": Metric("lower", "train.objective.kind: supervised", _writes, _rows),
    "option_stop_rate": _rate("train.objective.kind: supervised", _writes, _rows),
    "forgetting_nll": Metric("lower", "evaluate.forgetting", lambda p: p.evaluate.forgetting is not None, _documents),
    "general_accuracy": _rate(
        "evaluate.harness", lambda pipeline: pipeline.evaluate.harness is not None, lambda _: MANY
    ),
    **{name: _rate("evaluate.answers", _has_answers, _answers) for name in ("exact_match", "stop_rate")},
    **{name: Metric("higher", "evaluate.answers", _has_answers, _answers, most=1.0) for name in ("f1", "rouge_l")},
    **{name: _rate("evaluate.answers.json_schema", _is_json, _answers) for name in ("json_valid", "json_equal")},
    **{
        name: Metric("higher", "evaluate.answers.json_schema", _is_json, _answers, most=1.0)
        for name in ("field_precision", "field_recall", "field_f1")
    },
    "judge": Metric("higher", "evaluate.answers.judge", _has_judge, _answers, most=1.0),
    **{
        name: Metric("higher", "evaluate.answers.judge.human_labels", _has_judge, most=1.0)
        for name in ("judge_agreement", "judge_agreement_low")
    },
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
        name: Metric(None, "evaluate.miub_rows", _has_miub, least=-math.inf)
        for name in ("miub", "miub_low", "miub_high", "miub_frozen_term", "miub_adapter_term", "miub_norm_ratio")
    },
    **{
        name: Metric("lower", "package.merged", _is_merged)
        for name in (
            "merged_bytes",
            "merged_failures",
            "merged_max_logit_difference",
            "merged_mean_kl",
        )
    },
    "engine_label_agreement": Metric("higher", "evaluate.engine` and `data.labels", _labels_on_engine, most=1.0),
    "engine_answer_agreement": Metric("higher", "evaluate.engine` and `evaluate.answers", _answers_on_engine, most=1.0),
    "engine_nll_difference": Metric("lower", "evaluate.engine", lambda pipeline: pipeline.evaluate.engine is not None),
    "merged_nll_change": Metric("lower", "package.merged", _is_merged, least=-math.inf),
    "merged_argmax_agreement": Metric("higher", "package.merged", _is_merged, most=1.0),
}
"""By name; those without ``num_items`` are measured numbers."""


def metrics_of(pipeline: Pipeline) -> dict[str, Metric]:
    """`METRICS` with the pipeline's own (`evaluate.answers.scores`)."""
    answers = pipeline.evaluate.answers
    own = Metric(None, "evaluate.answers.scores", _has_answers, _answers, least=-math.inf)
    return METRICS | dict.fromkeys(answers.scores if answers else (), own)


def is_of_rows(gate: Gate, pipeline: Pipeline) -> bool:
    """Whether a gate judges the evaluation's rows or their answers, and so can judge other rows, too."""
    metric = metrics_of(pipeline).get(gate.metric)
    return metric is not None and metric.num_items is not None and gate.metric not in NOT_OF_ROWS


def has_anchor(policy: ChannelPolicy) -> bool:
    """Whether a channel has an anchor: as its policy says, else where no person has to approve a promotion."""
    asked = policy.approvals
    needs_person = asked.count > 0 or bool(asked.roles) or asked.other_than_builder
    return not needs_person if policy.anchor is None else policy.anchor


def is_anchored(policy: ChannelPolicy, gates: Mapping[str, Gate]) -> bool:
    """Whether candidates under these gates are compared with the channel's anchor."""
    by_policy = has_anchor(policy) and bool(anchor_gates(gates))
    return by_policy or any(gate.against == ANCHOR for gate in gates.values())


def anchor_gates(gates: Mapping[str, Gate]) -> dict[str, Gate]:
    """For each gate that shows "not worse than production", the same against the anchor, unless there is one.

    One on the same metric and slice, that is. Named ``anchor: <gate>``, which no gate of pipelines.yaml can be.
    """
    own = {gate.about for gate in gates.values() if gate.against == ANCHOR}
    return {
        f"{ANCHOR}: {name}": gate.replace(test="non-inferiority", against=ANCHOR)
        for name, gate in gates.items()
        if gate.against == PRODUCTION and gate.test in ("non-inferiority", "equivalence") and gate.about not in own
    }


def gate_problems(gate: Gate, pipeline: Pipeline) -> Iterator[tuple[str, str]]:
    """Reasons why this pipeline's evaluation cannot decide a gate, as key and message."""
    metrics = metrics_of(pipeline)
    metric = metrics.get(gate.metric)
    known = [name for name, found in metrics.items() if found.num_items or gate.test == "limit"]
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
    judge = pipeline.evaluate.answers and pipeline.evaluate.answers.judge
    if gate.metric == "judge" and judge and not judge.human_labels:
        yield "metric", "given judge without `evaluate.answers.judge.human_labels`; expected labels that it agrees with"
    yield from _slice_problems(gate, metric, pipeline)
    if metric.better not in (None, gate.direction):
        yield "direction", f"given {gate.direction}; expected {metric.better} for {gate.metric}"
    if metric.num_items and gate.min_items > metric.num_items(pipeline):
        yield (
            "min_items",
            f"given {gate.min_items}, but {gate.metric} has {metric.num_items(pipeline)} items; expected at most that",
        )
    yield from _out_of_reach(gate, metric, pipeline)
    scored = (*ALWAYS_SCORED, *pipeline.evaluate.references)
    if gate.test != "limit" and gate.against is not None and gate.against not in scored:
        yield (
            "against",
            f"given {gate.against!r}, which is not scored; expected one of {', '.join(scored)}: add it to "
            "`evaluate.references`",
        )


def _slice_problems(gate: Gate, metric: Metric, pipeline: Pipeline) -> Iterator[tuple[str, str]]:
    for column in gate.slice or ():
        if column not in pipeline.data.slices:
            known = ", ".join(pipeline.data.slices) or "none yet"
            yield "slice", f"given {column!r}; expected one of `data.slices`: {known}"
        if not metric.num_items or gate.metric in (*NOT_OF_ROWS, *OF_ALL_ROWS):
            yield "slice", f"given for {gate.metric}, which has no value a row; remove it"


def _out_of_reach(gate: Gate, metric: Metric, pipeline: Pipeline) -> Iterator[tuple[str, str]]:
    """Reasons why no candidate could ever pass: values out of range, or too few items to show the condition."""
    if gate.test == "superiority" and gate.margin >= metric.most - metric.least:
        yield (
            "margin",
            f"given {gate.margin:g}; expected less than {metric.most - metric.least:g}: nothing gains so much",
        )
    if gate.test == "limit" and gate.limit is not None:
        edge, above = (metric.most, True) if gate.direction == "higher" else (metric.least, False)
        if gate.limit > edge if above else gate.limit < edge:
            most = "at most" if above else "at least"
            yield "limit", f"given {gate.limit:g}; expected {most} {edge:g}: {gate.metric} is never beyond that"
        elif gate.limit == edge and metric.num_items:
            less = "less than" if above else "more than"
            yield "limit", f"given {gate.limit:g}; expected {less} {edge:g}: no sample shows that all items ever are so"
    if metric.is_rate and metric.num_items:
        yield from _too_few(gate, metric.num_items(pipeline))


def _too_few(gate: Gate, num_items: int) -> Iterator[tuple[str, str]]:
    """Problems of a rate's gate that cannot pass even if every item is right, or matches the reference's."""
    key, share = ("limit", gate.limit) if gate.test == "limit" else ("margin", 1 - gate.margin)
    if gate.test not in ("limit", "equivalence") or share is None or not 0 < share < 1:
        return
    needed = math.ceil(math.log(gate.alpha) / math.log(share))
    if needed > num_items:
        value = gate.limit if key == "limit" else gate.margin
        yield (
            key,
            f"given {value:g}, which {num_items} items cannot show, however they come out; expected {needed} items "
            "(`data.evaluation_rows`), or one that is easier to show",
        )
