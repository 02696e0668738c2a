"""A merged model that does not answer the same does not ship; the adapter does, and every page says why."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graftline.adapters.peft_format import AdapterWeights
from graftline.digest import write_json
from graftline.release.manifest import read_manifest
from graftline.workflow import resolve
from tasks import evaluate, fetch, gate, init, merge, package, train, validate
from tests.line.project import write_yaml
from tests.tiny import make_tiny_llama
from tests.workflow.opened import Opened, open_pipeline
from tests.workflow.tiny_project import make_rows, tiny_settings

STAGES = (resolve, fetch, validate, init, train, evaluate, merge, gate)
WHY = "no merged model answers as the adapter on its base does (float16: dequantized: "


def run_line(folder: Path) -> Opened:
    make_tiny_llama(folder / "base")
    rows = "".join(json.dumps(row) + "\n" for row in make_rows(80))
    (folder / "rows.jsonl").write_text(rows, encoding="utf-8")
    pipeline = tiny_settings()
    pipeline["data"] |= {"evaluation_rows": 20}
    pipeline["train"] |= {"steps": 2, "batch_size": 4, "checkpoint_every": 0}
    pipeline["package"] = {"merged": True, "dtype": "float16"}
    accuracy: dict[str, Any] = {
        "metric": "accuracy",
        "direction": "higher",
        "test": "non-inferiority",
        "margin": 1.0,
        "min_items": 20,
    }
    size: dict[str, Any] = {"metric": "merged_bytes", "direction": "lower", "test": "limit", "limit": 1e9}
    pipeline["gates"] = {"accuracy": accuracy | {"against": "base"}, "size": size}
    # Two steps do not teach a random model to end its answers.
    pipeline["guards"] = {"stops": "off", "training": "off"}
    write_yaml(folder, {"pipelines": {"pets": pipeline}, "channels": {"production": {}}})
    opened = open_pipeline("pets", folder)
    for part in STAGES:
        part.run(*opened)
        cost = {"seconds": 1.0, "peak_rss_mb": 1, "energy_watt_hours": 0.0, "energy_source": ""}
        write_json(opened.at.folder(part.__name__.rpartition(".")[2]) / "stage.json", cost)
    package.run(*opened)
    return opened


def test_a_wrong_merge_leaves_a_release_with_the_adapter_alone_that_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = AdapterWeights.fold_weight

    def wrong(self: AdapterWeights, module: str, weight: torch.Tensor, *at: Any) -> torch.Tensor:
        return right(self, module, weight, *at).roll(1, 0)

    monkeypatch.setattr(AdapterWeights, "fold_weight", wrong)
    opened = run_line(tmp_path)

    parity = json.loads((opened.at.folder("merge") / "parity.json").read_text(encoding="utf-8"))
    assert parity["merged"] is False
    assert [attempt["dtype"] for attempt in parity["attempts"]] == ["float16", "float32"]
    assert not (opened.at.folder("merge") / "model").exists()

    verdict = json.loads((opened.at.folder("gate") / "verdict.json").read_text(encoding="utf-8"))
    outcomes = {found["name"]: found for found in verdict["gates"]}
    assert outcomes["accuracy"]["outcome"] == "pass"
    assert outcomes["size"]["outcome"] == "fail"
    assert outcomes["size"]["reason"].startswith(f"could not run: merged_bytes was not measured: {WHY}")
    assert verdict["notes"][0].startswith(WHY)
    assert WHY in (opened.at.folder("gate") / "verdict.md").read_text(encoding="utf-8")

    out = opened.at.folder("package")
    assert not (out / "merged").exists()
    assert {entry.path.split("/")[0] for entry in read_manifest(out).files} >= {"adapter", "evaluation", "README.md"}
    assert WHY in (out / "README.md").read_text(encoding="utf-8")
    assert "no merged model answers as" in (out / "report.html").read_text(encoding="utf-8")


def test_a_merge_that_rounds_ships_and_nothing_is_noted(tmp_path: Path) -> None:
    opened = run_line(tmp_path)
    verdict = json.loads((opened.at.folder("gate") / "verdict.json").read_text(encoding="utf-8"))
    assert {found["name"]: found["outcome"] for found in verdict["gates"]}["size"] == "pass"
    assert verdict["notes"] == []
    assert (opened.at.folder("package") / "merged" / "model.safetensors").is_file()
