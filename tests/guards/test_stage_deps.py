"""DVC does not follow imports, so a stage must list the code that it uses. Compared with the real import closure."""

import runpy
from pathlib import Path

import grimp
import pytest
from ruamel.yaml import YAML

from graftline.workflow.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = runpy.run_path(str(ROOT / "docs" / "make_stage_deps.py"))


@pytest.fixture(scope="module")
def declared() -> dict[str, set[str]]:
    stages = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
    return {name: {dep for dep in body["do"]["deps"] if not dep.startswith("runs/")} for name, body in stages.items()}


def test_dvc_yaml_and_the_flow_name_the_same_stages(declared: dict[str, set[str]]) -> None:
    assert tuple(declared) == STAGES


def test_every_stage_declares_the_code_that_it_imports(declared: dict[str, set[str]]) -> None:
    imports = grimp.build_graph("graftline", "tasks", "flows", cache_dir=None)
    wrong = []
    for stage in STAGES:
        used = SCRIPT["used_places"](stage, imports)
        if declared[stage] != used:
            wrong.append(f"{stage}: missing {used - declared[stage]}, not used {declared[stage] - used}")
    assert not wrong, "\n".join([*wrong, "run: make docs"])


def test_the_script_leaves_a_current_file_as_it_is() -> None:
    text = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    assert SCRIPT["render"](text) == text


def test_all_nine_stages_were_compared() -> None:
    assert len(STAGES) == 9


def test_every_pipeline_s_package_is_a_dvc_artifact() -> None:
    graph, pipelines = (YAML(typ="safe").load((ROOT / name).read_text()) for name in ("dvc.yaml", "pipelines.yaml"))
    paths = {name: artifact["path"] for name, artifact in graph["artifacts"].items()}
    assert paths == {name: f"runs/{name}/package" for name in pipelines["pipelines"]}
