"""What decides a guard: the value that was observed. The interval is shown beside it and decides nothing.

With few rows no test could show what a guard asks, and a sound candidate would wait for ever; the limits of guards are
wide enough to be taken at their word.
"""

from collections.abc import Mapping
from dataclasses import replace

from graftline.errors import EvaluationError
from graftline.evaluate.comparisons import check_limit, compare
from graftline.evaluate.gate_rules import METRICS, Sample, number, sample
from graftline.evaluate.guard_rules import GuardRule
from graftline.evaluate.scores import Scores, require_comparable
from graftline.evaluate.verdict import GateResult
from graftline.settings.model import Gate

_ROUNDING = 1e-9
"""0.95 lies 0.05 below 1, though 0.95 - 1 < -0.05 in binary fractions."""
_FEWEST_FOR_INTERVAL = 2


def judge_guard(blank: GateResult, rule: GuardRule, candidate: Scores, references: Mapping[str, Scores]) -> GateResult:
    """Decide one guard.

    Args:
        blank: the result to fill in.
        rule: the guard's rule.
        candidate: the candidate's scores.
        references: scores by what ``rule.against`` may name.

    Raises:
        EvaluationError: a value was not measured, or the reference is missing or cannot be compared.
    """
    if rule.guard == "training":
        return _judge_training(blank, candidate)
    if rule.metric not in METRICS:
        found = replace(blank, candidate=number(candidate, rule.metric, of="candidate"), method="measured number")
    else:
        found = _measure(blank, rule, candidate, references)
    return _decide(found, rule)


def find_reference(rule: Gate, references: Mapping[str, Scores]) -> Scores:
    """The scores that a rule compares with.

    Raises:
        EvaluationError: there are none of that name.
    """
    if rule.against is None or rule.against not in references:
        known = ", ".join(sorted(references)) or "nothing"
        raise EvaluationError(f"there are no scores of {rule.against!r} to compare with; there is {known}")
    return references[rule.against]


def _measure(blank: GateResult, rule: GuardRule, candidate: Scores, references: Mapping[str, Scores]) -> GateResult:
    ours, theirs = sample(candidate, rule.metric), None
    if rule.test != "limit":
        reference = find_reference(rule, references)
        require_comparable(candidate, reference, METRICS[rule.metric].section)
        theirs = sample(reference, rule.metric)
    return replace(
        blank,
        num_items=len(ours.ids),
        candidate=ours.mean,
        reference=None if theirs is None else theirs.mean,
        difference=ours.mean if theirs is None else ours.mean - theirs.mean,
        interval=_interval(rule, ours, theirs),
        method="observed value",
    )


def _interval(rule: GuardRule, ours: Sample, theirs: Sample | None) -> tuple[float, float] | None:
    if len(ours.ids) < _FEWEST_FOR_INTERVAL:
        return None
    return (check_limit(rule, ours) if theirs is None else compare(rule, ours, theirs)).interval


def _decide(found: GateResult, rule: GuardRule) -> GateResult:
    value = 0.0 if found.candidate is None else found.candidate
    if found.reference is None:
        limit = rule.limit if rule.limit is not None else 0.0
        holds = rule.sign * (value - limit) >= -_ROUNDING
        wanted = f"{'at least' if rule.sign > 0 else 'at most'} {limit:g}"
    else:
        holds = rule.sign * (value - found.reference) >= -rule.margin - _ROUNDING
        wanted = f"at most {rule.margin:g} {'below' if rule.sign > 0 else 'above'} {rule.against}"
    rows = f"{found.num_items} items, " if found.num_items else ""
    reason = f"{found.line}; {rows}decided by the value that was observed; asked: {wanted}"
    return replace(found, outcome="pass" if holds else "fail", reason=reason)


def _judge_training(blank: GateResult, candidate: Scores) -> GateResult:
    """Whether the training's loss is finite and ends below its start; one step has no end to compare with its start."""
    infinite = int(number(candidate, "training_losses_not_finite", of="candidate"))
    steps = int(number(candidate, "training_steps", of="candidate"))
    if infinite:
        return replace(blank, outcome="fail", reason=f"the training loss of {infinite} of {steps} steps is not finite")
    start = number(candidate, "training_loss_start", of="candidate")
    end = number(candidate, "training_loss_end", of="candidate")
    found = replace(blank, candidate=end, reference=start, difference=end - start, method="measured number")
    if steps == 1:
        return replace(found, outcome="pass", reason=f"the loss of the only step is {start:.3g}, which is finite")
    reason = f"{found.line}, {steps} steps; asked: the mean loss at the end below that at the start"
    return replace(found, outcome="pass" if end < start else "fail", reason=reason)
