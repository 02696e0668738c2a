"""Rows by the values of a column: shown each with its interval, and judged where a gate names one."""

from dataclasses import replace

import pytest

from graftline.digest import of_json
from graftline.evaluate.gates import NO_CLUSTERS, by_slice, judge
from graftline.evaluate.scores import Scores
from graftline.evaluate.verdict import GateResult, Verdict, verdict_from_dict, verdict_markdown, verdict_to_dict
from graftline.settings.model import Gate
from graftline.workflow.against_base import compare
from tests.evaluate.test_gates import item, scores
from tests.sections import gate_section

GERMAN = gate_section(
    "accuracy", "higher", "non-inferiority", margin=0.1, against="production", slice={"language": "de"}
)
SLICES = {"language": {item(at, True).item_id: "de" if at < 150 else "fr" for at in range(390)}}
"""150 items de, 240 fr, ten without a language."""


def pair() -> tuple[Scores, Scores]:
    """A candidate that is better on the whole, and worse on the items in German."""
    ours = [at >= 40 for at in range(400)]
    theirs = [at < 150 or at % 2 == 0 for at in range(400)]
    return scores(right=ours), scores(right=theirs)


def judged(rule: Gate) -> GateResult:
    ours, theirs = pair()
    return judge({"gate": rule}, ours, {"production": theirs}, slices=SLICES).gates[0]


def test_a_gate_on_a_slice_fails_where_all_rows_together_pass() -> None:
    assert judged(GERMAN.replace(slice=None)).outcome == "pass"
    gate = judged(GERMAN)
    assert (gate.outcome, gate.num_items) == ("fail", 150)
    assert gate.candidate == pytest.approx(110 / 150)
    assert gate.reference == 1.0
    assert gate.reason.startswith("accuracy where language = de 0.733 against 1.000 (production)")


def test_a_gate_on_the_other_slice_passes() -> None:
    assert judged(GERMAN.replace(slice={"language": "fr"})).outcome == "pass"


@pytest.mark.parametrize("wanted", [{"language": "it"}, {"country": "de"}])
def test_a_gate_on_a_slice_without_rows_fails(wanted: dict[str, str]) -> None:
    gate = judged(GERMAN.replace(slice=wanted))
    assert gate.outcome == "fail"
    assert gate.reason.startswith("could not run: no evaluation row has")


def test_a_gate_on_a_small_slice_decides_nothing() -> None:
    gate = judged(GERMAN.replace(min_items=151))
    assert gate.outcome == "inconclusive"
    assert "the gate asks for 151 items" in gate.reason


def test_a_slice_s_value_may_be_written_as_a_number_or_a_truth_value() -> None:
    assert GERMAN.replace(slice={"priority": 1}).slice == {"priority": "1"}
    assert GERMAN.replace(slice={"urgent": True}).slice == {"urgent": "true"}


def shown(ours: Scores, theirs: Scores, slices: dict[str, dict[str, str]]) -> Verdict:
    verdict = judge({"gate": GERMAN}, ours, {"production": theirs}, slices=slices)
    found = by_slice("accuracy", ours, theirs, against="production", clusters=NO_CLUSTERS, slices=slices)
    return Verdict(verdict.outcome, verdict.gates, (), found)


def test_every_slice_is_shown_with_its_interval() -> None:
    french, german = shown(*pair(), SLICES).slices
    assert (french.value, french.num_items, german.value, german.num_items) == ("fr", 240, "de", 150)
    assert german.difference == pytest.approx(-40 / 150)
    assert german.interval is not None
    assert german.interval[0] < -40 / 150 < german.interval[1] < 0
    assert french.decides
    assert german.decides


def test_scores_that_cannot_be_compared_show_no_slices() -> None:
    ours, theirs = pair()
    other = replace(theirs, template=of_json("another"))
    found = by_slice("accuracy", ours, other, against="production", clusters=NO_CLUSTERS, slices=SLICES)
    assert found == ()


def test_a_small_slice_says_that_it_decides_nothing() -> None:
    slices = {"kind": {item(at, True).item_id: "rare" if at < 99 else "one" for at in range(100)}}
    rare, one = shown(*pair(), slices).slices
    assert (rare.num_items, rare.decides) == (99, False)
    assert (one.num_items, one.decides) == (1, False)
    assert "| kind = rare | " in verdict_markdown(shown(*pair(), slices))
    assert "| 99: too few to decide anything |" in verdict_markdown(shown(*pair(), slices))


def test_of_many_values_the_most_frequent_are_shown() -> None:
    slices = {"user": {item(at, True).item_id: str(at % 30 if at < 300 else 7) for at in range(400)}}
    found = shown(*pair(), slices).slices
    assert len(found) == 20
    assert (found[0].value, found[0].num_items) == ("7", 110)


def test_the_verdict_keeps_its_slices() -> None:
    verdict = shown(*pair(), SLICES)
    assert verdict_from_dict(verdict_to_dict(verdict)) == verdict


def test_a_verdict_without_slices_is_written_as_before() -> None:
    ours, theirs = pair()
    plain = judge({"gate": GERMAN.replace(slice=None)}, ours, {"production": theirs})
    written = verdict_to_dict(plain)
    assert "slices" not in written
    assert "slice" not in written["gates"][0]


def test_a_pull_request_is_compared_on_the_slice_that_a_gate_names() -> None:
    ours, theirs = pair()
    rules = {"all": GERMAN.replace(slice=None), "german": GERMAN}
    everywhere, german = compare(rules, ours, theirs, equal=False, slices=SLICES).gates
    assert (everywhere.outcome, everywhere.num_items) == ("pass", 400)
    assert (german.outcome, german.num_items) == ("fail", 150)
    equal = compare(rules, ours, ours, equal=True, slices=SLICES).gates
    assert [gate.candidate for gate in equal] == pytest.approx([0.9, 110 / 150])
