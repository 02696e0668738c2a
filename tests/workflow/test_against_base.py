"""The head against its base revision, by the base revision's gates, on scores made by hand."""

from dataclasses import replace
from typing import Any

import pytest

from graftline.digest import of_bytes
from graftline.evaluate.gate_rules import GuardRule
from graftline.evaluate.scores import ItemScore, Scores
from graftline.evaluate.verdict import GateResult, Verdict
from graftline.settings.model import Gate
from graftline.workflow.against_base import EQUAL, compare, decided, explain, is_worse
from tests.sections import gate_section

ACCURACY = gate_section("accuracy", "higher", "non-inferiority", margin=0.05, against="production")
GAIN = gate_section("accuracy", "higher", "superiority", margin=0.3, against="base")
NLL = gate_section("nll", "lower", "non-inferiority", margin=1.0, against="production")
STOPS = gate_section("option_stop_rate", "higher", "limit", limit=0.9)
LEAKS = gate_section("leaked_rows", "lower", "limit", limit=0)


def scores(
    right: int = 89, *, rows: int = 100, lost: int = 0, nll: float = 0.32, stops: int = 100, leaked: float = 0
) -> Scores:
    """``right`` of the rows are answered right, ``lost`` of those that another model has right are not among them."""
    correct = [lost <= i < right + lost for i in range(rows)]
    items = tuple(
        ItemScore(f"{i:04}", (-1.0, -2.0), int(not hit), 0, hit, nll + 0.01 * (i % 7), 1, stop=i < stops * rows // 100)
        for i, hit in enumerate(correct)
    )
    return Scores(template=of_bytes(b"none"), labels=("a", "b"), items=items, numbers={"leaked_rows": leaked})


def guard_rule(guard: str, *said: Any, **given: Any) -> GuardRule:
    return GuardRule(guard=guard, **gate_section(*said, min_items=1, **given).model_dump())


def judge(head: Scores, base: Scores | None, *, equal: bool = False, **rules: Gate) -> Verdict:
    return compare(rules, head, base, equal=equal)


def measured(interval: tuple[float, float], *, difference: float, margin: float = 0.05) -> GateResult:
    return GateResult(
        name="accuracy",
        outcome="inconclusive",
        reason="",
        metric="accuracy",
        test="non-inferiority",
        direction="higher",
        margin=margin,
        limit=None,
        alpha=0.05,
        against="base revision",
        min_items=100,
        num_items=100,
        candidate=0.89 + difference,
        reference=0.89,
        difference=difference,
        interval=interval,
        more_items=213,
    )


def test_a_loss_beyond_chance_that_is_not_shown_to_be_small_fails() -> None:
    """Seen in use: accuracy 0.89 before, 0.78 after."""
    gate = decided(measured((-0.182, -0.046), difference=-0.11))

    assert gate.outcome == "fail"
    assert explain(gate) == "worse by 0.11, not shown to be within the margin of 0.05"


def test_neither_worse_nor_shown_to_be_as_good_is_inconclusive_and_says_how_many_rows_decide() -> None:
    gate = decided(measured((-0.08, 0.02), difference=-0.03))

    assert gate.outcome == "inconclusive"
    assert explain(gate) == (
        "not shown to be within the margin of 0.05, nor to be worse; about 213 more rows would decide (313 in all)"
    )
    assert explain(replace(gate, more_items=None)).endswith("so no number of rows decides")


def test_shown_to_be_within_the_margin_passes_though_it_is_worse_and_says_so() -> None:
    found = judge(scores(880, rows=1000), scores(890, rows=1000), accuracy=ACCURACY)

    assert found.outcome == "pass"
    assert explain(found.gates[0]) == "worse by 0.01, within the margin of 0.05"


@pytest.mark.parametrize("direction", ["higher", "lower"])
def test_worse_follows_the_metric_s_direction(direction: str) -> None:
    gate = replace(measured((0.01, 0.05), difference=0.03), direction=direction)

    assert is_worse(gate) == (direction == "lower")


def test_a_loss_of_eleven_points_in_a_hundred_rows_fails_at_a_margin_of_five() -> None:
    found = judge(scores(78), scores(89), accuracy=ACCURACY)

    (gate,) = found.gates
    assert (found.outcome, gate.against, gate.test) == ("fail", "base revision", "non-inferiority")
    assert gate.difference == pytest.approx(-0.11)


def test_too_few_rows_for_the_gate_do_not_excuse_a_ruined_model() -> None:
    found = judge(scores(10, rows=50), scores(45, rows=50), accuracy=ACCURACY)

    assert found.outcome == "fail"


def test_answers_that_no_longer_end_or_are_no_longer_likely_fail_though_accuracy_is_the_same() -> None:
    head, base = scores(stops=0, nll=7.98), scores()

    found = judge(head, base, accuracy=ACCURACY, stops=STOPS, likelihood=NLL)

    assert {gate.name: gate.outcome for gate in found.gates} == {
        "accuracy": "pass",
        "stops": "fail",
        "likelihood": "fail",
    }


def test_a_guard_is_decided_by_its_value_and_stands_beside_a_gate_on_the_same_metric() -> None:
    guard = guard_rule("stops", "option_stop_rate", "higher", "non-inferiority", margin=0.05, against="production")
    gate = gate_section("option_stop_rate", "higher", "non-inferiority", margin=0.02, against="production")

    found = judge(scores(stops=94), scores(), gate=gate, guard=guard)

    assert [(each.margin, each.outcome) for each in found.gates] == [(0.02, "fail"), (0.05, "fail")]
    assert explain(found.gates[1]).endswith("asked: at most 0.05 below base revision")


def test_the_training_s_guard_looks_at_the_head_alone() -> None:
    against = {"margin": 0.0, "against": "training_loss_start"}
    rule = guard_rule("training", "training_loss_end", "lower", "superiority", **against)
    training = {"training_steps": 9.0, "training_losses_not_finite": 0.0, "training_loss_start": 3.0}

    def outcome(**numbers: float) -> str:
        return judge(replace(scores(), numbers=training | numbers), scores(), training=rule).outcome

    base = replace(scores(), numbers={"training_loss_end": 2.5})
    (gate,) = judge(replace(scores(), numbers=training | {"training_loss_end": 2.0}), base, training=rule).gates
    assert (gate.outcome, gate.reference, gate.difference) == ("pass", 2.5, -0.5)
    assert outcome(training_loss_end=2.0) == "pass"
    assert outcome(training_loss_end=4.0) == "fail"
    assert outcome(training_losses_not_finite=2.0) == "fail"


def test_a_gate_that_would_seldom_pass_an_equal_head_says_so_with_what_would_do() -> None:
    weak = judge(scores(90), scores(89), accuracy=ACCURACY.replace(margin=0.02))
    strong = judge(scores(90), scores(89), accuracy=ACCURACY.replace(margin=0.3))

    text = explain(weak.gates[0])
    assert "; ⚠ a candidate that is exactly as good passes this gate " in text
    assert "a margin of " in text
    assert "⚠" not in explain(strong.gates[0])


def test_a_limit_is_held_against_the_head_and_shows_what_the_base_revision_had() -> None:
    found = judge(scores(leaked=3), scores(leaked=0), leakage=LEAKS)

    (gate,) = found.gates
    assert (gate.outcome, gate.candidate, gate.reference, gate.difference) == ("fail", 3.0, 0.0, 3.0)


def test_the_smallest_margin_on_a_metric_is_what_is_tolerated() -> None:
    """A gate that asks for a gain of 0.3 tolerates no loss of 0.3."""
    loose = ACCURACY.replace(margin=0.2)

    found = judge(scores(), scores(), gain=GAIN, loose=loose, accuracy=ACCURACY)

    assert [(gate.name, gate.margin) for gate in found.gates] == [("accuracy", 0.05)]


@pytest.mark.parametrize(
    ("before", "after", "outcome"),
    [(89, 70, "fail"), (89, 88, "inconclusive"), (89, 89, "inconclusive"), (79, 99, "pass")],
)
def test_a_gain_that_is_asked_for_is_no_loss_that_is_tolerated(before: int, after: int, outcome: str) -> None:
    """Where no gate says how much worse a head may be, it must be shown not to be worse at all."""
    (gate,) = judge(scores(after), scores(before), gain=GAIN).gates

    assert (gate.outcome, gate.margin) == (outcome, 0.0)


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (replace(scores(), numbers={}), "cannot be shown: leaked_rows was not measured"),
        (replace(scores(), items=()), "cannot be shown: option_stop_rate was not measured"),
    ],
)
def test_a_metric_that_the_head_no_longer_measures_cannot_be_shown(head: Scores, reason: str) -> None:
    found = judge(head, scores(), leakage=LEAKS, stops=STOPS)

    assert found.outcome == "inconclusive"
    assert any(gate.reason.startswith(reason) for gate in found.gates)


def test_a_number_that_is_not_finite_fails() -> None:
    assert judge(replace(scores(), numbers={"leaked_rows": float("nan")}), scores(), leakage=LEAKS).outcome == "fail"


def test_other_rows_cannot_be_compared_and_do_not_pass() -> None:
    found = judge(scores(rows=101), scores(), accuracy=ACCURACY)

    assert found.outcome == "inconclusive"
    assert found.gates[0].reason.startswith("cannot be shown: the candidate was scored on items")


def test_without_a_base_revision_only_limits_are_decided() -> None:
    found = judge(scores(stops=0), None, accuracy=ACCURACY, stops=STOPS)

    assert [gate.outcome for gate in found.gates] == ["inconclusive", "fail"]


def test_equal_bytes_pass_without_a_test_even_where_no_test_could_pass() -> None:
    few = replace(scores(rows=10), numbers={"leaked_rows": 3.0})

    found = judge(few, few, equal=True, accuracy=ACCURACY.replace(margin=0.0), leakage=LEAKS)

    assert found.outcome == "pass"
    assert {explain(gate) for gate in found.gates} == {EQUAL}


def test_equal_bytes_do_not_speak_for_what_they_do_not_hold() -> None:
    """The merged model is no part of adapter and scores: package.dtype changes it alone."""
    rule = gate_section("merged_failures", "lower", "limit", limit=0)
    head = replace(scores(), numbers={"leaked_rows": 0.0, "merged_failures": 1.0})

    found = judge(head, scores(), equal=True, merged=rule, accuracy=ACCURACY)

    assert [gate.outcome for gate in found.gates] == ["fail", "pass"]
