"""Which pipelines differ between two commits of a scratch repository. Nothing is run."""

from pathlib import Path

import pytest

from graftline.errors import GraftlineError
from graftline.workflow.changes import find_changes
from graftline.workflow.git import commit_of
from graftline.workflow.worktree import isolated, switch
from tests.line.project import read_yaml, write_yaml
from tests.workflow.tiny_project import PIPELINE, change, commit, git, make_repository

FROM_TRAIN = ("train", "evaluate", "merge", "gate", "package", "release")
ALL = ("fetch", "validate", "init", *FROM_TRAIN)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_repository(tmp_path_factory.mktemp("repository") / "my project")


@pytest.fixture
def base(repository: Path):
    """The first commit; what a test commits is left behind afterwards."""
    first = git(repository, "rev-parse", "main")
    git(repository, "checkout", "-q", "--detach", "main")
    yield first
    git(repository, "checkout", "-q", "--force", "--detach", "main")


def test_documentation_changes_no_pipeline(repository: Path, base: str) -> None:
    (repository / "README.md").write_text("other words")
    (repository / "docs").mkdir(exist_ok=True)
    (repository / "docs" / "page.md").write_text("more words")

    assert find_changes(repository, base, commit(repository, "docs")) == []


def test_a_parameter_changes_the_stage_that_reads_it_and_all_after_it(repository: Path, base: str) -> None:
    change(repository, "train", steps=9)

    (found,) = find_changes(repository, base, commit(repository, "steps"))

    assert (found.pipeline, found.stages, found.reasons) == (PIPELINE, FROM_TRAIN, ("train.steps",))


def test_a_margin_changes_the_gate_but_no_training(repository: Path, base: str) -> None:
    document = read_yaml(repository)
    document["pipelines"][PIPELINE]["gates"]["accuracy"]["margin"] = 0.2
    write_yaml(repository, document)

    (found,) = find_changes(repository, base, commit(repository, "margin"))

    assert found.stages == ("gate", "package", "release")
    assert found.reasons == ("gates.accuracy.margin",)


def test_code_of_the_library_changes_the_stages_that_use_it(repository: Path, base: str) -> None:
    file = repository / "graftline" / "train" / "loss.py"
    file.write_text(file.read_text() + "\n# another comment\n")
    assert find_changes(repository, base, commit(repository, "a comment")) == []

    file.write_text(file.read_text() + "\nFURTHER = 1\n")
    (found,) = find_changes(repository, base, commit(repository, "code"))

    assert found.stages[0] == "train"
    assert found.reasons == ("code: graftline.train.loss",)


def test_other_rows_in_a_local_file_change_everything(repository: Path, base: str) -> None:
    file = repository / "rows.jsonl"
    file.write_text(file.read_text().replace("barks", "howls"))

    (found,) = find_changes(repository, base, commit(repository, "rows"))

    assert found.stages == ALL
    assert found.reasons == ("rows.jsonl",)


def test_a_new_pipeline_is_changed_from_its_first_stage(repository: Path, base: str) -> None:
    document = read_yaml(repository)
    document["pipelines"]["more-pets"] = document["pipelines"][PIPELINE]
    write_yaml(repository, document)

    (found,) = find_changes(repository, base, commit(repository, "new"))

    assert (found.pipeline, found.stages) == ("more-pets", ALL)


def test_a_broken_graph_is_an_error_that_names_the_commit(repository: Path, base: str) -> None:
    (repository / "dvc.yaml").write_text("stages: [")
    broken = commit(repository, "broken")

    with pytest.raises(GraftlineError, match=rf"the graph of {broken[:12]} cannot be read: .*fix dvc.yaml there"):
        find_changes(repository, base, broken)


def test_dvc_s_own_configuration_is_blamed_where_it_is_broken(
    repository: Path, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "global" / "config").parent.mkdir()
    (tmp_path / "global" / "config").write_text("[core\n", encoding="utf-8")
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path / "global"))
    (repository / "new.txt").write_text("new", encoding="utf-8")
    new = commit(repository, "new")
    with pytest.raises(
        GraftlineError, match=r"DVC's configuration cannot be read: .* `graftline doctor` names the file"
    ):
        find_changes(repository, base, new)


def test_an_unknown_revision_says_what_to_fetch(repository: Path) -> None:
    with pytest.raises(GraftlineError, match=r"revision 'nope' is not in .*; fetch it first: git fetch origin nope"):
        commit_of(repository, "nope")


def test_a_revision_is_never_an_option_of_git(repository: Path) -> None:
    with pytest.raises(GraftlineError, match="revision '--all' is not in"):
        commit_of(repository, "--all")


def test_a_worktree_shares_caches_and_store_and_is_gone_afterwards(repository: Path, base: str) -> None:
    (repository / "store").mkdir(exist_ok=True)
    (repository / "store" / "release").touch()
    (repository / "README.md").write_text("head")
    head = commit(repository, "head")

    with isolated(repository, base) as tree:
        assert (tree / "store" / "release").exists()
        assert (tree / ".cache").resolve() == repository / ".cache"
        assert str(repository / ".dvc" / "cache") in (tree / ".dvc" / "config.local").read_text()
        (tree / "runs").mkdir()
        switch(tree, head)
        assert (tree / "README.md").read_text() == "head"
        assert (tree / "runs").is_dir()

    assert not tree.exists()
    assert git(repository, "worktree", "list").count("\n") == 0
    assert (repository / "store" / "release").exists()


def test_a_worktree_is_gone_after_an_error_too(repository: Path, base: str) -> None:
    with pytest.raises(RuntimeError), isolated(repository, base) as tree:
        raise RuntimeError

    assert not tree.exists()
    assert git(repository, "worktree", "list").count("\n") == 0
