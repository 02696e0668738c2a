"""Base and adapter made for each other (LoftQ, QPiSSA), through the stages: neither is accepted without the other."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from graftline.digest import of_file
from graftline.release.manifest import read_manifest
from graftline.weights.identity import read_identity
from graftline.weights.quant.low_rank import FACTORS_FILE, factors_digest
from tests.line.project import ROOT, copy_project, environment

PIPELINE = "wordnet-animal-or-plant"
SMALLEST = {
    "train.steps": 2,
    "train.batch_size": 4,
    "data.evaluation_rows": 12,
    "data.max_rows": 60,
    "quantize.method": "nf2",
    # Two of seven layers: the singular values of all take minutes.
    "adapter.targets": ["q_proj", "v_proj"],
    "gates.accuracy": {"metric": "accuracy", "direction": "higher", "test": "superiority", "against": "base"}
    | {"margin": 0.05, "min_items": 12},
    "gates.stops": {
        "metric": "option_stop_rate",
        "direction": "higher",
        "test": "limit",
        "limit": 0.7,
        "min_items": 12,
    },
    "package.merged": False,
}
PAIRS = {
    "loftq": {"quantize.init": "loftq", "quantize.loftq_iterations": 1, "adapter.method": "loftq"},
    "qpissa": {"quantize.init": "qpissa", "adapter.method": "pissa"},
}

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]


def run_stage(project: Path, stage: str) -> subprocess.CompletedProcess[str]:
    package = "graftline.workflow" if stage == "resolve" else "tasks"
    command = [sys.executable, "-m", f"{package}.{stage}", PIPELINE]
    return subprocess.run(
        command, cwd=project, env=environment(project, ROOT / ".cache" / "graftline"), capture_output=True, text=True
    )


def run_stages(project: Path, *stages: str) -> None:
    for stage in stages:
        done = run_stage(project, stage)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module", params=["loftq", "qpissa"])
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    copy_project(folder, SMALLEST | PAIRS[request.param], PIPELINE)
    run_stages(folder, "resolve", "fetch", "validate", "init", "train")
    return folder


def test_an_adapter_records_base_and_first_values(project: Path) -> None:
    runs = project / "runs" / PIPELINE
    identity = read_identity(runs / "init" / "base")
    adapter = json.loads((runs / "train" / "adapter" / "graftline.json").read_text())
    assert identity.pair == factors_digest(runs / "init" / "base")
    assert adapter["base_digest"] == str(identity.digest)
    assert adapter["initial_digest"] == str(identity.pair)


@pytest.mark.parametrize("project", ["loftq"], indirect=True)
def test_the_manifest_binds_base_and_adapter(project: Path) -> None:
    run_stages(project, "evaluate", "merge", "gate", "package")
    runs = project / "runs" / PIPELINE
    manifest = read_manifest(runs / "package")
    assert manifest.lineage.base_digest == read_identity(runs / "init" / "base").digest
    record = runs / "train" / "adapter" / "graftline.json"
    packaged = {entry.path: entry.digest for entry in manifest.files}
    assert packaged["adapter/graftline.json"] == of_file(record)


@pytest.mark.parametrize("given", ["no adapter", "an adapter started from sha256:"])
def test_a_paired_base_is_refused_with_any_adapter_but_its_own(project: Path, given: str) -> None:
    record = project / "runs" / PIPELINE / "train" / "adapter" / "graftline.json"
    kept = record.read_bytes()
    content = json.loads(kept)
    content["initial_digest"] = None if given == "no adapter" else f"sha256:{'0' * 64}"
    record.write_text(json.dumps(content))
    try:
        done = run_stage(project, "evaluate")
    finally:
        record.write_bytes(kept)
    assert done.returncode == 2
    assert f"was given {given}" in done.stderr
    assert "was made together with the adapter factors sha256:" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("damage", ["lost", "of another pair"])
def test_a_paired_base_is_not_trained_on_with_other_factors(project: Path, damage: str, tmp_path: Path) -> None:
    factors = project / "runs" / PIPELINE / "init" / "base" / FACTORS_FILE
    kept = shutil.move(factors, tmp_path / "kept")
    try:
        if damage == "of another pair":
            save_file({name: 2 * tensor for name, tensor in load_file(kept).items()}, factors)
        done = run_stage(project, "train")
    finally:
        shutil.move(kept, factors)
    assert done.returncode == 2, done.stdout + done.stderr
    assert (FACTORS_FILE if damage == "lost" else "was made together with the adapter factors") in done.stderr
    assert "Traceback" not in done.stderr
