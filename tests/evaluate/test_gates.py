import random
import re
from dataclasses import replace

import numpy as np
import pytest

from graftline.digest import of_json
from graftline.errors import EvaluationError
from graftline.evaluate.gates import judge
from graftline.evaluate.scores import AnswerScore, DocumentScore, ItemScore, Scores
from graftline.evaluate.statistics.proportions import PairedCounts, difference_p_value
from graftline.evaluate.verdict import Verdict
from graftline.settings.model import Gate
from tests.sections import gate_section

TEMPLATE = of_json("chatml")
ACCURACY = gate_section("accuracy", "higher", "non-inferiority", margin=0.03, min_items=50, against="production")


def item(index: int, correct: bool, *, nll: float = 1.0, stop: bool = True) -> ItemScore:
    return ItemScore(f"i{index:05}", (-nll, -nll - 1), 0 if correct else 1, 0, correct, nll, 1, stop)


def scores(*, right: list[bool], **more: object) -> Scores:
    return Scores(TEMPLATE, ("a", "b"), tuple(item(i, ok) for i, ok in enumerate(right)), **more)


def pair(*, same: int, gained: int, lost: int) -> tuple[Scores, Scores]:
    """Candidate and reference with so many items right in both, gained and lost."""
    candidate = [True] * same + [True] * gained + [False] * lost
    reference = [True] * same + [False] * gained + [True] * lost
    return scores(right=candidate), scores(right=reference)


def judge_pair(rule: Gate, candidate: Scores, reference: Scores) -> Verdict:
    return judge({"gate": rule}, candidate, {"production": reference})


@pytest.mark.parametrize(
    ("counts", "test", "margin", "outcome"),
    [
        ((400, 60, 10), "superiority", 0.0, "pass"),
        ((400, 60, 10), "superiority", 0.2, "fail"),
        ((400, 12, 10), "superiority", 0.0, "inconclusive"),
        ((900, 20, 20), "non-inferiority", 0.03, "pass"),
        ((100, 5, 5), "non-inferiority", 0.01, "inconclusive"),
        ((400, 5, 60), "non-inferiority", 0.03, "fail"),
        ((900, 20, 20), "equivalence", 0.03, "pass"),
        ((400, 60, 5), "equivalence", 0.03, "fail"),
        ((400, 5, 60), "equivalence", 0.03, "fail"),
        ((100, 5, 5), "equivalence", 0.01, "inconclusive"),
    ],
)
def test_accuracy_gates(counts: tuple[int, int, int], test: str, margin: float, outcome: str) -> None:
    candidate, reference = pair(same=counts[0], gained=counts[1], lost=counts[2])
    verdict = judge_pair(ACCURACY.replace(test=test, margin=margin), candidate, reference)
    assert verdict.outcome == outcome
    assert verdict.gates[0].num_items == sum(counts)


def test_the_result_holds_the_numbers_that_decided() -> None:
    candidate, reference = pair(same=400, gained=60, lost=10)
    gate = judge_pair(ACCURACY.replace(test="superiority", margin=0.0), candidate, reference).gates[0]
    assert gate.candidate == pytest.approx(460 / 470)
    assert gate.reference == pytest.approx(410 / 470)
    assert gate.difference == pytest.approx(50 / 470)
    assert gate.interval is not None
    assert 0 < gate.interval[0] < 50 / 470 < gate.interval[1]
    assert gate.p_value is not None
    assert gate.p_value < 1e-6
    assert gate.line == "accuracy 0.979 against 0.872 (production): +0.106 [+0.079, +0.136]"
    assert "the smallest effect that they show is 0.0" in gate.reason


def test_lower_is_better_turns_the_comparison_around() -> None:
    candidate, reference = pair(same=400, gained=60, lost=10)
    rule = ACCURACY.replace(direction="lower", test="superiority", margin=0.0)
    assert judge_pair(rule, candidate, reference).outcome == "fail"
    assert judge_pair(rule, reference, candidate).outcome == "pass"


def nll_scores(values: np.ndarray, tokens: np.ndarray) -> Scores:
    return Scores(
        TEMPLATE,
        documents=tuple(
            DocumentScore(f"d{i:04}", float(v), int(t)) for i, (v, t) in enumerate(zip(values, tokens, strict=True))
        ),
    )


@pytest.mark.parametrize(("shift", "outcome"), [(-0.02, "pass"), (0.0, "pass"), (0.05, "inconclusive"), (0.5, "fail")])
def test_forgetting_is_judged_by_document_and_token(shift: float, outcome: str) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 200, 150)
    base = rng.normal(3.0, 0.5, 150) * tokens
    noise = rng.normal(0, 0.05, 150)
    noise -= noise @ tokens / tokens.sum()
    candidate = base + (shift + noise) * tokens
    rule = gate_section("forgetting_nll", "lower", "non-inferiority", margin=0.05, against="base")
    verdict = judge({"forgetting": rule}, nll_scores(candidate, tokens), {"base": nll_scores(base, tokens)})
    assert verdict.outcome == outcome
    gate = verdict.gates[0]
    assert gate.difference == pytest.approx((candidate.sum() - base.sum()) / tokens.sum())
    assert gate.method == "bootstrap-t"


@pytest.mark.parametrize(("stops", "outcome"), [(300, "pass"), (290, "inconclusive"), (200, "fail")])
def test_stop_rate_is_held_against_a_limit(stops: int, outcome: str) -> None:
    answers = tuple(AnswerScore(f"q{i}", "x", 0.0, 0.0, 0.0, 3, i < stops) for i in range(300))
    rule = gate_section("stop_rate", "higher", "limit", limit=0.97)
    verdict = judge({"stop": rule}, Scores(TEMPLATE, answers=answers), {})
    assert verdict.outcome == outcome
    assert "at least 0.97" in verdict.gates[0].reason


def test_an_nll_limit_uses_the_candidate_alone() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 200, 150)
    candidate = nll_scores(rng.normal(3.0, 0.5, 150) * tokens, tokens)
    for limit, outcome in ((3.5, "pass"), (2.5, "fail"), (3.0, "inconclusive")):
        rule = gate_section("forgetting_nll", "lower", "limit", limit=limit)
        gate = judge({"g": rule}, candidate, {}).gates[0]
        assert gate.outcome == outcome
        assert gate.interval is not None
        assert gate.interval[0] < gate.candidate < gate.interval[1]


@pytest.mark.parametrize(
    ("rule", "outcome"),
    [
        (gate_section("package_bytes", "lower", "limit", limit=2000.0), "pass"),
        (gate_section("package_bytes", "lower", "limit", limit=1000.0), "pass"),
        (gate_section("package_bytes", "lower", "limit", limit=900.0), "fail"),
        (gate_section("package_bytes", "lower", "non-inferiority", margin=200.0, against="production"), "pass"),
        (gate_section("package_bytes", "lower", "non-inferiority", margin=100.0, against="production"), "fail"),
        (gate_section("package_bytes", "higher", "superiority", margin=100.0, against="production"), "pass"),
        (gate_section("package_bytes", "lower", "equivalence", margin=100.0, against="production"), "fail"),
    ],
)
def test_measured_numbers_are_compared_without_statistics(rule: Gate, outcome: str) -> None:
    candidate, reference = (scores(right=[True], numbers={"package_bytes": size}) for size in (1000.0, 800.0))
    verdict = judge_pair(rule, candidate, reference)
    assert verdict.outcome == outcome
    assert verdict.gates[0].p_value is None


def test_fewer_items_than_asked_are_inconclusive_and_say_how_many_more() -> None:
    candidate, reference = pair(same=10, gained=30, lost=0)
    gate = judge_pair(ACCURACY.replace(min_items=100), candidate, reference).gates[0]
    assert gate.outcome == "inconclusive"
    assert gate.more_items == 60
    assert "asks for 100 items: 60 more" in gate.reason


def test_the_items_that_an_inconclusive_gate_asks_for_decide_it() -> None:
    candidate, reference = pair(same=200, gained=20, lost=15)
    rule = ACCURACY.replace(test="superiority", margin=0.0)
    gate = judge_pair(rule, candidate, reference).gates[0]
    assert gate.outcome == "inconclusive"
    assert gate.more_items is not None
    factor = (gate.num_items + gate.more_items) / gate.num_items
    larger = pair(same=round(200 * factor), gained=round(20 * factor), lost=round(15 * factor))
    assert judge_pair(rule, *larger).outcome == "pass"
    assert f"about {gate.more_items} more items" in gate.reason


@pytest.mark.parametrize(
    ("rule", "same", "lost", "outcome"),
    [
        (ACCURACY.replace(margin=0.02), 100, 0, "pass"),
        (ACCURACY.replace(margin=0.005), 100, 0, "pass"),
        (ACCURACY.replace(margin=0.02, alpha=0.01), 120, 0, "pass"),
        (ACCURACY.replace(test="equivalence", margin=0.02), 100, 0, "pass"),
        (ACCURACY.replace(test="superiority", margin=0.02), 100, 0, "fail"),
        (gate_section("accuracy", "higher", "limit", limit=0.99), 100, 0, "pass"),
        (gate_section("accuracy", "higher", "limit", limit=0.97), 150, 2, "pass"),
    ],
)
def test_where_hardly_anything_differs_the_items_asked_for_are_those_of_the_test(
    rule: Gate, same: int, lost: int, outcome: str
) -> None:
    gate = judge_pair(rule, *pair(same=same, gained=0, lost=lost)).gates[0]
    assert gate.outcome == "inconclusive"
    assert gate.more_items is not None
    factor = (gate.num_items + gate.more_items) / gate.num_items
    assert judge_pair(rule, *pair(same=round(same * factor), gained=0, lost=round(lost * factor))).outcome == outcome
    if not lost:
        few = round(same * 0.96 * factor)
        assert judge_pair(rule, *pair(same=few, gained=0, lost=0)).outcome == "inconclusive"


def test_models_that_agree_on_every_item_still_have_a_smallest_effect() -> None:
    candidate, reference = pair(same=200, gained=0, lost=0)
    gate = judge_pair(ACCURACY, candidate, reference).gates[0]
    # 200 items without a loss exclude a loss rate of 1.5 %, and no smaller one, at 5 %.
    assert gate.smallest_effect == pytest.approx(1 - 0.05 ** (1 / 200))
    strict = judge_pair(ACCURACY.replace(alpha=0.01), candidate, reference).gates[0]
    assert strict.smallest_effect == pytest.approx(1 - 0.01 ** (1 / 200))


@pytest.mark.parametrize(("gained", "lost"), [(60, 5), (5, 60)])
def test_an_equivalence_is_broken_on_either_side_so_that_its_p_value_counts_both(gained: int, lost: int) -> None:
    gate = judge_pair(ACCURACY.replace(test="equivalence", margin=0.03), *pair(same=400, gained=gained, lost=lost))
    one_side = difference_p_value(PairedCounts(400, 60, 5, 0), 0.03)[0]
    assert gate.gates[0].p_broken == pytest.approx(2 * one_side)


def test_a_difference_on_the_bound_is_never_decided() -> None:
    candidate, reference = pair(same=180, gained=10, lost=10)
    gate = judge_pair(ACCURACY.replace(test="superiority", margin=0.0), candidate, reference).gates[0]
    assert gate.outcome == "inconclusive"
    assert gate.more_items is None
    assert "no number of items decides it" in gate.reason


def test_a_gate_passes_at_its_own_alpha_however_many_stand_beside_it() -> None:
    candidate, reference = pair(same=400, gained=22, lost=11)
    rule = ACCURACY.replace(test="superiority", margin=0.0)
    alone = judge_pair(rule, candidate, reference).gates[0]
    assert alone.outcome == "pass"
    assert alone.p_value is not None
    assert 0.01 < alone.p_value < 0.05
    rules = {f"{index}": rule for index in range(10)}
    verdict = judge(rules, candidate, {"production": reference})
    assert verdict.outcome == "pass"
    assert {gate.p_value for gate in verdict.gates} == {alone.p_value}
    assert {gate.reason for gate in verdict.gates} == {alone.reason}
    assert {gate.smallest_effect for gate in verdict.gates} == {alone.smallest_effect}


def test_of_several_gates_each_fails_only_by_what_the_family_shows() -> None:
    candidate, reference = pair(same=400, gained=11, lost=22)
    rule = ACCURACY.replace(test="superiority", margin=0.0)
    alone = judge_pair(rule, candidate, reference).gates[0]
    assert alone.outcome == "fail"
    assert alone.p_broken is not None
    assert alone.adjusted_p_broken == alone.p_broken
    assert "after Holm" not in alone.reason
    both = judge({"a": rule, "b": rule}, candidate, {"production": reference})
    assert both.outcome == "inconclusive"
    assert both.gates[0].adjusted_p_broken == pytest.approx(2 * alone.p_broken)
    assert both.gates[0].more_items is not None
    candidate, reference = pair(same=4000, gained=110, lost=220)
    more = judge({"a": rule, "b": rule}, candidate, {"production": reference})
    assert more.outcome == "fail"
    assert "after Holm" in more.gates[0].reason


def test_each_gate_has_the_alpha_that_it_names() -> None:
    candidate, reference = pair(same=400, gained=22, lost=11)
    rule = ACCURACY.replace(test="superiority", margin=0.0)
    verdict = judge({"a": rule, "b": rule.replace(alpha=0.01)}, candidate, {"production": reference})
    assert [gate.outcome for gate in verdict.gates] == ["pass", "inconclusive"]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (ACCURACY.replace(against="v7"), "no scores of 'v7'.*there is production"),
        (ACCURACY.replace(metric="forgetting_nll"), "forgetting_nll was not measured"),
        (ACCURACY.replace(metric="latency_seconds"), "latency_seconds was not measured for the candidate"),
        (ACCURACY.replace(metric="package_bytes"), "package_bytes was not measured for the production"),
    ],
)
def test_a_gate_that_could_not_run_fails(rule: Gate, message: str) -> None:
    candidate, reference = pair(same=400, gained=22, lost=11)
    candidate = replace(candidate, numbers={"package_bytes": 1.0})
    verdict = judge({"good": ACCURACY, "broken": rule}, candidate, {"production": reference})
    assert verdict.outcome == "fail"
    good, broken = verdict.gates
    assert good.outcome == "pass"
    assert good.adjusted_p_broken == good.p_broken
    assert broken.outcome == "fail"
    assert broken.reason.startswith("could not run: ")
    assert re.search(message, broken.reason)


def test_other_items_or_another_template_fail_with_both_digests_named() -> None:
    candidate, reference = pair(same=400, gained=22, lost=11)
    fewer = replace(reference, items=reference.items[:-1])
    reason = judge_pair(ACCURACY, candidate, fewer).gates[0].reason
    assert str(candidate.item_set("items")) in reason
    assert str(fewer.item_set("items")) in reason
    other = replace(reference, template=of_json("none"))
    reason = judge_pair(ACCURACY, candidate, other).gates[0].reason
    assert str(TEMPLATE) in reason
    assert str(other.template) in reason


def test_order_of_items_does_not_matter() -> None:
    candidate, reference = pair(same=400, gained=22, lost=11)
    shuffled = replace(reference, items=tuple(random.Random(0).sample(reference.items, len(reference.items))))
    assert judge_pair(ACCURACY, candidate, shuffled) == judge_pair(ACCURACY, candidate, reference)


def test_stops_that_were_not_measured_fail_the_gate() -> None:
    candidate, reference = pair(same=400, gained=0, lost=0)
    candidate = replace(candidate, items=(replace(candidate.items[0], stop=None), *candidate.items[1:]))
    rule = ACCURACY.replace(metric="option_stop_rate")
    assert "1 of 400 items have none, such as i00000" in judge_pair(rule, candidate, reference).gates[0].reason


def test_no_gates_are_refused() -> None:
    with pytest.raises(EvaluationError, match="no gates"):
        judge({}, scores(right=[True]), {})


@pytest.mark.parametrize(
    "changes",
    [
        {"margin": -0.1},
        {"margin": float("nan")},
        {"alpha": 0.5},
        {"alpha": 0.0},
        {"test": "better"},
        {"direction": "up"},
        {"min_items": 0},
    ],
)
def test_a_gate_with_a_value_that_says_nothing_cannot_be_made(changes: dict[str, object]) -> None:
    (key,) = changes
    with pytest.raises(ValueError, match=f"1 validation error for Gate\n{key}\n"):
        ACCURACY.replace(**changes)


LIMIT = gate_section("accuracy", "higher", "limit", limit=0.5)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (ACCURACY.replace(test="equivalence", margin=0.0), "margin: given 0; expected more than 0"),
        (ACCURACY.replace(against=None), "against: missing"),
        (gate_section("accuracy", "higher", "limit"), "limit: missing; test limit needs"),
    ],
)
def test_a_gate_whose_test_lacks_what_it_needs_is_refused_as_in_pipelines_yaml(rule: Gate, message: str) -> None:
    candidate, reference = pair(same=400, gained=22, lost=11)
    with pytest.raises(EvaluationError, match=f"gate 'b': {message}"):
        judge({"a": LIMIT, "b": rule}, candidate, {"production": reference})
