"""Gates of every kind of test find their place on the run's page."""

import json
import random
import statistics
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from graftline.digest import of_bytes
from graftline.evaluate.gates import judge
from graftline.evaluate.scores import AnswerScore, DocumentScore, ItemScore, Scores
from graftline.evaluate.verdict import verdict_to_dict
from graftline.plan.memory import Workload, plan_memory
from graftline.plan.trace import StepShape
from graftline.release.pages.report import ReportData, render_report
from graftline.release.pages.run_page import _gate, interval, memory_parts, money
from graftline.settings.machines import Prices
from graftline.settings.model import Adapter
from tests.sections import gate_section
from tests.tiny import tiny_llama_config

RULES = {
    "limit": gate_section("option_stop_rate", "higher", "limit", limit=0.8),
    "superiority": gate_section("accuracy", "higher", "superiority", margin=0.1, against="base"),
    "non-inferiority": gate_section("accuracy", "higher", "non-inferiority", margin=0.02, against="base"),
}
SHAPE = StepShape(rows=2, tokens=32, supervised_tokens=8)
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


def test_every_metric_of_items_has_its_95_percent_interval() -> None:
    draw = random.Random(0)
    items = tuple(replace(item, nll=draw.gauss(3.0, 1.0), num_tokens=2) for item in scores(160).items)
    documents = tuple(DocumentScore(f"{i}", draw.gauss(50.0, 5.0), 20) for i in range(50))
    answers = tuple(AnswerScore(f"{i}", "a", 1.0, draw.random(), 0.5, 3, stop=i < 150) for i in range(200))
    found = replace(scores(160), items=items, documents=documents, answers=answers)
    for name, count in (("accuracy", 160), ("option_stop_rate", 190), ("stop_rate", 150), ("exact_match", 200)):
        wilson = binomtest(count, 200).proportion_ci(method="wilson")
        assert interval(name, found) == pytest.approx((wilson.low, wilson.high))
    for name, rows in (("nll", items), ("forgetting_nll", documents)):
        values = [row.nll / row.num_tokens for row in rows]
        mean, error = statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
        assert interval(name, found) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=error / 3)
    assert interval("rouge_l", replace(found, answers=())) is None
    assert interval("adapter_bytes", found) is None


def test_memory_is_shown_by_part_as_planned_and_as_measured() -> None:
    adapter = Adapter(method="lora", rank=4)
    workload = Workload(adapter=adapter, shape=SHAPE, quantization=None, optimizer="adamw", device="cpu")
    planned = plan_memory(tiny_llama_config(), workload)
    measured = {"weights": 600_000, "quantization constants": 0, "adapters": 9, "optimizer": 8, "step": 122_399_983}
    shown = memory_parts(
        {"planned": planned.document(), "measured_peak_bytes": 123_000_000, "measured_parts_bytes": measured}
    )
    assert {part.name for part in shown} >= {"weights", "adapters", "optimizer", "activations", "logits", "total"}
    assert "CUDA context" not in {part.name for part in shown}  # nothing that is zero
    found = {part.name: part.measured_bytes for part in shown if part.measured_bytes is not None}
    del measured["quantization constants"]
    assert found == {"a step's in all": measured.pop("step"), **measured, "total": 123_000_000}
    page = render_report(ReportData(pipeline="demo", created=datetime.now(UTC), outcome=None, memory=shown))
    assert "Memory in training" in page
    assert "123 MB" in page


def stages_that_took(runs: Path, *, seconds: float, **others: Any) -> Path:
    for name in ("fetch", "validate", "init", "train", "evaluate", "merge", "gate"):
        (runs / name).mkdir(parents=True)
        cost = {"seconds": seconds, "peak_rss_mb": 100, **others}
        (runs / name / "stage.json").write_text(json.dumps(cost), encoding="utf-8")
    return runs


def test_the_cost_in_money_is_the_gpus_hours_and_the_energy_of_all_stages(tmp_path: Path) -> None:
    runs = stages_that_took(tmp_path, seconds=1800.0, gpus=2, energy_watt_hours=500.0)
    both = Prices(currency="EUR", gpu_hour=2.5, kilowatt_hour=0.3)
    told = "18.55 EUR (7.00 GPU hours at 2.5 EUR, 3.5 kWh at 0.3 EUR)"
    assert money(both, runs) == f"Cost of all stages up to the package: {told}"
    assert money(Prices(currency="USD", gpu_hour=2.0), runs).endswith("14.00 USD (7.00 GPU hours at 2 USD)")
    assert money(None, runs) == ""


def test_a_cost_below_a_cent_and_energy_that_was_not_measured_are_said(tmp_path: Path) -> None:
    energy = Prices(currency="EUR", kilowatt_hour=0.3)
    small = stages_that_took(tmp_path / "a", seconds=1.0, energy_watt_hours=0.001)
    assert "less than 0.01 EUR (7e-06 kWh at 0.3 EUR)" in money(energy, small)
    unknown = stages_that_took(tmp_path / "b", seconds=1.0)
    assert "0.00 EUR (0 kWh at 0.3 EUR (7 of 7 stages did not measure it))" in money(energy, unknown)
