"""Objective classify through the stages: trained, judged by classes, packaged, served, refused where it cannot be."""

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from graftline.adapters.weights import AdapterWeights
from graftline.data.rows import read_rows
from graftline.data.template import encode_prompt
from graftline.digest import write_json
from graftline.errors import ExportError, MergeError, PromotionError
from graftline.export.targets import check_target, export_adapter, require_vllm, shapes_of
from graftline.merge.fold import merge_folder
from graftline.serve.served_base import Runtime
from graftline.serve.smoke import SMOKE_FILE, check_release
from graftline.weights.model_folder import load_tokenizer
from graftline.workflow import resolve
from tasks import evaluate, fetch, gate, init, merge, package, train, validate
from tests.line.project import write_yaml
from tests.tiny import make_tiny_llama
from tests.workflow.opened import Opened, open_pipeline
from tests.workflow.tiny_project import PIPELINE, make_rows, tiny_settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """A pipeline whose stages up to the package have run."""
    root = tmp_path_factory.mktemp("project")
    make_tiny_llama(root / "base")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(400)))
    pipeline = tiny_settings()
    pipeline["train"] |= {"steps": 40, "objective": {"kind": "classify"}, "evaluate_every": 20, "held_out_rows": 40}
    pipeline["package"] = {"merged": False}
    about_classes = {"test": "superiority", "margin": 0.05, "against": "base"}
    pipeline["gates"] |= {
        "macro-f1": {"metric": "macro_f1", "direction": "higher", **about_classes},
        "class-nll": {"metric": "class_nll", "direction": "lower", **about_classes},
    }
    del pipeline["guards"]  # a head's answers need not end
    write_yaml(root, {"pipelines": {PIPELINE: pipeline}, "channels": {"production": {}}})
    found = open_pipeline(PIPELINE, root)
    for stage in (resolve, fetch, validate, init, train, evaluate, merge, gate):
        stage.run(*found)
        cost = {"seconds": 1.0, "peak_rss_mb": 1, "energy_watt_hours": 0.0, "energy_source": ""}
        write_json(found.at.folder(stage.__name__.rpartition(".")[2]) / "stage.json", cost)
    package.run(*found)
    return found


def test_a_head_is_trained_and_judged_against_likelihoods_of_labels(opened: Opened):
    metrics = json.loads((opened.at.folder("evaluate") / "metrics.json").read_text())
    assert metrics["candidate"]["accuracy"] > 0.9
    assert metrics["candidate"]["class_nll"] < metrics["base"]["class_nll"]
    verdict = json.loads((opened.at.folder("gate") / "verdict.json").read_text())
    outcomes = {found["name"]: found["outcome"] for found in verdict["gates"]}
    assert set(outcomes.values()) == {"pass"}
    assert not any("stops" in name for name in outcomes)
    history = json.loads((opened.at.folder("train") / "history.json").read_text())
    assert history[0]["loss"] == pytest.approx(np.log(2), abs=0.2)


def test_peft_gives_the_same_classes(opened: Opened, tmp_path: Path):
    base = opened.at.root / "base"
    out = tmp_path / "peft"
    export_adapter(opened.at.folder("train") / "adapter", out, target="peft", shape_of=shapes_of(base))
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(model, out).eval()
    rows, tokenizer = read_rows(opened.at.folder("fetch") / "evaluation.jsonl"), load_tokenizer(base)
    scores = (opened.at.folder("evaluate") / "scores" / "candidate.jsonl").read_text().splitlines()[1:]
    for row, line in list(zip(rows, scores, strict=True))[:10]:
        with torch.no_grad():
            logits = theirs(torch.tensor([encode_prompt(row, tokenizer, template="none")])).logits[0]
        assert json.loads(line)["log_likelihoods"] == pytest.approx(logits.log_softmax(-1).tolist(), abs=1e-4)


def test_the_server_is_held_to_the_recorded_classes(opened: Opened, tmp_path: Path):
    release = opened.at.folder("package")
    runtime = Runtime(graphs=tmp_path / "graphs", num_threads=1)
    check_release(release, base=opened.at.root / "base", runtime=runtime)
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "adapter").symlink_to(release / "adapter")
    recorded = json.loads((release / SMOKE_FILE).read_text())
    recorded["samples"][0]["classes"].reverse()
    (changed / SMOKE_FILE).write_text(json.dumps(recorded))
    with pytest.raises(PromotionError, match="does not run the model that was judged"):
        check_release(changed, base=opened.at.root / "base", runtime=runtime)


def test_what_has_no_place_for_a_head_refuses_it(opened: Opened, tmp_path: Path):
    adapter, base = opened.at.folder("train") / "adapter", opened.at.root / "base"
    with pytest.raises(MergeError, match="has a head for classes"):
        merge_folder(base, adapter, tmp_path / "merged", dtype=torch.float32)
    weights = AdapterWeights.open(adapter)
    assert "no head for classes" in check_target(weights, "vllm").reasons[0]
    assert "no head" in check_target(weights, "transformers").reasons[0]
    with pytest.raises(ExportError, match="vLLM loads no head for classes"):
        export_adapter(adapter, tmp_path / "vllm", target="vllm", shape_of=shapes_of(base))
    with pytest.raises(PromotionError, match="no head for classes"):
        require_vllm(opened.at.folder("package"), "production")
