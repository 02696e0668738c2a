"""Trainings of a sweep's cells side by side: which fit together, and what their own stages find afterwards."""

import argparse
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from graftline import settings
from graftline.digest import of_folder
from graftline.errors import ConfigError
from graftline.weights import kept_base
from graftline.workflow import sweeping
from graftline.workflow.side_by_side import groups, train_group, why_alone
from graftline.workflow.sweep_cells import SIDE_BY_SIDE
from graftline.workflow.workspace import Workspace
from tasks import fetch, init, resolve, train, validate
from tests.line.project import write_yaml
from tests.tiny import make_tiny_llama
from tests.workflow.tiny_project import PIPELINE, make_rows, tiny_settings

NF4 = {"quantize": {"method": "nf4"}}


def write(folder: Path, changed: Mapping[str, Mapping[str, Any]] = NF4) -> Workspace:
    pipeline = tiny_settings()
    for section, values in (NF4 | dict(changed)).items():
        pipeline[section] = pipeline[section] | dict(values)
    write_yaml(folder, {"pipelines": {PIPELINE: pipeline}, "channels": {"production": {}}})
    return Workspace(folder, PIPELINE)


def opened(at: Workspace) -> settings.Pipeline:
    return settings.load(at.root / settings.DEFAULT_FILE).pipeline(PIPELINE)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"adapter": {"method": "dora", "dropout": 0.1}, "train": {"gradient_checkpointing": True}}, None),
        ({"quantize": {"method": "none"}}, "not quantized"),
        ({"train": {"processes": 2}}, "started apart"),
        ({"train": {"compile": "always"}}, "compiled"),
        ({"train": {"checkpoint_every": 0}}, "no checkpoint"),
    ],
)
def test_what_cannot_be_trained_beside_others_says_why(
    tmp_path: Path, changed: Mapping[str, Mapping[str, Any]], reason: str | None
) -> None:
    found = why_alone(opened(write(tmp_path, changed)))
    assert (found is None) if reason is None else (reason in str(found))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose rows and quantized base are made."""
    folder = tmp_path_factory.mktemp("project")
    make_tiny_llama(folder / "base")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(200)))
    (folder / "keys.yaml").write_text("keys: []\nunsigned: true\n", encoding="utf-8")
    at = write(folder)
    for stage in (resolve, fetch, validate, init):
        stage.run(opened(at), at)
    return folder


def cells(checkout: Path, folder: Path) -> list[Workspace]:
    """Two that fit together, and one that does not."""
    changes: dict[str, dict[str, Any]] = {
        "plain": {},
        "other": {"adapter": {"rank": 8, "dropout": 0.1}, "train": {"seed": 1, "steps": 6}},
        "more threads": {"train": {"threads": 2}},
    }
    for name in changes:
        shutil.copytree(checkout, folder / name)
    return [write(folder / name, changed) for name, changed in changes.items()]


@pytest.mark.slow
def test_a_cells_stage_finds_its_training_finished_and_writes_what_it_would_have_alone(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "graftline")
    monkeypatch.setattr(kept_base, "_kept", None)
    kept_base.keep_bases()
    beside, alone = cells(checkout, tmp_path / "beside"), cells(checkout, tmp_path / "alone")
    (group,) = groups(beside, most=2)
    assert [at.root.name for at in group] == ["plain", "other"]
    assert "more threads is trained alone: no other one is left that fits it" in caplog.text
    train_group(group)
    for one, other in zip(group, alone, strict=False):
        cost = json.loads((one.runs / SIDE_BY_SIDE).read_text())
        assert cost["cells"] == 2
        assert cost["seconds"] > 0
        for at in (one, other):
            train.run(opened(at), at)
        assert one.root.name == other.root.name
        assert "resuming from step" in caplog.text
        for file in ("history.json", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
            assert (one.folder("train") / file).read_bytes() == (other.folder("train") / file).read_bytes(), file
        (work,), (expected,) = (list((at.runs / ".work").glob("train-*")) for at in (one, other))
        assert work.name == expected.name
        assert of_folder(work) == of_folder(expected)


def test_trainings_that_share_a_process_are_asked_for_without_workers_or_a_search() -> None:
    def asked(*given: str) -> dict[str, Any]:
        parsed: argparse.Namespace = sweeping.parser().parse_args([PIPELINE, *given])
        return sweeping.asked(parsed)

    assert asked("--side-by-side", "4")["side_by_side"] == 4
    for wrong in (
        ["--side-by-side", "0"],
        ["--side-by-side", "2", "--workers", "2"],
        ["--side-by-side", "2", "--search"],
    ):
        with pytest.raises(ConfigError, match="expected at least 1, and above it no --search"):
            asked(*wrong)
