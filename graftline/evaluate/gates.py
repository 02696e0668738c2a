"""Gates: may the candidate replace its reference?

A gate passes if its condition is shown to hold, fails if it is shown to be broken, and is inconclusive otherwise. All
gates must pass, so each is tested at its own alpha (intersection-union test, Berger 1982): a candidate that breaks a
condition passes that gate with probability at most alpha. A single failing gate is decisive, so p-values of "the
condition holds" are corrected jointly (Holm): a candidate that meets every condition fails with probability at most
alpha. A gate that cannot run fails: missing reference, other items, another template, unmeasured metric. Guards are
decided by the observed value (`judge_guard`) and excluded from the correction.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from graftline.errors import EvaluationError
from graftline.evaluate.comparisons import POWER_TESTS, Comparison, check_limit, compare, gate_power, weakness
from graftline.evaluate.gate_rules import (
    METRICS,
    NO_SLICES,
    GuardRule,
    Kind,
    MetricSample,
    Slices,
    in_clusters,
    in_slice,
    number,
    paired_samples,
    sample,
    spec_of,
)
from graftline.evaluate.judge import AGREEMENT, AGREEMENT_ASKED, AGREEMENT_LOW, JUDGE
from graftline.evaluate.scores import Scores, require_comparable
from graftline.evaluate.statistics.error_rates import Power, first_that_holds, holm, items_needed, smallest_effect
from graftline.evaluate.verdict import GateResult, Outcome, SliceResult, Verdict, combined_outcome
from graftline.settings.model import Gate
from graftline.settings.rules import needs

# The observed value decides a guard; its interval is only shown.
#
# With few rows no test could show a guard's condition, and a sound candidate would never pass; the limits of guards are
# wide enough to do without a test.

_ROUNDING = 1e-9
"""0.95 is 0.05 below 1, but 0.95 - 1 < -0.05 in binary floating point."""
_FEWEST_FOR_INTERVAL = 2
_OF_ROWS = ("items", "answers")
"""Sections whose items are the evaluation rows, to which `Clusters` apply."""
MIN_CLUSTERS = 20
"""With fewer clusters, the error rate of a cluster bootstrap exceeds its alpha."""


def judge_guard(blank: GateResult, rule: GuardRule, candidate: Scores, references: Mapping[str, Scores]) -> GateResult:
    """Decide one guard.

    Args:
        blank: the result to fill in.
        rule: the guard's rule.
        candidate: the candidate's scores.
        references: scores by the names that ``rule.against`` may have.

    Raises:
        EvaluationError: a value was not measured, or the reference is missing or cannot be compared.
    """
    if rule.guard == "training":
        return _judge_training(blank, candidate)
    if spec_of(candidate, rule.metric) is None:
        found = replace(blank, candidate=number(candidate, rule.metric, of="candidate"), method="measured number")
    else:
        found = _measure(blank, rule, candidate, references)
    return _decide_guard(found, rule)


def find_reference(rule: Gate, references: Mapping[str, Scores]) -> Scores:
    """The scores that a rule compares with.

    Raises:
        EvaluationError: there are no scores of that name.
    """
    if rule.against is None or rule.against not in references:
        known = ", ".join(sorted(references)) or "nothing"
        raise EvaluationError(f"there are no scores of {rule.against!r} to compare with; there is {known}")
    return references[rule.against]


def _measure(blank: GateResult, rule: GuardRule, candidate: Scores, references: Mapping[str, Scores]) -> GateResult:
    ours, theirs = sample(candidate, rule.metric), None
    if rule.test != "limit":
        reference = find_reference(rule, references)
        _require_comparable(rule, candidate, reference)
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


def _interval(rule: GuardRule, ours: MetricSample, theirs: MetricSample | None) -> tuple[float, float] | None:
    if len(ours.ids) < _FEWEST_FOR_INTERVAL:
        return None
    return (check_limit(rule, ours) if theirs is None else compare(rule, ours, theirs)).interval


def _decide_guard(found: GateResult, rule: GuardRule) -> GateResult:
    value = 0.0 if found.candidate is None else found.candidate
    if found.reference is None:
        limit = rule.limit if rule.limit is not None else 0.0
        holds = rule.sign * (value - limit) >= -_ROUNDING
        wanted = _condition(found)
    else:
        holds = rule.sign * (value - found.reference) >= -rule.margin - _ROUNDING
        wanted = f"at most {rule.margin:g} {'below' if rule.sign > 0 else 'above'} {rule.against}"
    rows = f"{found.num_items} items, " if found.num_items else ""
    reason = f"{found.line}; {rows}decided by the value that was observed; asked: {wanted}"
    return replace(found, outcome="pass" if holds else "fail", reason=reason)


def _judge_training(blank: GateResult, candidate: Scores) -> GateResult:
    """Check that the training loss is finite and ends below its start; for a single step, only that it is finite."""
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


@dataclass(frozen=True)
class _PendingGate:
    """A gate before the correction: a finished ``result``, or a ``comparison`` that still needs one."""

    result: GateResult
    comparison: Comparison | None = None


Clusters = Mapping[str, str]
"""Item id to cluster name: items drawn together, such as those of one document or user."""
NO_CLUSTERS: Clusters = MappingProxyType({})


def judge(
    gates: Mapping[str, Gate],
    candidate: Scores,
    references: Mapping[str, Scores],
    *,
    clusters: Clusters = NO_CLUSTERS,
    slices: Slices = NO_SLICES,
) -> Verdict:
    """Judge a candidate.

    Args:
        gates: rules by name, fixed before the run; `gate_rules.pipeline_rules` gives those of a pipeline.
        candidate: the candidate's scores.
        references: scores by the names that `Gate.against` may have: ``base``, ``production``, a version.
        clusters: cluster of each row's item; empty: all items are independent.
        slices: by column, the value of each row's item, for gates on a slice.

    Raises:
        EvaluationError: there are no gates, or one lacks what its test needs.
    """
    if not gates:
        raise EvaluationError("there are no gates, so nothing can be shown; add at least one gate to the pipeline")
    for name, rule in gates.items():
        for key, problem in needs(rule):
            raise EvaluationError(f"gate {name!r}: {key}: {problem}")
    found = _Evidence(candidate, references, clusters, slices)
    runs = {name: _run(name, rule, found) for name, rule in gates.items()}
    broken = holm({name: run.comparison.p_broken for name, run in runs.items() if run.comparison is not None})
    results = tuple(
        run.result
        if run.comparison is None
        else _decide(run.result, run.comparison, adjusted_p_broken=broken[name], family=len(broken))
        for name, run in runs.items()
    )
    return Verdict(combined_outcome(results), results)


@dataclass(frozen=True)
class _Evidence:
    """What a candidate is judged by."""

    candidate: Scores
    references: Mapping[str, Scores]
    clusters: Clusters
    slices: Slices


def _run(name: str, rule: Gate, evidence: _Evidence) -> _PendingGate:
    candidate, references = evidence.candidate, evidence.references
    blank = GateResult(name=name, outcome="fail", reason="", **rule.model_dump())
    try:
        if isinstance(rule, GuardRule):
            return _PendingGate(judge_guard(blank, rule, candidate, references))
        if why := doubt(rule, candidate):
            return _PendingGate(replace(blank, outcome="inconclusive", candidate=_mean(candidate, rule), reason=why))
        if spec_of(candidate, rule.metric) is None:
            return _PendingGate(_judge_number(blank, rule, candidate, references))
        return _PendingGate(blank, _compare(rule, evidence))
    except EvaluationError as error:
        return _PendingGate(replace(blank, reason=f"could not run: {error}"))


def compare_scores(
    rule: Gate,
    candidate: Scores,
    references: Mapping[str, Scores],
    clusters: Clusters,
    slices: Slices = NO_SLICES,
) -> Comparison:
    """The evidence on one gate whose metric has items.

    Raises:
        EvaluationError: a value was not measured, or the reference is missing or cannot be compared.
    """
    return _compare(rule, _Evidence(candidate, references, clusters, slices))


def _compare(rule: Gate, evidence: _Evidence) -> Comparison:
    candidate, spec = evidence.candidate, spec_of(evidence.candidate, rule.metric)
    clusters = evidence.clusters if spec and spec.section in _OF_ROWS else {}
    if rule.test == "limit":
        return check_limit(
            rule, in_slice(in_clusters(sample(candidate, rule.metric), clusters), rule.slice, evidence.slices)
        )
    reference = find_reference(rule, evidence.references)
    _require_comparable(rule, candidate, reference)
    ours, theirs = paired_samples(candidate, reference, rule.metric)
    ours = in_slice(in_clusters(ours, clusters), rule.slice, evidence.slices)
    return compare(rule, ours, in_slice(theirs, rule.slice, evidence.slices))


NUM_SLICES = 20
"""Number of a column's values that are shown, the most frequent first."""
SMALL = 100
"""A slice with fewer items decides nothing; also the default of a gate's `min_items`."""


def by_slice(
    metric: str, candidate: Scores, reference: Scores, *, against: str, clusters: Clusters, slices: Slices
) -> tuple[SliceResult, ...]:
    """A metric of each slice, with the 90 % interval of the difference unless the slice has too few items.

    The intervals are of each slice alone: among many slices, some exclude no difference by chance. Nothing is shown of
    scores that cannot be compared, as the gates say.
    """
    rule = Gate(metric=metric, direction="higher", test="non-inferiority", margin=0.0, against=against)
    shown = list[SliceResult]()
    try:
        _require_comparable(rule, candidate, reference)
    except EvaluationError:
        return ()
    for column, by_id in slices.items():
        counts = Counter(by_id[one] for one in candidate.ids(METRICS[metric].section) if one in by_id)
        for value, num_items in counts.most_common(NUM_SLICES):
            wanted = rule.replace(slice={column: value})
            try:
                found = _compare(wanted, _Evidence(candidate, {against: reference}, clusters, slices))
            except EvaluationError:  # One item has no interval.
                shown.append(SliceResult(column, value, num_items))
                continue
            few = num_items < SMALL or (found.num_clusters or MIN_CLUSTERS) < MIN_CLUSTERS
            values = (found.candidate, found.reference, found.difference, found.interval)
            shown.append(SliceResult(column, value, num_items, *values, decides=not few))
    return tuple(shown)


def _require_comparable(rule: Gate, candidate: Scores, reference: Scores) -> None:
    """As `require_comparable`, and both must be measured by the same files."""
    spec = spec_of(candidate, rule.metric)
    if spec:
        require_comparable(candidate, reference, spec.section)
    ours, theirs = (scores.measured_by.get(rule.metric) for scores in (candidate, reference))
    if ours != theirs:
        raise EvaluationError(
            f"{rule.metric} was measured by {ours or 'nothing else'} for the candidate, by {theirs or 'nothing else'} "
            "for the reference; evaluate both with the same files"
        )


def doubt(rule: Gate, candidate: Scores) -> str | None:
    """Why a judge model decides nothing: people do not, or not surely, decide as it does.

    Raises:
        EvaluationError: it was not compared with people.
    """
    if rule.metric != JUDGE:
        return None
    found, low, asked = (
        number(candidate, name, of="candidate") for name in (AGREEMENT, AGREEMENT_LOW, AGREEMENT_ASKED)
    )
    if low >= asked:
        return None
    return (
        f"{JUDGE} {_mean(candidate, rule):.3f} is reported and decides nothing: the judge agrees with {found:.0%} of "
        f"the human labels, which shows at least {low:.0%}; asked: {asked:.0%}. Improve the rubric, take another "
        "judge, or give more labels"
    )


def _mean(candidate: Scores, rule: Gate) -> float:
    return sample(candidate, rule.metric).mean


def _judge_number(blank: GateResult, rule: Gate, candidate: Scores, references: Mapping[str, Scores]) -> GateResult:
    """A measured number has no sampling error here, so its value alone decides."""
    ours = number(candidate, rule.metric, of="candidate")
    if rule.test == "limit":
        limit = rule.limit if rule.limit is not None else 0.0
        theirs, good = None, rule.sign * (ours - limit) >= 0
        wanted = _condition(blank)
    else:
        theirs = number(find_reference(rule, references), rule.metric, of=str(rule.against))
        goodness = rule.sign * (ours - theirs)
        good = {
            "non-inferiority": goodness >= -rule.margin,
            "superiority": goodness > rule.margin,
            "equivalence": abs(goodness) <= rule.margin,
        }[rule.test]
        wanted = f"{_condition(blank)} ({theirs:g})"
    return replace(
        blank,
        outcome="pass" if good else "fail",
        reason=f"{rule.metric} is {ours:g}, asked: {wanted}",
        candidate=ours,
        reference=theirs,
        difference=ours if theirs is None else ours - theirs,
        method="measured number",
    )


def _decide(blank: GateResult, found: Comparison, *, adjusted_p_broken: float, family: int) -> GateResult:
    power = _power(blank, found)
    result = replace(
        blank,
        power=None if power is None else power.value,
        power_margin=None if power is None else power.margin,
        power_items=None if power is None else power.num_items,
        num_items=found.num_items,
        candidate=found.candidate,
        reference=found.reference,
        difference=found.difference,
        interval=found.interval,
        p_value=found.p_holds,
        p_broken=found.p_broken,
        num_clusters=found.num_clusters,
        design_effect=found.design_effect,
        adjusted_p_broken=adjusted_p_broken,
        p_no_change=found.p_no_change,
        method=found.method,
        smallest_effect=_smallest_effect(found, blank.alpha),
    )
    outcome = _outcome(result)
    more = _more_items(result, found, family) if outcome == "inconclusive" else None
    return replace(result, outcome=outcome, more_items=more, reason=_reason(result, found, outcome, more))


def _power(result: GateResult, found: Comparison) -> Power | None:
    """Power of this gate alone."""
    if result.test not in POWER_TESTS:
        return None
    share = found.equal_discordant_share
    spread = found.deviation if share is None else share
    kind: Kind = "mean" if share is None else "rate"
    return gate_power(kind, result.test, result.margin, found.num_items, spread=spread, alpha=result.alpha)


def _outcome(result: GateResult) -> Outcome:
    if result.num_items < result.min_items or _has_few_clusters(result):
        return "inconclusive"
    if result.p_value is not None and result.p_value <= result.alpha:
        return "pass"
    is_broken = result.adjusted_p_broken is not None and result.adjusted_p_broken <= result.alpha
    return "fail" if is_broken else "inconclusive"


def _has_few_clusters(result: GateResult) -> bool:
    return result.num_clusters is not None and result.num_clusters < MIN_CLUSTERS


def _smallest_effect(found: Comparison, alpha: float) -> float:
    """Normal approximation; for rates at least 1 - alpha^(1/n), what zero events in n items exclude."""
    effect = smallest_effect(found.deviation, found.num_items, alpha=alpha)
    if found.method.startswith("bootstrap-t"):
        return effect
    return max(effect, 1 - alpha ** (1 / found.num_items))


def _more_items(result: GateResult, found: Comparison, family: int) -> int | None:
    """None if no number of items suffices: the observed difference is on the bound.

    The normal approximation fails if hardly any item differs, so the test itself is projected too. A gate that tends to
    fail must meet the strictest of the ``family``'s corrected alphas.
    """
    alpha = result.alpha if found.distance > 0 else result.alpha / family
    needed = max(items_needed(found.deviation, found.distance, alpha=alpha), result.min_items)
    if found.projected is not None and math.isfinite(needed):
        projected, leaning = found.projected, 0 if found.distance > 0 else 1
        decides = first_that_holds(lambda num_items: projected(num_items)[leaning] <= alpha)
        needed = max(needed, decides or math.inf)
    if not math.isfinite(needed):
        return None
    return max(1, int(needed) - found.num_items)


def _condition(result: GateResult) -> str:
    if result.test == "limit":
        return f"{'at least' if result.direction == 'higher' else 'at most'} {result.limit:g}"
    if result.test == "superiority":
        return f"better than {result.against} by more than {result.margin:g}"
    if result.test == "equivalence":
        return f"within {result.margin:g} of {result.against}"
    return f"not worse than {result.against} by {result.margin:g} or more"


def _reason(result: GateResult, found: Comparison, outcome: Outcome, more: int | None) -> str:
    items = f"{found.num_items} items"
    if found.num_clusters is not None:
        items += f" in {found.num_clusters} clusters (design effect {found.design_effect:.2f})"
    evidence = f"{result.line}; {found.method}, p = {result.p_value:.2g}, {items}"
    power = f"the smallest effect that they show is {result.smallest_effect:.3g}{_weakness(result)}"
    asked = f"asked: {_condition(result)}"
    if outcome == "pass":
        return f"{evidence}; {asked}: shown; {power}"
    if outcome == "fail":
        is_corrected = result.adjusted_p_broken != result.p_broken
        corrected = f", {result.adjusted_p_broken:.2g} after Holm" if is_corrected else ""
        return f"{evidence}; {asked}: shown to be broken (p = {found.p_broken:.2g}{corrected}); {power}"
    return f"{evidence}; {asked}: not decided; {power}; {_advice(result, found, more)}"


def _weakness(result: GateResult) -> str:
    if result.power is None:
        return ""
    found = weakness(Power(result.power, result.power_margin, result.power_items), result.margin, result.num_items)
    return "" if found is None else f"; ⚠ {found}"


def _advice(result: GateResult, found: Comparison, more: int | None) -> str:
    if found.num_items < result.min_items:
        return f"the gate asks for {result.min_items} items: {result.min_items - found.num_items} more are needed"
    if _has_few_clusters(result):
        return f"fewer than {MIN_CLUSTERS} clusters decide nothing: evaluate rows of more of them"
    if more is None:
        return "the observed difference lies on the bound: no number of items decides it"
    tendency = "pass" if found.distance > 0 else "fail"
    return f"about {more} more items would be needed, and at the observed difference it would then {tendency}"
