"""The head of a pull request compared with its base revision, by the base revision's gates.

A gate with items becomes a paired test against the base revision's candidate, with the gate's margin; a limit stays a
limit. A candidate that is shown to be within the margin passes; one that is significantly worse and not shown to be
within the margin fails; anything else is inconclusive.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

from graftline.errors import EvaluationError
from graftline.evaluate.comparisons import weakness
from graftline.evaluate.gate_rules import NO_SLICES, Slices, in_slice, sample, spec_of
from graftline.evaluate.gates import NO_CLUSTERS, Clusters, judge
from graftline.evaluate.scores import Scores
from graftline.evaluate.statistics.error_rates import Power
from graftline.evaluate.verdict import GateResult, Verdict, combined_outcome
from graftline.settings.model import Gate

BASE_REVISION = "base revision"
EQUAL = "adapter and scores are equal to the base revision's, by digest: there is nothing to test"

_COULD_NOT_RUN = "could not run: "
"""How `judge` starts the reason of a gate that was not measured or has nothing to compare with."""


def compare(
    rules: Mapping[str, Gate],
    head: Scores,
    base: Scores | None,
    *,
    equal: bool,
    clusters: Clusters = NO_CLUSTERS,
    slices: Slices = NO_SLICES,
) -> Verdict:
    """Compare the candidates of head and base revision on every metric that a gate names.

    Args:
        rules: the base revision's gates.
        head: scores of the head's candidate.
        base: scores of the base revision's candidate; None if it could not be evaluated.
        equal: whether adapter and scores of both are the same bytes, so that there is nothing to test.
        clusters: as in `judge`.
        slices: as in `judge`.
    """
    asked = _asked(rules, head)
    # Equal scores prove nothing about what they do not contain, such as the merged model's numbers.
    held = {name: _value(base, rule, slices) for name, rule in asked.items()} if equal and base else {}
    found = {name: _equal(name, asked[name], value) for name, value in held.items() if value is not None}
    rest = {name: rule for name, rule in asked.items() if name not in found}
    paired = {name: rule for name, rule in rest.items() if rule.against == BASE_REVISION}
    for family in (paired, {name: rule for name, rule in rest.items() if name not in paired}):
        references = {BASE_REVISION: base} if base else {}
        shown = judge_shown(family, head, references, clusters=clusters, slices=slices)
        found |= {gate.name: gate for gate in shown}
    gates = tuple(decided(_with_reference(found[name], rule, base, slices)) for name, rule in asked.items())
    return Verdict(combined_outcome(gates), gates)


def judge_shown(
    rules: Mapping[str, Gate],
    head: Scores,
    references: Mapping[str, Scores],
    *,
    clusters: Clusters = NO_CLUSTERS,
    slices: Slices = NO_SLICES,
) -> tuple[GateResult, ...]:
    """`judge`, except that a gate that was not measured or cannot be compared is inconclusive instead of failed."""
    if not rules:
        return ()
    judged = judge(rules, head, references, clusters=clusters, slices=slices)
    return tuple(_excuse(gate, head) for gate in judged.gates)


def decided(gate: GateResult) -> GateResult:
    """The final outcome of a gate: a significant loss fails unless it is shown to be within the margin.

    The test against the margin alone would call it inconclusive.
    """
    if gate.outcome == "inconclusive" and is_worse(gate):
        return replace(gate, outcome="fail")
    return gate


def is_worse(gate: GateResult) -> bool:
    """Whether the whole interval of the difference is on the bad side of 0."""
    if gate.test == "limit" or gate.interval is None:
        return False
    low, high = gate.interval
    return high < 0 if gate.direction == "higher" else low > 0


def explain(gate: GateResult) -> str:
    """The finding of a gate in words, with a warning if the gate would seldom pass an equal candidate."""
    weak = None if gate.power is None else _weakness(gate, gate.power)
    return f"{_finding(gate)}{'' if weak is None else f'; ⚠ {weak}'}"


def _weakness(gate: GateResult, power: float) -> str | None:
    return weakness(Power(power, gate.power_margin, gate.power_items), gate.margin, gate.num_items)


def _finding(gate: GateResult) -> str:
    if gate.test == "limit" or gate.interval is None or gate.difference is None or gate.guard:
        return gate.reason
    worse = f"worse by {abs(gate.difference):.3g}, " if is_worse(gate) else ""
    if gate.outcome == "pass":
        return f"{worse}{'' if worse else 'shown to be '}within the margin of {gate.margin:g}"
    if gate.outcome == "fail":
        return f"{worse}not shown to be within the margin of {gate.margin:g}"
    return f"not shown to be within the margin of {gate.margin:g}, nor to be worse; {_rows_that_decide(gate)}"


def _rows_that_decide(gate: GateResult) -> str:
    if gate.more_items is None:
        return "the difference lies on the margin, so no number of rows decides"
    return f"about {gate.more_items} more rows would decide ({gate.num_items + gate.more_items} in all)"


def _asked(rules: Mapping[str, Gate], head: Scores) -> dict[str, Gate]:
    """One paired test per metric and slice, with the smallest margin of its gates; limits and plain numbers are kept.

    The margin of a superiority gate is a gain, not a tolerated loss: if the metric has no other gate, no loss is
    tolerated. A gate does not replace a guard of the same metric, which is decided differently.
    """
    asked: dict[str, Gate] = {}
    for name, rule in rules.items():
        if not _is_paired(rule, head):
            asked[name] = rule
            continue
        about = (rule.metric, rule.slice)
        rivals = [each for each in rules.values() if _is_paired(each, head) and (each.metric, each.slice) == about]
        tolerance = min(
            (each for each in rivals if type(each) is type(rule)),
            key=lambda each: (each.test == "superiority", each.margin),
        )
        if rule is tolerance:
            margin = 0.0 if rule.test == "superiority" else rule.margin
            asked[name] = rule.replace(test="non-inferiority", margin=margin, against=BASE_REVISION)
    return asked


def _is_paired(rule: Gate, head: Scores) -> bool:
    return rule.test != "limit" and spec_of(head, rule.metric) is not None


def _excuse(gate: GateResult, head: Scores) -> GateResult:
    could_not_run = gate.reason.startswith(_COULD_NOT_RUN)
    if not could_not_run or not math.isfinite(head.numbers.get(gate.metric, 0.0)):
        return gate
    return replace(gate, outcome="inconclusive", reason=f"cannot be shown: {gate.reason.removeprefix(_COULD_NOT_RUN)}")


def _equal(name: str, rule: Gate, value: float) -> GateResult:
    return GateResult(
        name=name,
        outcome="pass",
        reason=EQUAL,
        candidate=value,
        reference=value,
        difference=0.0,
        method="digest",
        **rule.model_dump(),
    )


def _with_reference(gate: GateResult, rule: Gate, base: Scores | None, slices: Slices) -> GateResult:
    """A gate that was not tested against the base revision, such as a limit, with the value that it had there."""
    if base is None or gate.against == BASE_REVISION or gate.method == "digest":
        return gate
    value = _value(base, rule, slices)
    if value is None or gate.candidate is None:
        return replace(gate, reference=value)
    return replace(gate, reference=value, difference=gate.candidate - value)


def _value(scores: Scores, rule: Gate, slices: Slices) -> float | None:
    """The value of a rule's metric in the scores; None if it was not measured."""
    if spec_of(scores, rule.metric) is None:
        return scores.numbers.get(rule.metric)
    try:
        return in_slice(sample(scores, rule.metric), rule.slice, slices).mean
    except EvaluationError:
        return None
