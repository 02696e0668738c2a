"""What a commit changes where a path is not simply a file in git: links, DVC, submodules, scripts, removals."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from graftline.errors import GraftlineError
from graftline.workflow.changes import PipelineChange, find_changes
from tests.line.project import read_yaml, write_yaml
from tests.workflow.stand_in_project import make_repository
from tests.workflow.tiny_project import PIPELINE, change, commit, git

ROWS = '{"prompt": "%s:", "completion": " dog"}\n'


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = make_repository(tmp_path / "project")
    (folder / "set").mkdir()
    (folder / "set" / "rows.jsonl").write_text(ROWS % "barks")
    return folder


def look(root: Path, base: str) -> list[PipelineChange]:
    return find_changes(root, base, commit(root, "head"))


def reasons(root: Path, base: str) -> tuple[str, ...]:
    (found,) = look(root, base)
    assert found.pipeline == PIPELINE
    return found.reasons


def read_from(root: Path, source: str, **more: object) -> str:
    change(root, "data", source=source, **more)
    return commit(root, "base")


def dvc(root: Path, *arguments: str) -> None:
    environment = os.environ | {"DVC_NO_ANALYTICS": "1"}
    subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=root, env=environment, check=True)


@pytest.mark.parametrize("source", ["./set/rows.jsonl", "set//rows.jsonl", "set/../set/rows.jsonl", "set/", "./set/."])
def test_rows_are_found_however_their_path_is_written(root: Path, source: str) -> None:
    base = read_from(root, f"path:{source}")
    (root / "README.md").write_text("other words\n")
    assert look(root, base) == []
    (root / "set" / "rows.jsonl").write_text(ROWS % "digs")
    assert reasons(root, base) == (os.path.normpath(source),)


def test_rows_of_a_pattern_change_with_a_file_that_is_added_to_its_folder(root: Path) -> None:
    base = read_from(root, "path:set/*.jsonl")
    (root / "README.md").write_text("other words\n")
    assert look(root, base) == []
    (root / "set" / "more.jsonl").write_text(ROWS % "digs")
    assert reasons(root, base) == ("set",)


def test_rows_of_a_pattern_that_git_does_not_hold_count_as_changed(root: Path) -> None:
    (root / ".gitignore").write_text("/here/\n/runs/\n")
    (root / "here").mkdir()
    (root / "here" / "rows.jsonl").write_text(ROWS % "barks")
    base = read_from(root, "path:here/*.jsonl")
    (root / "README.md").write_text("other words\n")
    assert reasons(root, base) == ("here (not in git)",)


def test_rows_of_each_of_several_sources_and_of_the_evaluation_are_found(root: Path) -> None:
    for name in ("two", "judge"):
        (root / "set" / f"{name}.jsonl").write_text(ROWS % name)
    change(root, "data", evaluation={"source": "path:set/judge.jsonl"})
    base = read_from(
        root, "path:rows.jsonl", sources=[{"source": "path:set/rows.jsonl"}, {"source": "path:set/two.jsonl"}]
    )
    for name in ("two", "judge"):
        (root / "set" / f"{name}.jsonl").write_text(ROWS % "digs")
    assert set(reasons(root, base)) == {"set/two.jsonl", "set/judge.jsonl"}


def test_rows_by_an_absolute_path_in_the_repository_are_those_of_the_commit(root: Path) -> None:
    base = read_from(root, f"path:{root}/set/rows.jsonl")
    (root / "set" / "rows.jsonl").write_text(ROWS % "digs")
    assert reasons(root, base) == (f"{root}/set/rows.jsonl",)


@pytest.mark.parametrize("link", ["set/now.jsonl", "now", "now/deeper"])
def test_rows_behind_a_link_to_a_file_or_a_folder_are_followed(root: Path, link: str) -> None:
    versions = root / "versions" / "deeper"
    versions.mkdir(parents=True)
    (versions / "v1.jsonl").write_text(ROWS % "barks")
    target = {"set/now.jsonl": "../versions/deeper/v1.jsonl", "now": "versions/deeper", "now/deeper": "versions"}[link]
    (root / link.removesuffix("/deeper")).symlink_to(target)
    base = read_from(root, f"path:{link}")
    (versions / "v1.jsonl").write_text(ROWS % "digs")
    assert reasons(root, base) == (link,)


@pytest.mark.parametrize("source", ["now/../rows.jsonl", "./now/a/../../rows.jsonl", "other/../rows.jsonl"])
def test_the_folder_above_a_link_is_that_above_its_target(root: Path, source: str) -> None:
    inner = root / "versions" / "deeper"
    (inner / "a").mkdir(parents=True)
    (inner / "a" / "empty").write_text("")
    (root / "versions" / "rows.jsonl").write_text(ROWS % "barks")
    (root / "now").symlink_to("versions/deeper")
    (root / "other").symlink_to("now")
    base = read_from(root, f"path:{source}")
    (root / "README.md").write_text("other words\n")
    assert look(root, base) == []
    (root / "versions" / "rows.jsonl").write_text(ROWS % "digs")
    assert reasons(root, base) == ("versions/rows.jsonl",)


def test_a_link_among_the_rows_of_a_folder_is_followed(root: Path) -> None:
    (root / "elsewhere.jsonl").write_text(ROWS % "barks")
    (root / "set" / "more.jsonl").symlink_to("../elsewhere.jsonl")
    base = read_from(root, "path:set")
    (root / "README.md").write_text("other words\n")
    assert look(root, base) == []
    (root / "elsewhere.jsonl").write_text(ROWS % "digs")
    assert reasons(root, base) == ("set",)


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("/somewhere/rows.jsonl", "a link to /somewhere/rows.jsonl, outside the repository"),
        ("../../rows.jsonl", "a link to ../rows.jsonl, outside the repository"),
        ("now.jsonl", "a link to set/now.jsonl, "),
        ("gone.jsonl", "a link to set/gone.jsonl, not in git"),
    ],
)
def test_a_link_to_what_no_commit_decides_counts_as_changed(root: Path, target: str, why: str) -> None:
    (root / "set" / "now.jsonl").symlink_to(target)
    base = read_from(root, "path:set/now.jsonl")
    (root / "README.md").write_text("other words\n")
    (reason,) = reasons(root, base)
    assert reason.startswith(f"set/now.jsonl ({why}")


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("here/rows.jsonl", "not in git"),
        ("here", "not in git"),
        ("set/Rows.jsonl", "not in git"),
        ("../rows.jsonl", "outside the repository"),
        ("/somewhere/rows.jsonl", "outside the repository"),
        ("~/rows.jsonl", "outside the repository"),
    ],
)
def test_rows_that_git_does_not_hold_count_as_changed(root: Path, source: str, why: str) -> None:
    (root / ".gitignore").write_text("/here/\n/runs/\n")
    (root / "here").mkdir()
    (root / "here" / "rows.jsonl").write_text(ROWS % "barks")
    base = read_from(root, f"path:{source}")
    (root / "README.md").write_text("other words\n")
    assert reasons(root, base) == (f"{source} ({why})",)


def test_a_folder_of_which_git_holds_only_a_part_counts_as_changed(root: Path) -> None:
    (root / ".gitignore").write_text("*.bin\n/runs/\n__pycache__\n")
    (root / "set" / "weights.bin").write_text("0")
    (root / "set" / "__pycache__").mkdir()
    (root / "set" / "__pycache__" / "x.pyc").write_text("0")
    base = read_from(root, "path:set")
    (root / "README.md").write_text("other words\n")
    assert reasons(root, base) == ("set (with set/weights.bin, not in git)",)


def test_a_digest_in_the_settings_decides_the_rows_wherever_they_lie(root: Path) -> None:
    base = read_from(root, "path:/somewhere/rows.jsonl", sha256="0" * 64)
    (root / "README.md").write_text("other words\n")
    assert look(root, base) == []
    change(root, "data", sha256="1" * 64)
    assert reasons(root, base) == ("data.sha256",)


@pytest.mark.parametrize("added", ["set/rows.jsonl", "set"])
def test_rows_that_dvc_tracks_are_decided_by_their_dvc_file(root: Path, added: str) -> None:
    dvc(root, "add", "-q", added)
    base = read_from(root, "path:set/rows.jsonl")
    (root / "README.md").write_text("other words\n")
    assert look(root, base) == []
    (root / "set" / "rows.jsonl").write_text(ROWS % "digs")
    dvc(root, "add", "-q", added)
    assert reasons(root, base) == ("set/rows.jsonl",)


def test_a_dvc_file_that_no_pipeline_reads_changes_none(root: Path) -> None:
    base = commit(root, "base")
    (root / "other.bin").write_text("0")
    dvc(root, "add", "-q", "other.bin")
    assert look(root, base) == []


def test_rows_that_another_stage_makes_change_with_what_it_depends_on(root: Path) -> None:
    (root / "make.py").write_text("first\n")
    graph = (root / "dvc.yaml").read_text()
    made = "  make-rows:\n    cmd: python make.py\n    deps: [make.py]\n    outs: [made]\n"
    (root / "dvc.yaml").write_text(graph + made)
    base = read_from(root, "path:made/rows.jsonl")
    (root / "README.md").write_text("other words\n")
    assert look(root, base) == []
    (root / "make.py").write_text("second\n")
    assert reasons(root, base) == ("made/rows.jsonl",)


def test_rows_in_a_submodule_change_when_it_moves_on(root: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    git(theirs, "init", "-q")
    (theirs / "rows.jsonl").write_text(ROWS % "barks")
    commit(theirs, "first")
    git(root, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(theirs), "theirs")
    base = read_from(root, "path:theirs/rows.jsonl")
    (root / "README.md").write_text("other words\n")
    assert look(root, base) == []
    (root / "theirs" / "rows.jsonl").write_text(ROWS % "digs")
    commit(root / "theirs", "second")
    assert reasons(root, base) == ("theirs/rows.jsonl",)


@pytest.mark.parametrize(
    ("imported", "file"),
    [
        ("import helpers", "helpers.py"),
        ("from helpers import tidy", "helpers/tidy.py"),
        ("from scripts.lib import tidy", "scripts/lib.py"),
        ("import sys; sys.path.insert(0, 'scripts'); import tidy", "scripts/tidy.py"),
        ("def rows(source):\n    from scripts import late", "scripts/late.py"),
        ("import importlib; importlib.import_module('scripts.named')", "scripts/named.py"),
        ("words = open('scripts/words.txt')", "scripts/words.txt"),
        ("from pathlib import Path; words = Path(__file__).with_name('words.txt')", "scripts/words.txt"),
    ],
)
def test_what_a_script_that_makes_rows_imports_or_names_is_a_part_of_it(root: Path, imported: str, file: str) -> None:
    (root / file).parent.mkdir(exist_ok=True)
    (root / file).write_text("first = 1\n")
    (root / "scripts").mkdir(exist_ok=True)
    (root / "scripts" / "rows.py").write_text(imported)
    base = read_from(root, "path:set", prepare="scripts/rows.py")
    (root / "README.md").write_text("other words\n")
    assert look(root, base) == []
    (root / file).write_text("second = 2\n")
    assert reasons(root, base) == (file,)


def test_the_modules_of_a_script_in_a_folder_behind_a_link_are_a_part_of_it(root: Path) -> None:
    (root / "real").mkdir()
    (root / "real" / "rows.py").write_text("from scripts import helper")
    (root / "real" / "helper.py").write_text("first = 1\n")
    (root / "scripts").symlink_to("real")
    base = read_from(root, "path:set", prepare="scripts/rows.py")
    (root / "real" / "helper.py").write_text("second = 2\n")
    assert reasons(root, base) == ("scripts/helper.py",)


def test_a_module_of_a_script_that_git_does_not_hold_counts_as_changed(root: Path) -> None:
    (root / ".gitignore").write_text("/private.py\n/runs/\n")
    (root / "private.py").write_text("")
    (root / "rows.py").write_text("import private\n")
    base = read_from(root, "path:set", prepare="rows.py")
    (root / "README.md").write_text("other words\n")
    assert reasons(root, base) == ("private.py (not in git)",)


@pytest.mark.parametrize("name", ["rows", "words"])
def test_each_parameter_of_a_file_of_its_own_counts(root: Path, name: str) -> None:
    graph = (root / "dvc.yaml").read_text()
    own = "        - pipelines.${key}.data\n      - own.yaml:\n        - rows\n        - words\n"
    (root / "dvc.yaml").write_text(graph.replace("        - pipelines.${key}.data\n", own, 1))
    (root / "own.yaml").write_text("rows: 1\nwords: 1\n")
    base = commit(root, "base")
    (root / "own.yaml").write_text("rows: 1\nwords: 1\n".replace(f"{name}: 1", f"{name}: 2"))
    assert reasons(root, base) == (f"own.yaml:{name}",)


def test_a_removed_pipeline_is_a_change(root: Path) -> None:
    document = read_yaml(root)
    document["pipelines"]["other"] = document["pipelines"][PIPELINE]
    write_yaml(root, document)
    base = commit(root, "base")
    del document["pipelines"]["other"]
    write_yaml(root, document)
    (found,) = look(root, base)
    assert (found.pipeline, found.removed, found.reasons) == ("other", True, ("the pipeline is removed",))


def test_a_renamed_pipeline_is_one_that_is_new_and_one_that_is_removed(root: Path) -> None:
    base = commit(root, "base")
    document = read_yaml(root)
    document["pipelines"] = {"renamed": document["pipelines"][PIPELINE]}
    write_yaml(root, document)
    assert [(found.pipeline, found.removed) for found in look(root, base)] == [("renamed", False), (PIPELINE, True)]


def test_a_removed_stage_is_a_change_of_all_that_came_after_it(root: Path) -> None:
    base = commit(root, "base")
    graph = (root / "dvc.yaml").read_text()
    start, end = graph.index("  validate:\n"), graph.index("  init:\n")
    (root / "dvc.yaml").write_text((graph[:start] + graph[end:]).replace("      - runs/${key}/validate\n", ""))
    (found,) = look(root, base)
    assert found.reasons == ("train no longer needs validate", "the stage validate is removed")
    assert found.stages == ("train", "evaluate", "gate", "merge", "package", "release")


def test_a_removed_last_stage_is_a_change_though_none_comes_after_it(root: Path) -> None:
    base = commit(root, "base")
    graph = (root / "dvc.yaml").read_text()
    (root / "dvc.yaml").write_text(graph[: graph.index("  release:\n")])
    assert reasons(root, base) == ("the stage release is removed",)


def test_a_dependency_that_is_taken_away_is_a_change(root: Path) -> None:
    base = commit(root, "base")
    graph = (root / "dvc.yaml").read_text()
    (root / "dvc.yaml").write_text(graph.replace("      - runs/${key}/validate\n      - runs/${key}/init\n", ""))
    (found,) = look(root, base)
    assert found.reasons == ("train no longer needs init", "train no longer needs validate")


def test_a_branch_behind_its_base_is_not_charged_with_what_it_lacks(root: Path) -> None:
    commit(root, "rows")
    git(root, "checkout", "-q", "-b", "feature")
    (root / "README.md").write_text("other words\n")
    head = commit(root, "documentation")
    git(root, "checkout", "-q", "main")
    change(root, "train", steps=9)
    base = commit(root, "main moves on")
    assert find_changes(root, base, head) == []
    (found,) = find_changes(root, head, base)
    assert found.reasons == ("train.steps",)


def test_commits_that_have_nothing_in_common_are_refused(root: Path) -> None:
    base = commit(root, "base")
    git(root, "checkout", "-q", "--orphan", "alone")
    with pytest.raises(GraftlineError, match=r"have no commit in common; give a base that the head was branched from"):
        look(root, base)


def test_packages_that_the_pipelines_run_with_are_an_input_and_tools_are_not(root: Path) -> None:
    project = '[project]\ndependencies = ["torch"]\n[project.optional-dependencies]\ndev = ["ruff"]\n[tool.ruff]\n'
    (root / "pyproject.toml").write_text(project)
    (root / "constraints.txt").write_text("# a comment\nruff==0.1\ntorch==2.0\nsympy==1.0\n")
    base = commit(root, "base")
    (root / "pyproject.toml").write_text(project + "line-length = 120\n")
    (root / "constraints.txt").write_text("ruff==0.2\ntorch==2.0  # why\nsympy==1.0\n")
    assert look(root, base) == []
    (root / "constraints.txt").write_text("ruff==0.2\ntorch==2.1\nsympy==1.0\n")
    assert reasons(root, base) == ("constraints.txt",)
