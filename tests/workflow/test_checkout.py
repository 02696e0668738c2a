"""A clone for one run: shared caches, nothing else shared, and gone with its run."""

import copy
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from graftline.errors import ConfigError
from graftline.workflow import checkout, owner, shelf
from graftline.workflow.worktree import cache_dir
from tests.line.project import ROOT, read_yaml, write_yaml
from tests.workflow.stand_in_project import make_repository
from tests.workflow.tiny_project import PIPELINE, change, commit, git


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
    shelf.keep_run(one, PIPELINE, inputs="sha256:0", outcome="pass", version="1")
    assert shelf.last_run(two, PIPELINE) == shelf.last_run(one, PIPELINE) is not None
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
    checkout.prepare(alive)
    record = json.loads((alive / ".git" / "graftline-owner.json").read_text())
    assert (record["host"], record["pid"]) == (platform.node(), os.getppid())
    gone = {**record, "pid": _ended()}
    (dead / ".git" / "graftline-owner.json").write_text(json.dumps(gone))
    (elsewhere / ".git" / "graftline-owner.json").write_text(json.dumps({**gone, "host": "another"}))
    kept = shelf.shelf_folder(alive, PIPELINE).resolve()

    checkout.prepare(clone(repository, tmp_path / "tmpdprefect"))

    assert not dead.parent.exists()
    assert alive.is_dir()
    assert elsewhere.is_dir()
    assert kept.is_dir()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "\udcff", '{"host": %HOST%}', '{"host": %HOST%, "pid": 1e999, "boot": "", "started": 0}'],
)
def test_a_record_that_cannot_be_read_is_left_and_ends_no_other_run(
    text: str, repository: Path, shared: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = clone(repository, tmp_path / "tmpaprefect")
    written = text.replace("%HOST%", json.dumps(platform.node()))
    (damaged / owner.RECORD).write_text(written, encoding="utf-8", errors="surrogateescape")

    checkout.prepare(clone(repository, tmp_path / "tmpbprefect"))

    assert damaged.is_dir()
    assert f"{damaged} is left: its record cannot be read" in caplog.text


def test_a_checkout_is_kept_while_any_process_of_the_flows_works_there(
    repository: Path, shared: Path, tmp_path: Path
) -> None:
    busy = clone(repository, tmp_path / "tmpaprefect")
    owner.record(busy, os.getpid())
    record = json.loads((busy / owner.RECORD).read_text())
    (busy / owner.RECORD).write_text(json.dumps({**record, "pid": _ended()}))
    begin = "from graftline.workflow.process import begin; begin()"
    code = f"import sys; {begin}; print('at work', flush=True); sys.stdin.read()"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=busy, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"at work\n"
        checkout.prepare(clone(repository, tmp_path / "tmpbprefect"))
        assert busy.is_dir()
        process.kill()
    checkout.prepare(clone(repository, tmp_path / "tmpcprefect"))
    assert not busy.exists(), "the kernel let go of a killed process's lock"


def test_a_machine_that_was_started_again_has_abandoned_what_it_did_before(repository: Path, tmp_path: Path) -> None:
    root = clone(repository, tmp_path / "tmpaprefect")
    owner.record(root, os.getpid())
    assert not owner.is_abandoned(root)
    record = json.loads((root / owner.RECORD).read_text())
    (root / owner.RECORD).write_text(json.dumps({**record, "boot": "another"}))
    assert owner.is_abandoned(root)
    (root / owner.RECORD).write_text(json.dumps({**record, "started": record["started"] - 1}))
    assert owner.is_abandoned(root), "another process has the number now"


def test_a_clock_that_is_set_while_a_run_lives_does_not_take_its_checkout(
    repository: Path, shared: Path, tmp_path: Path
) -> None:
    living, stat = clone(repository, tmp_path / "tmpaprefect"), tmp_path / "stat"
    stat.write_text(re.sub(r"btime (\d+)", lambda found: f"btime {int(found[1]) + 1}", Path("/proc/stat").read_text()))
    check = (
        "import sys; from pathlib import Path; from graftline.workflow import owner; "
        "print(owner.is_abandoned(Path(sys.argv[1])))"
    )
    stepped = f"mount --bind {stat} /proc/stat && exec {sys.executable} -c '{check}' {living}"
    owner.record(living, os.getpid())
    done = subprocess.run(["unshare", "-m", "sh", "-c", stepped], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"only root may show this process another clock: {done.stderr}")
    assert done.stdout == "False\n"


def _ended() -> int:
    """Number of a process that is over."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_clone_of_one_commit_gets_the_revisions_of_a_pull_request(
    repository: Path, shared: Path, tmp_path: Path
) -> None:
    first = git(repository, "rev-list", "--max-parents=0", "HEAD")
    root = clone(repository, tmp_path / "one")
    checkout.prepare(root)
    checkout.deepen(root, first)
    assert git(root, "rev-parse", "--verify", f"{first}^{{commit}}") == first
