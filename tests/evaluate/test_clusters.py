"""Rows that belong together: gates count a cluster as one draw, and say what that costs."""

import re
from dataclasses import replace

import numpy as np
import pytest

from graftline.evaluate.gates import judge
from graftline.evaluate.scores import AnswerScore, Scores
from graftline.evaluate.verdict import GateResult, verdict_from_dict, verdict_markdown, verdict_to_dict
from graftline.settings.model import Gate
from tests.evaluate.test_gates import ACCURACY, item, scores

SUPERIOR = ACCURACY.replace(test="superiority", margin=0.0)
LIMIT = Gate(metric="accuracy", direction="higher", test="limit", limit=0.5, min_items=1)


def clustered(num_clusters: int, size: int, gained: int) -> tuple[Scores, Scores, dict[str, str]]:
    """Candidate and reference of which whole clusters are gained or lost, ``gained`` of them gained."""
    ours = [cluster < gained for cluster in range(num_clusters) for _ in range(size)]
    theirs = [not right for right in ours]
    names = {item(index, True).item_id: f"user {index // size}" for index in range(num_clusters * size)}
    return scores(right=ours), scores(right=theirs), names


def decided(rule: Gate, ours: Scores, theirs: Scores, clusters: dict[str, str]) -> GateResult:
    return judge({"gate": rule}, ours, {"production": theirs}, clusters=clusters).gates[0]


def test_ten_times_the_same_row_shows_no_more_than_once() -> None:
    ours, theirs, names = clustered(40, 10, 24)
    assert decided(SUPERIOR, ours, theirs, {}).outcome == "pass"
    gate = decided(SUPERIOR, ours, theirs, names)
    assert gate.outcome == "inconclusive"
    assert (gate.num_items, gate.num_clusters) == (400, 40)
    # Kish: 1 + (size - 1) times the correlation within a cluster, which is 1 here.
    assert gate.design_effect == pytest.approx(10, rel=0.03)
    once = clustered(40, 1, 24)
    alone = decided(SUPERIOR.replace(min_items=1), once[0], once[1], {})
    assert gate.p_value == pytest.approx(alone.p_value, abs=0.05)
    assert gate.method == "bootstrap-t by cluster"
    assert "400 items in 40 clusters (design effect 10." in gate.reason


def test_more_items_are_counted_with_the_design_effect() -> None:
    ours, theirs, names = clustered(40, 10, 24)
    gate = decided(SUPERIOR, ours, theirs, names)
    # (1.645 + 0.842)^2 0.96 / 0.2^2 clusters of ten.
    assert gate.more_items == pytest.approx(1484 * 40 / 39 - 400, rel=0.03)


def test_independent_rows_have_a_design_effect_of_about_one() -> None:
    rng = np.random.default_rng(0)
    ours = scores(right=list(rng.random(2000) < 0.7))
    theirs = scores(right=list(rng.random(2000) < 0.6))
    names = {one.item_id: str(index % 400) for index, one in enumerate(ours.items)}
    gate = decided(SUPERIOR, ours, theirs, names)
    assert gate.design_effect == pytest.approx(1, abs=0.25)
    assert gate.outcome == "pass"


def test_limits_are_held_against_by_cluster_too() -> None:
    ours, theirs, names = clustered(40, 10, 24)
    assert decided(LIMIT, ours, theirs, {}).outcome == "pass"
    gate = decided(LIMIT, ours, theirs, names)
    assert gate.outcome == "inconclusive"
    assert gate.interval is not None
    assert gate.interval[0] < 0.5 < 0.6 < gate.interval[1]


def test_clusters_of_one_row_each_change_nothing() -> None:
    ours, theirs, _ = clustered(400, 1, 240)
    names = {one.item_id: one.item_id for one in ours.items}
    assert decided(SUPERIOR, ours, theirs, names) == decided(SUPERIOR, ours, theirs, {})


@pytest.mark.parametrize(("num_clusters", "outcome"), [(19, "inconclusive"), (20, "pass")])
def test_fewer_than_twenty_clusters_decide_nothing(num_clusters: int, outcome: str) -> None:
    ours, theirs, names = clustered(num_clusters, 20, num_clusters - 1)
    gate = decided(SUPERIOR, ours, theirs, names)
    assert gate.outcome == outcome
    assert ("fewer than 20 clusters decide nothing" in gate.reason) == (outcome == "inconclusive")


def test_one_cluster_alone_cannot_be_judged() -> None:
    ours, theirs, names = clustered(1, 200, 1)
    gate = decided(SUPERIOR, ours, theirs, names)
    # All rows are of one value: there is nothing to draw from.
    assert gate.outcome == "fail"
    assert gate.reason.startswith("could not run: 1 items or clusters")


def test_an_item_without_a_cluster_is_named() -> None:
    ours, theirs, names = clustered(40, 10, 24)
    del names["i00007"]
    gate = decided(SUPERIOR, ours, theirs, names)
    assert gate.outcome == "fail"
    assert re.search("could not run: 1 of 400 items have no cluster, such as i00007", gate.reason)


def test_the_verdict_shows_and_keeps_clusters_and_design_effect() -> None:
    ours, theirs, names = clustered(40, 10, 24)
    verdict = judge({"gate": SUPERIOR}, ours, {"production": theirs}, clusters=names)
    assert verdict_from_dict(verdict_to_dict(verdict)) == verdict
    assert "| 400 in 40 clusters, design effect 10." in verdict_markdown(verdict)


def test_false_promotion_of_clustered_rows_stays_at_alpha_where_rows_alone_err_often() -> None:
    rng = np.random.default_rng(1)
    found: dict[str, list[bool]] = {"by cluster": [], "by row": []}
    for _ in range(200):
        kinds = np.repeat(rng.choice(3, 60, p=[0.15, 0.15, 0.7]), 5)
        ours, theirs = scores(right=list(kinds != 1)), scores(right=list(kinds != 0))
        names = {one.item_id: str(index // 5) for index, one in enumerate(ours.items)}
        for name, given in (("by cluster", names), ("by row", {})):
            found[name].append(decided(SUPERIOR, ours, theirs, given).outcome == "pass")
    shares = {name: float(np.mean(passed)) for name, passed in found.items()}
    # Of 200 true 0.05s, more than 0.105 is one in a thousand.
    assert shares["by cluster"] <= 0.105
    assert shares["by row"] > 0.12


@pytest.mark.parametrize(("test", "bound"), [("limit", {"limit": 0.97}), ("non-inferiority", {"margin": 0.03})])
def test_clusters_that_hardly_differ_show_no_more_than_so_many_rows_would(test: str, bound: dict[str, float]) -> None:
    """Without a difference a bootstrap has no spread: 25 clusters, all right, would show any limit."""
    given: dict[str, object] = {"against": None if test == "limit" else "production", "min_items": 1, **bound}
    rule = Gate.model_validate({"metric": "accuracy", "direction": "higher", "test": test, **given})

    def all_right(num_clusters: int) -> GateResult:
        rows = scores(right=[True] * (4 * num_clusters))
        return decided(rule, rows, rows, {one.item_id: str(i // 4) for i, one in enumerate(rows.items)})

    gate = all_right(25)
    assert gate.outcome == "inconclusive"
    assert gate.p_value == pytest.approx(0.97**25)
    assert gate.more_items == pytest.approx(4 * 99 - 100, rel=0.05)  # 0.97^99 < 0.05 < 0.97^98
    assert all_right(98).outcome == "inconclusive"
    assert all_right(99).outcome == "pass"


def test_one_cluster_that_is_better_shows_no_superiority() -> None:
    rows = [False] * 5 + [True] * 195
    theirs, ours = scores(right=rows), scores(right=[True] * 200)
    gate = decided(SUPERIOR, ours, theirs, {one.item_id: str(i // 5) for i, one in enumerate(ours.items)})
    assert (gate.outcome, gate.p_value) == ("inconclusive", pytest.approx(0.5))


def test_answers_that_are_all_alike_show_no_more_than_their_number_would() -> None:
    rule = Gate(metric="f1", direction="higher", test="non-inferiority", margin=0.02, against="production")
    rows = tuple(AnswerScore(f"{i}", "x", 1.0, 1.0, 1.0, 1, stop=True) for i in range(149))
    few, enough = (replace(scores(right=[True]), answers=rows[:count]) for count in (148, 149))
    assert decided(rule, few, few, {}).outcome == "inconclusive"
    assert decided(rule, few, few, {}).more_items == pytest.approx(1, abs=3)
    assert decided(rule, enough, enough, {}).outcome == "pass"  # 0.98^149 < 0.05 < 0.98^148
