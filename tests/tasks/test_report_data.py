"""Gates of every kind of test find their place on the run's page."""

from datetime import UTC, datetime
from typing import Any

import pytest

from graftline.digest import of_bytes
from graftline.evaluate.gate_rules import GateRule
from graftline.evaluate.gates import judge
from graftline.evaluate.scores import ItemScore, Scores
from graftline.evaluate.verdict import verdict_to_dict
from graftline.release.report import render_report
from graftline.release.report_data import ReportData
from tasks.report_data import _gate

RULES = {
    "limit": GateRule("option_stop_rate", "higher", "limit", limit=0.8),
    "superiority": GateRule("accuracy", "higher", "superiority", margin=0.1, against="base"),
    "non-inferiority": GateRule("accuracy", "higher", "non-inferiority", margin=0.02, against="base"),
}
THRESHOLDS = {"limit": 0.0, "superiority": 0.1, "non-inferiority": -0.02}


def scores(num_right: int) -> Scores:
    items = [
        ItemScore(f"{i:03}", (-1.0, -2.0), 0 if i < num_right else 1, 0, i < num_right, 1.0, 1, stop=i < 190)
        for i in range(200)
    ]
    return Scores(template=of_bytes(b"template"), labels=("a", "b"), items=tuple(items))


def verdict() -> dict[str, Any]:
    return verdict_to_dict(judge(RULES, scores(180), {"base": scores(100)}))


@pytest.mark.parametrize("gate", verdict()["gates"], ids=lambda gate: gate["name"])
def test_the_interval_lies_beyond_the_threshold_of_a_gate_that_passes(gate: dict[str, Any]) -> None:
    shown = _gate(gate)
    assert shown.threshold == THRESHOLDS[shown.name]
    assert shown.outcome == "pass"
    assert shown.threshold < shown.low < shown.difference < shown.high


def test_the_page_takes_all_of_them() -> None:
    gates = tuple(_gate(gate) for gate in verdict()["gates"])
    page = render_report(ReportData(pipeline="demo", created=datetime.now(UTC), outcome="pass", gates=gates))
    assert all(name in page for name in RULES)
