"""Stages fetch to gate in this process, on a tiny base: everything that `evaluate` can switch on is measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from graftline import settings
from graftline.errors import ReleaseError
from graftline.evaluate.gate_rules import METRICS as BY_ITEM
from graftline.evaluate.scores import read_scores
from graftline.settings.gate_metrics import METRICS
from graftline.workflow import resolve
from graftline.workflow.judging import merged_numbers
from tasks import evaluate, fetch, gate, init, merge, train, validate
from tests.line.project import read_yaml, write_yaml
from tests.tiny import make_tiny_llama
from tests.workflow.opened import Opened, open_pipeline
from tests.workflow.tiny_project import make_rows, tiny_settings

LIMITS = {
    "leakage": ("leaked_rows", "lower", 0),
    "template": ("template_mismatches", "lower", 0),
    "safety": ("forbidden_answers", "lower", 0),
    "size": ("adapter_bytes", "lower", 1e6),
    "merged-size": ("merged_bytes", "lower", 1e9),
    "parity": ("merged_failures", "lower", 0),
    "latency": ("latency_seconds", "lower", 60),
    "overhead": ("latency_ratio", "lower", 1e5),
    "miub": ("miub", "higher", 0),
}
"""Gate to metric, direction and a limit that holds."""


def everything() -> dict[str, Any]:
    """A pipeline whose evaluation measures all that it can without labels' own rows."""
    pipeline = tiny_settings()
    pipeline["quantize"] = {"method": "nf4"}
    pipeline["data"] |= {"evaluation_rows": 20}
    pipeline["train"] |= {"steps": 2, "batch_size": 4, "checkpoint_every": 0}
    pipeline["evaluate"] |= {
        "answers": {"max_new_tokens": 2, "max_rows": 6, "forbidden": ["no answer has this"]},
        "forgetting": {"source": "path:text.txt", "max_documents": 3},
        "references": ["unquantized"],
        "latency_tokens": 1,
        "miub_rows": 4,
    }
    limits = {
        name: {"metric": metric, "direction": direction, "test": "limit", "limit": limit}
        for name, (metric, direction, limit) in LIMITS.items()
    }
    quantized = {"metric": "nll", "direction": "lower", "test": "non-inferiority", "margin": 5.0}
    # Two steps do not teach a random model to end its answers.
    pipeline["guards"] = {"stops": "off"}
    pipeline["gates"] = limits | {"against-16-bit": quantized | {"against": "unquantized", "min_items": 20}}
    return pipeline


ELSEWHERE = ("evaluate.answers.json_schema", "evaluate.answers.judge", "evaluate.engine")
"""Settings of metrics that these rows cannot have: their answers are words, and a judge needs an address."""


def run_line(folder: Path) -> Opened:
    opened = open_pipeline("pets", folder)
    for part in (resolve, fetch, validate, init, train, evaluate, merge, gate):
        part.run(*opened)
        (opened.at.folder(part.__name__.rpartition(".")[2])).mkdir(exist_ok=True)
    return opened


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    folder = tmp_path_factory.mktemp("everything")
    make_tiny_llama(folder / "base")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(80)))
    (folder / "text.txt").write_text("Some general words.\nOther general words.\nAnd a third line of them.\n")
    write_yaml(folder, {"pipelines": {"pets": everything()}, "channels": {"production": {}}})
    return run_line(folder)


def metrics(opened: Opened) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((opened.at.folder("evaluate") / "metrics.json").read_text())
    return found


def test_every_metric_that_a_gate_may_ask_about_was_measured(opened: Opened) -> None:
    """What `config.measured` promises for this file is what the stages made."""
    candidate = read_scores(opened.at.folder("evaluate") / "scores" / "candidate.jsonl")
    promised = {name for name, metric in METRICS.items() if metric.is_on(opened.pipeline)}
    others = {name for name, metric in METRICS.items() if metric.switch.startswith(ELSEWHERE)}
    assert set(METRICS) - promised == {"general_accuracy"} | others
    measured = set(candidate.numbers) | set(merged_numbers(opened.at))
    assert promised - set(BY_ITEM) <= measured
    for name in promised & set(BY_ITEM):
        assert getattr(candidate, BY_ITEM[name].section), name


def test_all_gates_ran_and_pass(opened: Opened) -> None:
    verdict = json.loads((opened.at.folder("gate") / "verdict.json").read_text())
    outcomes = {found["name"]: (found["outcome"], found["reason"]) for found in verdict["gates"]}
    assert {name: outcome for name, (outcome, _) in outcomes.items() if outcome != "pass"} == {}, outcomes
    guards = {"guard: likelihood", "guard: training", "guard: leakage", "guard: template", "guard: forgetting"}
    assert outcomes.keys() == LIMITS.keys() | {"against-16-bit"} | guards


def test_metrics_hold_confusion_and_calibration_of_every_model(opened: Opened) -> None:
    found = metrics(opened)
    assert found.keys() == {"base", "candidate", "unquantized"}
    for summary in found.values():
        assert sum(sum(label["chosen"].values()) for label in summary["labels"].values()) == 20
        assert sum(part["items"] for part in summary["calibration"].values()) == 20
    assert {"miub_frozen_term", "miub_adapter_term", "miub_low", "miub_q_proj"} <= found["candidate"].keys()
    assert found["candidate"]["miub"] <= min(
        found["candidate"]["miub_frozen_term"], found["candidate"]["miub_adapter_term"]
    )


def test_the_unquantized_reference_is_the_same_adapter_on_other_weights(opened: Opened) -> None:
    folder = opened.at.folder("evaluate") / "scores"
    candidate, unquantized, base = (
        [item.nll for item in read_scores(folder / f"{name}.jsonl").items]
        for name in ("candidate", "unquantized", "base")
    )
    assert candidate != unquantized
    assert unquantized != base


def test_a_gate_on_a_version_that_was_never_released_stops_with_its_name(opened: Opened) -> None:
    document = read_yaml(opened.at.root)
    document["pipelines"]["pets"]["evaluate"]["references"] = ["20200101T000000Z-000000000000"]
    document["pipelines"]["pets"]["gates"].pop("against-16-bit")
    pipeline = settings.parse_config(json.dumps(document).encode(), Path("pipelines.yaml")).pipeline("pets")
    with pytest.raises(ReleaseError, match="20200101T000000Z-000000000000"):
        evaluate.run(pipeline, opened.at)
