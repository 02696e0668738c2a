"""Training that continues from a release: whose adapter it is, what it must fit, and when there is a reason to run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graftline.adapters.attach import attach
from graftline.adapters.peft_format import AdapterIdentity, AdapterWeights, attach_trained, save_adapter
from graftline.digest import of_json
from graftline.errors import AdapterError, ReleaseError, TrainError
from graftline.registry import channel
from graftline.registry.channel import Anchor
from graftline.registry.releases import list_versions, load_manifest
from graftline.registry.store import open_store
from graftline.release.manifest import read_manifest
from graftline.settings import Adapter
from graftline.weights.identity import read_identity
from graftline.weights.quant.linear import load_model
from graftline.workflow import resolve
from graftline.workflow.training import parent_release
from tests.line.project import write_yaml
from tests.tiny import make_tiny_llama
from tests.workflow.opened import Opened, open_pipeline
from tests.workflow.test_scored import AFTER_SCORES, UNTIL_SCORES, promote, run_stages
from tests.workflow.tiny_project import make_rows, tiny_settings

LORA = Adapter(method="lora", rank=4, alpha=8)


def settings(start: str | None) -> dict[str, Any]:
    pipeline = tiny_settings()
    pipeline["data"] |= {"evaluation_rows": 20}
    pipeline["train"] |= {"steps": 2, "batch_size": 4, "checkpoint_every": 0}
    pipeline["gates"]["accuracy"] |= {"margin": 0.9, "min_items": 1}
    pipeline["guards"] = dict.fromkeys(("stops", "likelihood", "training"), "off")
    pipeline["package"] = {"merged": False}
    if start:
        pipeline["train"]["start_from"] = start
    return pipeline


def opened(folder: Path, start: str | None) -> Opened:
    write_yaml(folder, {"pipelines": {"pets": settings(start)}, "channels": {"production": {}}})
    return open_pipeline("pets", folder)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a release in production, which was started while nothing was."""
    folder = tmp_path_factory.mktemp("warm") / "project"
    make_tiny_llama(folder / "base")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(60)), encoding="utf-8")
    (folder / "keys.yaml").write_text("unsigned: true\n", encoding="utf-8")
    first = opened(folder, "production")
    run_stages(first, resolve, *UNTIL_SCORES, *AFTER_SCORES)
    promote(first, read_manifest(first.at.folder("package")).version)
    return folder


@pytest.mark.slow
def test_the_first_night_starts_afresh_and_the_next_one_from_production(project: Path) -> None:
    (version,) = list_versions(open_store(str(project / "store")), "pets")
    pipeline, at = opened(project, "production")
    first = json.loads((at.folder("package") / "manifest.json").read_text(encoding="utf-8"))
    assert "parent_version" not in first["lineage"]
    history = json.loads((at.folder("train") / "history.json").read_text(encoding="utf-8"))
    run_stages(Opened(pipeline, at), resolve, *UNTIL_SCORES, *AFTER_SCORES[:-1])
    manifest = read_manifest(at.folder("package"))
    assert manifest.lineage.parent_version == version
    store = open_store(str(project / "store"))
    assert manifest.lineage.parent_digest == of_manifest(store, version)
    again = json.loads((at.folder("train") / "history.json").read_text(encoding="utf-8"))
    # The same first batch, after two steps that were learned from it.
    assert again[0]["loss"] < history[0]["loss"]


def of_manifest(store: Any, version: str) -> Any:
    return load_manifest(store, "pets", version).digest


@pytest.mark.long
@pytest.mark.slow
def test_a_release_may_be_named_and_must_exist(project: Path) -> None:
    store = open_store(str(project / "store"))
    (version,) = list_versions(store, "pets")
    named = resolve.look_up(*opened(project, version))["settings"]["train"]["start"]
    assert named == {"version": version, "release": str(of_manifest(store, version))}
    with pytest.raises(ReleaseError, match="20200101T000000Z-nothing"):
        resolve.look_up(*opened(project, "20200101T000000Z-nothing"))


@pytest.mark.long
@pytest.mark.slow
def test_another_base_and_a_changed_manifest_are_told(project: Path, tmp_path: Path) -> None:
    pipeline, at = opened(project, "production")
    resolve.run(pipeline, at)
    make_tiny_llama(tmp_path / "other", seed=7)
    with pytest.raises(TrainError, match=r"was trained on the base sha256:.*remove train\.start_from"):
        parent_release(pipeline, at, read_identity(tmp_path / "other"))
    record = at.runs / resolve.RESOLVED
    found = json.loads(record.read_text(encoding="utf-8"))
    found["settings"]["train"]["start"]["release"] = str(of_json("another"))
    record.write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(TrainError, match="it was changed since; start the run again"):
        parent_release(pipeline, at, read_identity(project / "base"))


@pytest.mark.long
@pytest.mark.slow
def test_training_starts_from_the_channels_anchor_whatever_production_holds_since(project: Path) -> None:
    store = open_store(str(project / "store"))
    (version,) = list_versions(store, "pets")
    log = channel.read(store, "pets", "production")
    anchor = Anchor(version=version, release=of_manifest(store, version))
    later = log.entries[-1].change.model_copy(
        update={"version": "20260101T000000Z-later", "release": of_json("later"), "anchor": anchor}
    )
    channel.append(store, channel.next_entry(log, later))
    pipeline, at = opened(project, "anchor")
    resolve.run(pipeline, at)
    found = resolve.load(at)
    assert found["champion"]["version"] == "20260101T000000Z-later"
    assert found["settings"]["train"]["start"] == anchor.model_dump(mode="json")
    parent = parent_release(pipeline, at, read_identity(project / "base"))
    assert parent is not None
    assert parent.version == version
    assert (parent.adapter / "adapter_model.safetensors").is_file()


@pytest.mark.long
@pytest.mark.slow
def test_an_empty_channel_has_no_anchor_and_training_starts_afresh(project: Path, tmp_path: Path) -> None:
    pipeline, at = opened(project, "anchor")
    empty = pipeline.replace(release=pipeline.release.replace(store=str(tmp_path / "empty")))
    assert resolve.look_up(empty, at)["settings"]["train"]["start"] == {"version": None, "release": None}


def test_the_own_release_in_production_is_no_reason_to_train_again() -> None:
    before = {"champion": None, "settings": {"train": {"start": None, "train": {"steps": 1}}, "gate": {}}}
    champion = {"version": "v1", "release": "sha256:1"}
    now = {"champion": champion, "settings": {"train": {"start": champion, "train": {"steps": 1}}, "gate": {}}}
    assert resolve.with_champion_of(now, before) == before
    named = {"version": "v0", "release": "sha256:0"}
    other = {**now, "settings": {**now["settings"], "train": {"start": named, "train": {"steps": 1}}}}
    assert resolve.with_champion_of(other, before) != before
    # What the channel's anchor is says nothing about where training starts.
    anchored = {**now, "champion": champion | {"anchor": {"version": "v0", "release": "sha256:0"}}}
    assert resolve.with_champion_of(anchored, before) == before


# The adapter's shape.


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base, and a LoRA adapter on it whose values are not those of a fresh one."""
    folder = tmp_path_factory.mktemp("shape")
    base, adapter = make_tiny_llama(folder / "base"), folder / "adapter"
    model = load_model(base, device="cpu", dtype=torch.float32)
    attach(model, LORA, seed=0)
    for at, parameter in enumerate(each for each in model.parameters() if each.requires_grad):
        parameter.data.fill_(0.01 * (at + 1))
    identity = read_identity(base)
    save_adapter(model, adapter, identity=AdapterIdentity(base_digest=identity.digest, quantizer=None))
    return base, adapter


def test_an_adapter_goes_on_a_model_as_it_was_trained_and_is_trainable(trained: tuple[Path, Path]) -> None:
    base, adapter = trained
    model = load_model(base, device="cpu", dtype=torch.float32)
    attach_trained(model, LORA, AdapterWeights.open(adapter))
    values = [each for each in model.parameters() if each.requires_grad]
    assert values
    assert all(torch.all(each == torch.tensor(0.01 * (at + 1))) for at, each in enumerate(values))


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        (LORA.replace(rank=8), "rank and scale .* expected the same: start afresh"),
        (LORA.replace(alpha=16.0), "rank and scale .* expected the same: start afresh"),
        (LORA.replace(method="dora"), "is lora on .* layers, this pipeline trains dora"),
        (LORA.replace(targets=("q_proj",)), "expected the same: start afresh"),
    ],
)
def test_another_shape_is_refused_before_anything_is_attached(
    trained: tuple[Path, Path], spec: Adapter, problem: str
) -> None:
    base, adapter = trained
    model = load_model(base, device="cpu", dtype=torch.float32)
    with pytest.raises(AdapterError, match=problem):
        attach_trained(model, spec, AdapterWeights.open(adapter))
    attach(model, LORA, seed=0)
