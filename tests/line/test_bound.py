"""The whole line through Prefect and DVC on a tiny base: what was scored, compared with and released are one thing."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from graftline.digest import Digest
from graftline.evaluate.scores import read_scores
from graftline.registry import channel
from graftline.registry.channel import Log
from graftline.registry.releases import list_versions, remove, verify
from graftline.registry.store import Store, open_store
from graftline.workflow import inputs, leases, shelf
from tests.line.project import environment, read_yaml
from tests.registry.entries import promotion_of
from tests.workflow.tiny_project import PIPELINE, change, commit, git, make_repository

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of the project, as a person would start it."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env=environment(folder, folder.parent / "cache"),
        capture_output=True,
        text=True,
        timeout=1500,
    )


def retrain(folder: Path) -> dict[str, str]:
    """Run the line; what it prints at its end, by heading."""
    done = run(folder, "flows.retrain", PIPELINE)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.partition(":") for line in done.stdout.splitlines()]
    return {name: value.strip() for name, _, value in rows}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with one finished run, whose release is in no channel."""
    folder = make_repository(tmp_path_factory.mktemp("bound") / "checkout")
    retrain(folder)
    return folder


@pytest.fixture
def checkout(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it: paths in DVC's and the line's records are relative."""
    folder = tmp_path / "work" / "checkout"
    shutil.copytree(finished.parent, folder.parent, symlinks=True)
    monkeypatch.setenv("GRAFTLINE_CACHE", str(folder.parent / "cache"))
    return folder


def store_of(folder: Path) -> Store:
    return open_store(str(folder / "store"))


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / "runs" / PIPELINE / name).read_text(encoding="utf-8"))


def promote(folder: Path, version: str) -> None:
    """Put a release into production, without the checks that are tested elsewhere."""
    store = store_of(folder)
    manifest = verify(store, PIPELINE, version)
    now = datetime.now(UTC).replace(microsecond=0)
    changed = promotion_of(manifest, now)
    entries = channel.read(store, PIPELINE, "production").entries
    channel.append(store, channel.next_entry(Log(PIPELINE, "production", entries), changed))


@pytest.mark.long
def test_an_adapter_that_was_damaged_in_dvc_s_cache_is_not_released_with_the_verdict_of_the_whole_one(
    checkout: Path, tmp_path: Path
) -> None:
    clone = tmp_path / "clone" / "checkout"
    git(tmp_path, "clone", "-q", str(checkout), str(clone))
    shutil.copytree(checkout.parent / "cache", clone.parent / "cache", symlinks=True)
    shutil.copytree(checkout / ".dvc" / "cache", clone / ".dvc" / "cache")
    shutil.copy(checkout / "dvc.lock", clone)
    damaged = _in_cache(clone, checkout / "runs" / PIPELINE / "train" / "adapter" / "adapter_model.safetensors")
    data = bytearray(damaged.read_bytes())
    for place in range(len(data) // 2, len(data) // 2 + 400, 4):
        data[place + 3] ^= 0x10
    damaged.chmod(0o644)
    damaged.write_bytes(data)
    damaged.chmod(0o444)  # As DVC leaves it: it is not looked at again.
    change(clone, "gates", accuracy={**_gate(clone), "margin": 0.31})
    commit(clone, "only the gate has to run again")

    done = run(clone, "flows.retrain", PIPELINE)

    assert done.returncode == 2, done.stdout + done.stderr
    assert "adapter: scored sha256:" in done.stderr + done.stdout
    assert "dvc repro --force --single-item evaluate@pets" in done.stderr + done.stdout
    assert list_versions(store_of(clone), PIPELINE) == []


def _gate(folder: Path) -> dict[str, Any]:
    gate: dict[str, Any] = read_yaml(folder)["pipelines"][PIPELINE]["gates"]["accuracy"]
    return gate


def _in_cache(folder: Path, file: Path) -> Path:
    md5 = hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()
    return folder / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]


@pytest.mark.long
def test_the_champion_is_what_production_holds_now_unless_nothing_has_changed(checkout: Path) -> None:
    own = read(checkout, "release/release.json")
    promote(checkout, own["version"])

    assert inputs.sort_by_news(checkout, [PIPELINE]) == ([], [PIPELINE], {})
    assert retrain(checkout)["stages run"] == "none, all up to date"
    assert read(checkout, "package/manifest.json")["verdict"]["against"] == "base"

    change(checkout, "gates", accuracy={**_gate(checkout), "margin": 0.2})
    commit(checkout, "margin")
    assert inputs.sort_by_news(checkout, [PIPELINE]) == ([PIPELINE], [], {})
    ran = retrain(checkout)["stages run"]
    assert "evaluate" in ran
    assert "train" not in ran
    scored = read_scores(checkout / "runs" / PIPELINE / "evaluate" / "scores" / "production.jsonl").scored
    assert scored
    assert scored.release
    assert (scored.release.version, scored.release.digest) == (own["version"], Digest.parse(own["digest"]))
    verdict = read(checkout, "package/manifest.json")["verdict"]
    assert (verdict["against"], verdict["release"]) == (own["version"], own["digest"])
    # Not committed: DVC alone says whether something has changed.
    promote(checkout, read(checkout, "release/release.json")["version"])
    (checkout / "README.md").write_text("not committed")
    assert retrain(checkout)["stages run"] == "none, all up to date"


@pytest.mark.long
def test_nobody_else_in_the_checkout_changes_what_a_run_was_resolved_to(checkout: Path) -> None:
    resolved = checkout / "runs" / PIPELINE / "resolved.json"
    other = {**json.loads(resolved.read_text()), "champion": {"version": "2", "release": f"sha256:{'0' * 64}"}}
    with leases.hold_folder(shelf.shelf_folder(checkout, PIPELINE)):
        resolved.write_text(json.dumps(other))
        assert inputs.with_new_data(checkout, [PIPELINE]) == ({}, {})
        assert inputs.sort_by_news(checkout, [PIPELINE]) == ([], [PIPELINE], {})
        holder = shelf.shelf_folder(checkout, PIPELINE) / ".holder.json"
        holder.write_text(json.dumps({**json.loads(holder.read_text()), "pid": os.getpid() + (1 << 20)}))
        refused = run(checkout, "graftline.workflow.resolve", PIPELINE)
        assert refused.returncode == 2
        assert "wait for that run" in refused.stderr
        assert json.loads(resolved.read_text()) == other


@pytest.mark.long
def test_cleaning_up_leaves_a_release_that_waits_and_a_lost_one_is_published_again(checkout: Path) -> None:
    version = read(checkout, "release/release.json")["version"]
    kept = run(checkout, "graftline.cli", "gc", PIPELINE, "--days", "0", "--yes")
    assert f"keep    {version}  released by the last run" in kept.stdout, kept.stdout + kept.stderr
    assert verify(store_of(checkout), PIPELINE, version).version == version

    remove(store_of(checkout), PIPELINE, version)

    assert inputs.sort_by_news(checkout, [PIPELINE]) == ([PIPELINE], [], {})
    assert retrain(checkout)["stages run"] == "1 (release)"
    assert verify(store_of(checkout), PIPELINE, version).version == version
    assert inputs.sort_by_news(checkout, [PIPELINE]) == ([], [PIPELINE], {})
    assert retrain(checkout)["stages run"] == "none, all up to date"
