"""This repository is a project like those that `graftline init` makes: its files are what the scaffold writes."""

import pytest

from graftline.scaffold.files import THIS_REPOSITORY, Names, contents, shared
from graftline.settings import load
from studies.project import ROOT


def test_this_repository_s_files_are_what_the_scaffold_writes_for_its_names() -> None:
    written = shared(THIS_REPOSITORY)
    assert {path: (ROOT / path).read_text(encoding="utf-8") for path in written} == written


def test_the_scaffold_writes_every_flow_every_task_the_graph_the_deployments_and_the_workflow() -> None:
    own = {path.relative_to(ROOT).as_posix() for name in ("flows", "tasks") for path in (ROOT / name).glob("*.py")}
    own.add(".github/workflows/evaluate-pr.yaml")  # the other one releases graftline itself
    assert own | {"dvc.yaml", "prefect.yaml"} <= shared(Names("p")).keys()


def test_the_names_of_this_repository_are_those_of_its_pipelines() -> None:
    assert load(ROOT / "pipelines.yaml").names == THIS_REPOSITORY.pipelines


@pytest.mark.parametrize("word", ["wordnet", "make setup", "constraints.txt", "checkout of graftline", "examples/"])
def test_nothing_of_this_repository_is_left_in_a_project(word: str) -> None:
    assert [path for path, text in contents(Names("p")).items() if word in text.decode("utf-8")] == []


def test_a_project_s_package_asks_for_this_version_and_installs_nothing_of_the_project() -> None:
    import tomllib
    from importlib.metadata import version

    project = tomllib.loads(contents(Names("p"))["pyproject.toml"].decode("utf-8"))
    assert project["project"]["dependencies"] == [f"graftline[all]=={version('graftline')}"]
    assert project["tool"]["setuptools"] == {"py-modules": []}
