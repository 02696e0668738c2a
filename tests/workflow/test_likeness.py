"""A worktree has what its checkout has: rows, stores, caches, DVC's settings; and the checkout is left alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from dvc.config import Config
from filelock import FileLock

from graftline.workflow import worktree
from tests.workflow.stand_in_project import make_repository
from tests.workflow.tiny_project import change, commit, git

ROWS = '{"prompt": "%s:", "completion": " dog"}\n'
BARKS, DIGS = ROWS % "barks", ROWS % "digs"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_repository(tmp_path / "home" / "project")


def dvc(folder: Path, *arguments: str) -> str:
    environment = os.environ | {"DVC_NO_ANALYTICS": "1"}
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


def write(path: Path, text: str = BARKS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def read_from(root: Path, name: str) -> str:
    change(root, "data", source=f"path:{name}")
    return commit(root, f"rows from {name}")


def ignore(root: Path, *patterns: str) -> None:
    (root / ".gitignore").write_text("".join(f"{pattern}\n" for pattern in ("/runs/", "/.cache", *patterns)))


def state(root: Path) -> tuple[str, ...]:
    """All that git could have changed in a checkout."""
    commands = (["status", "--porcelain"], ["branch", "-a"], ["stash", "list"], ["worktree", "list"], ["config", "-l"])
    index = Path(git(root, "rev-parse", "--absolute-git-dir")) / "index"
    return (*(git(root, *command) for command in commands), git(root, "rev-parse", "HEAD"), index.read_bytes().hex())


@pytest.mark.parametrize("name", ["here/rows.jsonl", "./here/rows.jsonl", "here", "../rows.jsonl", "../../rows.jsonl"])
def test_rows_that_git_does_not_hold_are_those_of_the_checkout(root: Path, name: str) -> None:
    ignore(root, "/here/")
    write(root / (name if name != "here" else "here/rows.jsonl"))
    head = read_from(root, name)
    with worktree.isolated(root, head) as tree:
        found = tree / (name if name != "here" else "here/rows.jsonl")
        assert found.read_text() == BARKS
    assert (root / (name if name != "here" else "here/rows.jsonl")).read_text() == BARKS


def test_rows_behind_links_are_those_of_the_checkout(root: Path, tmp_path: Path) -> None:
    ignore(root, "/here", "/disk")
    write(tmp_path / "disk" / "v1.jsonl")
    (root / "disk").symlink_to(tmp_path / "disk")  # ignored, as a mount is
    (root / "now.jsonl").symlink_to("disk/v1.jsonl")  # committed
    head = read_from(root, "now.jsonl")
    with worktree.isolated(root, head) as tree:
        assert (tree / "now.jsonl").read_text() == BARKS


def test_a_folder_that_git_holds_in_part_is_whole(root: Path) -> None:
    ignore(root, "*.bin")
    write(root / "model" / "config.json", "{}")
    write(root / "model" / "parts" / "weights.bin", "weights")
    change(root, "base", source="path:model")
    with worktree.isolated(root, commit(root, "model")) as tree:
        assert (tree / "model" / "parts" / "weights.bin").read_text() == "weights"
        assert not (tree / "model" / "config.json").is_symlink()


def test_a_file_that_only_another_commit_has_is_not_brought(root: Path) -> None:
    base = read_from(root, "later.jsonl")
    write(root / "later.jsonl")
    commit(root, "rows")
    with worktree.isolated(root, base) as tree:
        assert not (tree / "later.jsonl").exists()


def test_what_one_commit_needed_is_gone_at_the_next(root: Path) -> None:
    ignore(root, "/here/")
    write(root / "here" / "rows.jsonl")
    base = read_from(root, "here/rows.jsonl")
    ignore(root)
    write(root / "here" / "rows.jsonl", DIGS)
    head = read_from(root, "here/rows.jsonl")
    with worktree.isolated(root, base) as tree:
        worktree.switch(tree, head)
        assert not (tree / "here").is_symlink()
        assert (tree / "here" / "rows.jsonl").read_text() == DIGS
        (tree / "here" / "rows.jsonl").write_text("of the worktree")
    assert (root / "here" / "rows.jsonl").read_text() == DIGS


def test_a_script_s_module_that_git_does_not_hold_is_that_of_the_checkout(root: Path) -> None:
    ignore(root, "/private.py")
    write(root / "private.py", "secret = 1\n")
    write(root / "rows.py", "import private\n")
    change(root, "data", source="path:rows.jsonl", prepare="rows.py")
    with worktree.isolated(root, commit(root, "script")) as tree:
        assert (tree / "private.py").read_text() == "secret = 1\n"


@pytest.mark.parametrize("store", ["store", "deep/store", "../store", "./store/"])
def test_a_store_that_is_a_folder_is_that_of_the_checkout(root: Path, store: str) -> None:
    ignore(root, "/store/", "/deep/")
    write(root / store / "channels" / "production")
    change(root, "release", store=store)
    with worktree.isolated(root, commit(root, "store")) as tree:
        assert (tree / store / "channels" / "production").read_text() == BARKS
    assert (root / store / "channels" / "production").is_file()


@pytest.mark.parametrize("added", ["set/rows.jsonl", "set"])
def test_rows_that_dvc_tracks_are_those_of_the_commit(root: Path, added: str) -> None:
    write(root / "set" / "rows.jsonl", BARKS)
    dvc(root, "add", "-q", added)
    base = read_from(root, "set/rows.jsonl")
    write(root / "set" / "rows.jsonl", DIGS)
    dvc(root, "add", "-q", added)
    head = commit(root, "other rows")
    with worktree.isolated(root, base) as tree:
        assert (tree / "set" / "rows.jsonl").read_text() == BARKS
        worktree.switch(tree, head)
        assert (tree / "set" / "rows.jsonl").read_text() == DIGS
    assert (root / "set" / "rows.jsonl").read_text() == DIGS


def test_rows_that_only_dvc_s_remote_has_are_pulled(root: Path) -> None:
    dvc(root, "remote", "add", "--default", "near", "../remote")
    write(root / "set" / "rows.jsonl")
    dvc(root, "add", "-q", "set/rows.jsonl")
    head = read_from(root, "set/rows.jsonl")
    dvc(root, "push", "-q")
    git(root, "clone", "-q", ".", "../clone")
    with worktree.isolated(root.parent / "clone", head) as tree:
        assert (tree / "set" / "rows.jsonl").read_text() == BARKS


def test_rows_that_dvc_has_lost_are_not_those_of_another_commit(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(root / "set" / "rows.jsonl", BARKS)
    dvc(root, "add", "-q", "set/rows.jsonl")
    base = read_from(root, "set/rows.jsonl")
    dvc(root, "cache", "dir", "--local", str(tmp_path / "other cache"))
    write(root / "set" / "rows.jsonl", DIGS)
    dvc(root, "add", "-q", "set/rows.jsonl")
    with worktree.isolated(root, base) as tree:
        assert not (tree / "set" / "rows.jsonl").exists()
    assert "set/rows.jsonl.dvc cannot be checked out; run `dvc pull`: " in caplog.text


def test_submodules_are_those_of_the_commit_with_theirs(root: Path, tmp_path: Path) -> None:
    inner, outer = tmp_path / "inner", tmp_path / "outer"
    allowed = ("-c", "protocol.file.allow=always", "submodule", "--quiet")
    for folder in (inner, outer):
        folder.mkdir()
        git(folder, "init", "-q")
    write(inner / "rows.jsonl")
    commit(inner, "inner")
    git(outer, *allowed, "add", str(inner), "inner")
    commit(outer, "outer")
    git(root, *allowed, "add", str(outer), "outer")
    git(root, *allowed, "update", "--init", "--recursive")
    base = read_from(root, "outer/inner/rows.jsonl")
    write(root / "outer" / "more.jsonl", DIGS)
    commit(root / "outer", "more")
    head = commit(root, "submodule moves on")
    before = state(root)
    with worktree.isolated(root, base) as tree:
        assert (tree / "outer" / "inner" / "rows.jsonl").read_text() == BARKS
        assert not (tree / "outer" / "more.jsonl").exists()
        worktree.switch(tree, head)
        assert (tree / "outer" / "more.jsonl").read_text() == DIGS
    assert state(root) == before
    assert git(root / "outer", "worktree", "list").count("\n") == 0


@pytest.mark.parametrize(
    "command",
    [
        ("cache", "dir", "--local", "../cache"),
        ("cache", "dir", "../cache"),
        ("cache", "dir", "--local", "{absolute}"),
        ("cache", "dir", "{absolute}"),
    ],
)
def test_dvc_s_cache_is_that_of_the_checkout(root: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    dvc(root, *(word.replace("{absolute}", str(tmp_path / "cache")) for word in command))
    if "--local" not in command:
        commit(root, "cache")
    with worktree.isolated(root, "HEAD") as tree:
        assert dvc(tree, "cache", "dir") == dvc(root, "cache", "dir")


def test_dvc_s_cache_that_the_user_s_own_settings_name_is_used(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "dvc" / "config", "[cache]\n    dir = mine\n")
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path / "dvc"))
    assert worktree.cache_dir(root) == tmp_path / "dvc" / "mine"
    with worktree.isolated(root, "HEAD") as tree:
        assert worktree.cache_dir(tree) == tmp_path / "dvc" / "mine"


SHARED = """\
[core]
    remote = near
['remote "near"']
    url = ../../remote
['remote "far"']
    url = s3://bucket/x
"""
OWN = """\
[cache]
    type = copy
['remote "mine"']
    url = ../../mine
['remote "far"']
    access_key_id = key
"""


def test_dvc_s_remotes_and_other_settings_are_those_of_the_checkout(root: Path) -> None:
    (root / ".dvc" / "config").write_text(SHARED)
    (root / ".dvc" / "config.local").write_text(OWN)
    with worktree.isolated(root, commit(root, "remotes")) as tree:
        found = Config(str(tree / ".dvc"))
    assert {name: remote["url"] for name, remote in found["remote"].items()} == {
        "near": str(root.parent / "remote"),
        "mine": str(root.parent / "mine"),
        "far": "s3://bucket/x",
    }
    assert found["remote"]["far"]["access_key_id"] == "key"
    assert (found["cache"]["type"], found["core"]["remote"]) == (["copy"], "near")


def test_a_cache_folder_that_is_a_link_leads_to_the_checkout_all_the_same(root: Path, tmp_path: Path) -> None:
    ignore(root, "/store/")
    write(root / "store" / "x")
    head = commit(root, "store")
    (tmp_path / "disk").mkdir()
    (root / ".cache").symlink_to(tmp_path / "disk")
    with worktree.isolated(root, head) as tree:
        assert (tree / "store" / "x").read_text() == BARKS


def test_the_user_s_checkout_is_left_alone_whatever_state_it_is_in(root: Path) -> None:
    base = git(root, "rev-parse", "HEAD")
    change(root, "train", steps=9)
    head = commit(root, "head")
    (root / "rows.jsonl").write_text(DIGS)
    git(root, "-c", "user.name=t", "-c", "user.email=t@t", "stash", "-q")
    (root / "rows.jsonl").write_text(DIGS)
    git(root, "add", "rows.jsonl")
    (root / "README.md").write_text("not added\n")
    before = state(root)
    with worktree.isolated(root, base) as tree:
        worktree.switch(tree, head)
    assert state(root) == before


@pytest.mark.parametrize("kind", ["linked worktree", "submodule"])
def test_a_checkout_whose_git_folder_lies_elsewhere_is_as_good(root: Path, tmp_path: Path, kind: str) -> None:
    write(root / "set" / "rows.jsonl")
    dvc(root, "add", "-q", "set/rows.jsonl")
    head = read_from(root, "set/rows.jsonl")
    outer = tmp_path / "outer"
    if kind == "linked worktree":
        git(root, "worktree", "add", "-q", str(outer / "project"))
    else:
        outer.mkdir()
        git(outer, "init", "-q")
        git(outer, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(root), "project")
    dvc(outer / "project", "cache", "dir", "--local", str(root / ".dvc" / "cache"))
    before, whole = state(outer / "project"), state(root)
    with worktree.isolated(outer / "project", head) as tree:
        assert (tree / "set" / "rows.jsonl").read_text() == BARKS
        assert git(tree, "rev-parse", "HEAD") == head
        assert dvc(tree, "root").strip() == "."
        assert Path(git(tree, "rev-parse", "--show-toplevel")) == tree
    assert state(outer / "project") == before
    assert state(root) == whole


def test_hooks_do_not_run_in_a_worktree(root: Path, tmp_path: Path) -> None:
    dvc(root, "install")
    hook = root / ".git" / "hooks" / "post-checkout"
    hook.write_text(f"#!/bin/sh\ntouch '{tmp_path}/ran'\nexit 1\n")
    hook.chmod(0o755)
    with worktree.isolated(root, "HEAD") as tree:
        worktree.switch(tree, "HEAD")
    assert not (tmp_path / "ran").exists()


KILLED = """
import os, sys
from pathlib import Path
from graftline.workflow import worktree
with worktree.isolated(Path.cwd(), "HEAD") as tree:
    print(tree, flush=True)
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_process_left_is_removed_by_the_next_and_what_a_living_one_has_is_not(root: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED], cwd=root, capture_output=True, text=True)
    left = Path(killed.stdout.strip())
    assert (left / "pipelines.yaml").is_file(), killed.stderr
    with worktree.isolated(root, "HEAD") as living:
        assert not left.exists()
        with worktree.isolated(root, "HEAD") as tree:
            assert (living / "pipelines.yaml").is_file()
            assert git(root, "worktree", "list").count("\n") == 2
            assert tree != living
    assert git(root, "worktree", "list").count("\n") == 0
    assert [path.name for path in (root / ".cache" / "worktrees").iterdir()] == ["lock"]


def test_a_worktree_that_another_process_is_making_is_waited_for(root: Path) -> None:
    place = root / ".cache" / "worktrees"
    place.mkdir(parents=True)
    with FileLock(place / "made.lock"):
        (place / "made").mkdir()
        with worktree.isolated(root, "HEAD"):
            assert (place / "made").is_dir()
    with worktree.isolated(root, "HEAD"):
        assert not (place / "made").exists()
