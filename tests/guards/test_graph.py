"""dvc.yaml, as graftline writes it, is short, and each stage depends on its code and its settings by value."""

from ruamel.yaml import YAML

from graftline.workflow.graph import render
from graftline.workflow.stage_settings import SECTIONS
from graftline.workflow.stages import STAGES


def test_dvc_yaml_is_short_and_names_no_code() -> None:
    text = render(["demo"])
    assert len(text.splitlines()) <= 120
    assert not [line for line in text.splitlines() if "graftline/" in line or "tasks/" in line]


def test_the_graph_the_flow_and_the_settings_name_the_same_stages() -> None:
    stages = YAML(typ="safe").load(render(["demo"]))["stages"]
    assert tuple(stages) == STAGES == tuple(SECTIONS)


def test_every_stage_depends_on_its_code_and_its_settings() -> None:
    for name, stage in YAML(typ="safe").load(render(["demo"]))["stages"].items():
        (keys,) = stage["do"]["params"][0].values()
        assert {f"code.{name}", f"settings.{name}"} <= set(keys)
