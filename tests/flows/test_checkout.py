"""A clone for one run: shared caches, nothing else shared, and gone with its run."""

import copy
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from flows import checkout, shelf
from flows.worktree import cache_dir
from graftline.errors import ConfigError
from tests.flows.stand_in_project import make_repository
from tests.flows.tiny_project import PIPELINE, change, commit, git
from tests.line.project import read_yaml, write_yaml


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_repository(tmp_path_factory.mktemp("checkout") / "repository")
    change(root, "release", store="s3://models/x")
    document = read_yaml(root)
    document["pipelines"]["other"] = copy.deepcopy(document["pipelines"][PIPELINE])
    write_yaml(root, document)
    commit(root, "two pipelines")
    return root


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in checkout.VARIABLES:
        monkeypatch.setenv(name, str(tmp_path / "shared" / name))
    return tmp_path / "shared"


def clone(repository: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    git(folder, "clone", "-q", "--depth", "1", f"file://{repository}", "clone")
    return folder / "clone"


def test_two_clones_share_caches_and_shelves_and_nothing_else(repository: Path, shared: Path, tmp_path: Path) -> None:
    one, two = (clone(repository, tmp_path / name) for name in ("one", "two"))
    for root in (one, two):
        checkout.prepare(root)

    assert cache_dir(one) == cache_dir(two) == shared / "GRAFTLINE_DVC_CACHE"
    shelf.save(one, PIPELINE, inputs="sha256:0", outcome="pass", version="1")
    assert shelf.last(two, PIPELINE) == shelf.last(one, PIPELINE) is not None
    (one / "runs" / PIPELINE / "train").mkdir()
    assert not (two / "runs" / PIPELINE / "train").exists()
    assert git(one, "status", "--porcelain") == ""


def test_a_relative_store_would_go_with_the_clone_and_is_refused(
    repository: Path, shared: Path, tmp_path: Path
) -> None:
    root = clone(repository, tmp_path / "one")
    change(root, "release", store="store")
    with pytest.raises(ConfigError, match=r"pets.release.store is 'store'.*expected s3://… or an absolute path"):
        checkout.prepare(root)


@pytest.mark.parametrize("value", ["", "relative/cache"])
def test_a_worker_without_the_shared_folders_is_told_which_to_set(
    value: str, repository: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFTLINE_CACHE", value)
    with pytest.raises(ConfigError, match=r"GRAFTLINE_CACHE is .* set GRAFTLINE_CACHE and GRAFTLINE_DVC_CACHE where"):
        checkout.prepare(clone(repository, tmp_path / "one"))


def test_only_a_clone_that_goes_away_is_narrowed_to_its_pipeline(
    repository: Path, shared: Path, tmp_path: Path
) -> None:
    root = clone(repository, tmp_path / "one")
    checkout.narrow(root, PIPELINE)
    assert set(read_yaml(root)["pipelines"]) == {PIPELINE, "other"}

    checkout.prepare(root)
    before = read_yaml(root)
    checkout.narrow(root, PIPELINE)

    assert read_yaml(root)["pipelines"] == {PIPELINE: before["pipelines"][PIPELINE]}
    assert read_yaml(root)["channels"] == before["channels"]
    assert git(root, "status", "--porcelain") == "", "the manifest must not call its code revision dirty"


def test_checkouts_of_killed_runs_are_removed_and_those_of_living_ones_are_not(
    repository: Path, shared: Path, tmp_path: Path
) -> None:
    dead, alive, elsewhere = (clone(repository, tmp_path / f"tmp{name}prefect") for name in "abc")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    checkout.prepare(alive)
    record = json.loads((alive / ".git" / "graftline-owner.json").read_text())
    assert (record["host"], record["pid"]) == (platform.node(), os.getppid())
    gone = {**record, "pid": ended.pid}
    (dead / ".git" / "graftline-owner.json").write_text(json.dumps(gone))
    (elsewhere / ".git" / "graftline-owner.json").write_text(json.dumps({**gone, "host": "another"}))
    kept = shelf.folder(alive, PIPELINE).resolve()

    checkout.prepare(clone(repository, tmp_path / "tmpdprefect"))

    assert not dead.parent.exists()
    assert alive.is_dir()
    assert elsewhere.is_dir()
    assert kept.is_dir()


def test_a_clone_of_one_commit_gets_the_revisions_of_a_pull_request(
    repository: Path, shared: Path, tmp_path: Path
) -> None:
    first = git(repository, "rev-list", "--max-parents=0", "HEAD")
    root = clone(repository, tmp_path / "one")
    checkout.prepare(root)
    checkout.deepen(root, first)
    assert git(root, "rev-parse", "--verify", f"{first}^{{commit}}") == first
