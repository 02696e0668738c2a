"""A candidate against the anchor: judged by the gates' own tests, and better only where that is shown."""

from dataclasses import replace

import pytest

from graftline.digest import of_bytes, of_json
from graftline.evaluate.anchor import MOVE_ALPHA, compare_with_anchor
from graftline.evaluate.gate_rules import GuardRule, with_anchor
from graftline.evaluate.gates import judge
from graftline.evaluate.scores import AnswerScore, ItemScore, Scores, with_stand_ins
from graftline.evaluate.verdict import (
    AnchorResult,
    ScoredInputs,
    ScoredRelease,
    Verdict,
    verdict_from_dict,
    verdict_to_dict,
)
from graftline.settings.gate_metrics import ANCHOR, anchor_gates
from graftline.settings.model import Gate

ACCURACY = Gate(
    metric="accuracy", direction="higher", test="non-inferiority", margin=0.05, min_items=100, against="production"
)
STOPS = ACCURACY.replace(metric="option_stop_rate")
RULES = with_anchor({"accuracy": ACCURACY})
DIGEST = of_bytes(b"any")
SCORED = ScoredInputs(
    base=DIGEST,
    base_files=DIGEST,
    tokenizer=DIGEST,
    adapter=DIGEST,
    rows=DIGEST,
    texts=DIGEST,
    release=ScoredRelease("v1", of_bytes(b"v1")),
)


def scores(num_right: int, *, num_stops: int = 400, count: int = 400) -> Scores:
    items = (
        ItemScore(f"{i:04}", (-1.0, -2.0), int(i >= num_right), 0, i < num_right, 1.0, 1, i < num_stops)
        for i in range(count)
    )
    return Scores(template=of_json("none"), labels=("a", "b"), items=tuple(items), scored=SCORED)


def compared(candidate: Scores, anchor: Scores, rules: dict[str, Gate] = RULES) -> AnchorResult:
    found = compare_with_anchor(rules, candidate, anchor)
    assert found is not None
    return found


def test_every_gate_that_shows_not_worse_than_production_shows_the_same_against_the_anchor() -> None:
    gates = {
        "accuracy": ACCURACY,
        "near": STOPS.replace(test="equivalence"),
        "gain": ACCURACY.replace(test="superiority", against="base"),
        "guarded": GuardRule(guard="stops", **STOPS.model_dump()),
    }
    added = {name: rule for name, rule in with_anchor(gates).items() if name not in gates}
    assert added == {
        "anchor: accuracy": ACCURACY.replace(against=ANCHOR),
        # A candidate that is better than the anchor by more than the margin is welcome.
        "anchor: near": STOPS.replace(against=ANCHOR),
    }
    own = ACCURACY.replace(against=ANCHOR, margin=0.2)
    assert anchor_gates({"accuracy": ACCURACY, "mine": own}) == {}
    # One on a slice says nothing about the other rows.
    german = own.replace(slice={"language": "de"})
    assert list(anchor_gates({"accuracy": ACCURACY, "mine": german})) == ["anchor: accuracy"]


def test_small_losses_that_pass_against_production_are_stopped_by_the_anchor() -> None:
    production, anchor, candidate = scores(372), scores(388), scores(368)
    references = with_stand_ins({"base": scores(0), "production": production, ANCHOR: anchor})
    outcomes = {gate.name: gate.outcome for gate in judge(RULES, candidate, references).gates}
    assert outcomes == {"accuracy": "pass", "anchor: accuracy": "inconclusive"}


@pytest.mark.parametrize(("gained", "is_better"), [(0, False), (6, False), (7, True), (40, True)])
def test_better_is_what_superiority_shows_at_one_in_a_hundred(gained: int, is_better: bool) -> None:
    """By McNemar's exact test: 0.5^6 = 0.016, 0.5^7 = 0.008."""
    found = compared(scores(300 + gained), scores(300))
    assert (found.version, found.release, found.is_better) == ("v1", of_bytes(b"v1"), is_better)
    assert f"asked: at most {MOVE_ALPHA:g}" in found.evidence


def test_what_is_better_on_one_metric_and_worse_on_another_moves_nothing() -> None:
    rules = with_anchor({"accuracy": ACCURACY, "stops": STOPS})
    assert compared(scores(340), scores(300), rules).is_better
    assert not compared(scores(340, num_stops=399), scores(300), rules).is_better
    # Two metrics are two chances: each has half of the alpha.
    assert not compared(scores(307), scores(300), rules).is_better
    assert compared(scores(308), scores(300), rules).is_better


def test_all_rows_count_beside_a_gate_on_a_slice_of_the_same_metric() -> None:
    """The candidate gains 30 German rows and loses 40 others."""
    slices = {"language": {f"{i:04}": "de" if i < 200 else "en" for i in range(400)}}
    rules = with_anchor({"accuracy": ACCURACY, "german": ACCURACY.replace(slice={"language": "de"})})

    def right(german: int, others: int) -> Scores:
        items = scores(400).items
        wrong = {*range(german, 200), *range(200 + others, 400)}
        changed = (
            replace(item, chosen=1, correct=False) if number in wrong else item for number, item in enumerate(items)
        )
        return replace(scores(400), items=tuple(changed))

    found = compare_with_anchor(rules, right(180, 100), right(150, 140), slices=slices)
    assert found is not None
    assert not found.is_better
    assert "accuracy -0.025 on 400 items" in found.evidence
    assert "accuracy where language = de +0.15 on 200 items" in found.evidence
    more = compare_with_anchor(rules, right(180, 140), right(150, 140), slices=slices)
    assert more is not None
    assert more.is_better


def answered(num_good: int, metric: str, **numbers: float) -> Scores:
    answers = (AnswerScore(f"{i:04}", "", 1.0, 1.0, 1.0, 1, True, {metric: float(i < num_good)}) for i in range(400))
    measured_by = {metric: "the same file"}
    return replace(scores(400), answers=tuple(answers), measured_by=measured_by, numbers=numbers)


def test_a_metric_of_a_projects_own_moves_the_anchor_as_every_other() -> None:
    rules = with_anchor({"polite": ACCURACY.replace(metric="polite")})
    assert compared(answered(340, "polite"), answered(300, "polite"), rules).is_better
    assert not compared(answered(300, "polite"), answered(300, "polite"), rules).is_better


@pytest.mark.parametrize("agreement", [0.5, 0.8])
def test_a_judge_moves_the_anchor_only_where_people_are_shown_to_agree(agreement: float) -> None:
    rules = with_anchor({"judge": ACCURACY.replace(metric="judge")})
    told = {"judge_agreement": agreement, "judge_agreement_low": agreement, "judge_agreement_asked": 0.7}
    assert compared(answered(340, "judge", **told), answered(300, "judge"), rules).is_better == (agreement > 0.7)


def test_fewer_items_than_the_gate_asks_for_move_nothing() -> None:
    assert not compared(scores(99, num_stops=0, count=99), scores(40, count=99)).is_better
    assert compared(scores(100, num_stops=0, count=100), scores(40, count=100)).is_better


def test_without_a_gate_or_a_release_there_is_nothing_to_compare() -> None:
    assert compare_with_anchor({"accuracy": ACCURACY}, scores(300), scores(300)) is None
    latency = ACCURACY.replace(metric="seconds_per_item", against="anchor")
    measured = compare_with_anchor({"anchor: latency": latency}, scores(300), scores(300))
    assert measured is not None
    assert not measured.is_better
    assert measured.evidence == "no gate on items compares with it, so it stays"
    assert compare_with_anchor(RULES, scores(300), replace(scores(300), scored=None)) is None


def test_a_verdict_keeps_the_anchor_and_one_without_is_written_as_before() -> None:
    gates = judge({"accuracy": ACCURACY}, scores(300), {"production": scores(300)}).gates
    anchored = Verdict(gates[0].outcome, gates, anchor=compared(scores(340), scores(300)))
    assert verdict_from_dict(verdict_to_dict(anchored)) == anchored
    assert "anchor" not in verdict_to_dict(replace(anchored, anchor=None))


def test_without_an_anchor_production_stands_in_and_without_production_the_base() -> None:
    base, production = scores(1), scores(2)
    assert with_stand_ins({"base": base})[ANCHOR] is base
    assert with_stand_ins({"base": base, "production": production})[ANCHOR] is production
