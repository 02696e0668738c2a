"""Preference pairs through the stages: trained with DPO, and judged by the share of held-out pairs told right."""

import json
import random
from pathlib import Path

import pytest

from graftline.errors import DataError
from graftline.workflow import resolve
from tasks import evaluate, fetch, gate, init, merge, train, validate
from tests.line.project import write_yaml
from tests.tiny import make_tiny_llama
from tests.workflow.opened import Opened, open_pipeline
from tests.workflow.tiny_project import PIPELINE, tiny_settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def make_pairs(count: int) -> list[dict[str, str]]:
    """The friendly answer is chosen; no two prompts are alike."""
    draw = random.Random(0)
    pairs = []
    for _ in range(count):
        prompt = " ".join(draw.choice("abcdefghijklmnopqrstuvwxyz") * 2 for _ in range(6))
        pairs.append({"prompt": f"{prompt}:", "chosen": " gladly yes", "rejected": " surely not"})
    return pairs


def opened_project(root: Path, kind: str, *, format: str = "preference") -> Opened:
    pipeline = tiny_settings()
    pipeline["data"] = {"source": "path:pairs.jsonl", "format": format, "evaluation_rows": 40, "max_tokens": 64}
    if format != "preference":
        pipeline["data"]["labels"] = ["gladly yes", "surely not"]
    pipeline["train"] |= {"steps": 16, "batch_size": 4, "learning_rate": 0.01}
    if format == "preference":
        pipeline["train"]["objective"] = {"kind": kind}
    pipeline["gates"]["accuracy"] |= {"test": "superiority", "margin": 0.1, "min_items": 40}
    write_yaml(root, {"pipelines": {PIPELINE: pipeline}, "channels": {"production": {}}})
    return open_pipeline(PIPELINE, root)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    make_tiny_llama(folder / "base")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in make_pairs(120)))
    return folder


def test_pairs_are_trained_on_and_judged_against_the_base(root: Path) -> None:
    opened = opened_project(root, "dpo")
    for stage in (resolve, fetch, validate, init, train, evaluate, merge, gate):
        stage.run(*opened)
    history = json.loads((opened.at.folder("train") / "history.json").read_text())
    assert history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # nothing is preferred yet
    assert history[-1]["loss"] < 0.5
    metrics = json.loads((opened.at.folder("evaluate") / "metrics.json").read_text())
    verdict = json.loads((opened.at.folder("gate") / "verdict.json").read_text())
    assert metrics["candidate"]["accuracy"] > 0.9
    (found,) = [gate for gate in verdict["gates"] if gate["name"] == "accuracy"]
    assert found["candidate"] == metrics["candidate"]["accuracy"]
    assert found["outcome"] == "pass"
    report = json.loads((opened.at.folder("validate") / "report.json").read_text())
    assert "length does not decide pairs" in json.dumps(report)


def test_pairs_that_are_not_declared_are_not_trained_on_as_if_they_were_rows(root: Path) -> None:
    opened = opened_project(root, "dpo", format="auto")
    resolve.run(*opened)
    with pytest.raises(DataError, match="write `format: preference`"):
        fetch.run(*opened)
