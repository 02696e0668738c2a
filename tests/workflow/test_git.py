"""Git as a flow runs it: the names that people write, and git's own words where it refuses."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from graftline.workflow import checkout
from graftline.workflow.git import GitError, commit_of, git, merge_base, snapshot
from tests.workflow.tiny_project import commit
from tests.workflow.tiny_project import git as run


@pytest.fixture
def team(tmp_path: Path) -> Path:
    """A server's repository: main with two commits, a branch with a slash, a tag, a pull request."""
    root = tmp_path / "team"
    root.mkdir()
    run(root, "init", "-q", "-b", "main")
    for text in ("first", "second"):
        (root / "words").write_text(text)
        commit(root, text)
    for name in ("team/feature-x", "other"):
        run(root, "checkout", "-q", "-b", name)
        (root / "words").write_text(name)
        commit(root, name)
    run(root, "tag", "v1.0", "main~1")
    run(root, "update-ref", "refs/pull/7/head", "other")
    run(root, "branch", "-q", "-f", "main-2", "other")
    run(root, "checkout", "-q", "main")
    run(root, "branch", "-q", "-D", "other", "main-2")
    return root


@pytest.fixture
def clone(team: Path, tmp_path: Path) -> Path:
    """What a worker works in: one commit of one branch."""
    run(tmp_path, "clone", "-q", "--depth", "1", "--branch", "main", f"file://{team}", "clone")
    run(tmp_path / "clone", "config", "--local", "graftline.disposable", "true")
    return tmp_path / "clone"


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("main", "main"),
        ("origin/main", "main"),
        ("team/feature-x", "team/feature-x"),
        ("origin/team/feature-x", "team/feature-x"),
        ("refs/heads/team/feature-x", "team/feature-x"),
        ("refs/remotes/origin/team/feature-x", "team/feature-x"),
        ("v1.0", "v1.0"),
        ("refs/tags/v1.0", "v1.0"),
        ("refs/pull/7/head", "refs/pull/7/head"),
        ("pull/7/head", "refs/pull/7/head"),
        ("HEAD", "main"),
        ("HEAD~1", "main~1"),
        ("team/feature-x~2", "main~1"),
    ],
)
def test_a_worker_finds_a_revision_by_every_name_that_people_give_it(
    clone: Path, team: Path, name: str, theirs: str
) -> None:
    checkout.deepen(clone, "main", name)
    assert commit_of(clone, name) == run(team, "rev-parse", theirs)


@pytest.mark.parametrize(
    "name",
    [
        "fix/#12-words",
        "anna@home",
        "a,b=c",
        "wip!",
        "50%",
        "(x)",
        "it's",
        "re\u0301pare\u0301",
        "🦜",
        "$HOME",
        "a{b}",
        "-",
    ],
)
def test_a_worker_finds_a_branch_by_any_name_that_git_allows(clone: Path, team: Path, name: str) -> None:
    run(team, "update-ref", f"refs/heads/{name}", "team/feature-x")
    for written in (f"refs/heads/{name}", f"origin/{name}", *([] if name == "-" else [name])):
        checkout.deepen(clone, written)
        assert commit_of(clone, written) == run(team, "rev-parse", "team/feature-x")


def test_a_worker_finds_commits_by_their_long_and_short_names(clone: Path, team: Path) -> None:
    whole = run(team, "rev-parse", "team/feature-x")
    checkout.deepen(clone, whole, whole[:9])
    assert commit_of(clone, whole) == commit_of(clone, whole[:9]) == whole


@pytest.mark.parametrize(
    "name", ["-x", "--all", "--upload-pack=touch x", "main:refs/heads/x", "+main", "*", "", "^main"]
)
def test_what_is_not_a_name_is_refused_and_changes_nothing(clone: Path, name: str) -> None:
    before = run(clone, "for-each-ref", "refs/heads")
    with pytest.raises(GitError, match=r"expected the name of a branch or a tag, or a commit|neither here nor on the"):
        checkout.deepen(clone, name)
    with pytest.raises(GitError, match="is not in"):
        commit_of(clone, name)
    assert run(clone, "for-each-ref", "refs/heads") == before


def test_a_branch_that_the_server_does_not_have_is_told_with_git_s_words(clone: Path) -> None:
    with pytest.raises(GitError, match=r"'nope' is neither here nor on the server: .*couldn't find remote ref nope"):
        checkout.deepen(clone, "nope")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("nope", "git fetch origin nope"),
        ("origin/nope", "git fetch origin nope"),
        ("refs/remotes/origin/team/nope", "git fetch origin team/nope"),
        ("refs/heads/nope", "git fetch origin nope"),
        ("fork/nope", "git fetch fork nope"),
        ("team/nope", "git fetch origin team/nope"),
        ("nope~3", "git fetch origin nope"),
        ("fix/#12@home", "git fetch origin 'fix/#12@home'"),
    ],
)
def test_the_advice_for_a_revision_that_is_not_there_can_be_copied(team: Path, name: str, advice: str) -> None:
    for server in ("origin", "fork"):
        run(team, "remote", "add", server, "https://git.example/repository")
    with pytest.raises(GitError, match=rf"revision '{name}' is not in .*; fetch it first: {advice}$"):
        commit_of(team, name)


@pytest.mark.parametrize("name", ["v 1", "main ", "a\nb", "a\0b", "HEAD:words", "main..HEAD", "@{-9}"])
def test_what_cannot_be_the_name_of_a_branch_is_told_so_and_not_to_be_fetched(team: Path, name: str) -> None:
    with pytest.raises(GitError, match=r"expected the name of a branch or a tag, or a commit$"):
        commit_of(team, name)


def test_a_revision_beyond_the_end_of_a_shallow_clone_says_so(clone: Path) -> None:
    with pytest.raises(GitError, match=r"'HEAD~1' is not in .*; this clone is shallow: git fetch --unshallow"):
        commit_of(clone, "HEAD~1")


def test_a_shallow_clone_without_the_commit_in_common_says_so(clone: Path, team: Path) -> None:
    run(clone, "fetch", "-q", "--depth", "1", "origin", "team/feature-x")
    with pytest.raises(GitError, match=r"no commit in common; this clone is shallow: run git fetch --unshallow"):
        merge_base(clone, commit_of(clone, "HEAD"), commit_of(clone, "FETCH_HEAD"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a folder away")
def test_the_checkout_of_another_owner_is_refused_with_git_s_own_words(team: Path) -> None:
    subprocess.run(["chown", "-R", "12345:12345", str(team)], check=True)
    words = rf"detected dubious ownership in repository at .* git config --global --add safe.directory {team}"
    for ask in (lambda: commit_of(team, "main"), lambda: checkout.is_disposable(team)):
        with pytest.raises(GitError, match=words):
            ask()


def test_a_folder_that_is_not_a_repository_is_told_with_git_s_own_words(tmp_path: Path) -> None:
    with pytest.raises(GitError, match="not a git repository"):
        snapshot(tmp_path)


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Another repository, which a hook's or an alias's environment names."""
    root = tmp_path / "foreign"
    root.mkdir()
    run(root, "init", "-q", "-b", "main")
    (root / "foreign").write_text("x")
    commit(root, "foreign")
    return root


def test_nothing_that_a_hook_or_an_alias_leaves_reaches_git(
    team: Path, foreign: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = run(team, "rev-parse", "main")
    index = tmp_path / "index"
    shutil.copyfile(foreign / ".git" / "index", index)
    for name, value in {
        "GIT_DIR": str(foreign / ".git"),
        "GIT_WORK_TREE": str(foreign),
        "GIT_INDEX_FILE": str(index),
        "GIT_OBJECT_DIRECTORY": str(foreign / ".git" / "objects"),
        "GIT_COMMON_DIR": str(foreign / ".git"),
        "GIT_NAMESPACE": "other",
        "GIT_PREFIX": "sub/",
        "GIT_CEILING_DIRECTORIES": str(tmp_path),
        "GIT_LITERAL_PATHSPECS": "1",
        "GIT_CONFIG_PARAMETERS": f"'core.worktree'='{foreign}'",
        "GIT_CONFIG_COUNT": "2",
        "GIT_CONFIG_KEY_0": "core.worktree",
        "GIT_CONFIG_VALUE_0": str(foreign),
        "GIT_CONFIG_KEY_1": "safe.directory",
        "GIT_CONFIG_VALUE_1": "/trusted",
    }.items():
        monkeypatch.setenv(name, value)
    assert commit_of(team, "main") == expected
    assert git(team, "status", "--porcelain") == ""
    assert Path(git(team, "rev-parse", "--show-toplevel").strip()) == team
    # Whom the user trusts is the user's to say, in a variable too.
    assert git(team, "config", "--get-all", "safe.directory").split()[-1] == "/trusted"
    assert index.read_bytes() == (foreign / ".git" / "index").read_bytes()


def test_the_status_of_a_checkout_leaves_its_index_alone(team: Path) -> None:
    (team / "words").write_text("second")  # The same words at another time: git would note the time.
    os.utime(team / "words", (0, 0))
    before = (team / ".git" / "index").read_bytes()
    assert git(team, "status", "--porcelain") == ""
    assert (team / ".git" / "index").read_bytes() == before
