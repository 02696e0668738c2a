"""What each stage takes: as given or by default, with its origin; and what asks for more than a machine has."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from graftline.errors import ConfigError
from graftline.plan import resources
from graftline.plan.resources import Machine, StageNeeds
from graftline.settings import Pipeline, parse_config
from tests.workflow.tiny_project import tiny_settings

TWO_GPUS = Machine(("GPU-a", "GPU-b"), cores=8, memory_gb=64.0)
NO_GPU = Machine((), cores=8, memory_gb=64.0)


def made(settings: dict[str, Any] | None = None, /, **stages: dict[str, Any]) -> Pipeline:
    """A pipeline with other values of `train`, and with `resources`."""
    document = tiny_settings()
    document["train"] |= settings or {}
    document["resources"] = stages
    text = yaml.safe_dump({"pipelines": {"pets": document}, "channels": {"production": {}}})
    return parse_config(text.encode(), Path("pipelines.yaml")).pipeline("pets")


def of(pipeline: Pipeline, machine: Machine, **more: Any) -> dict[str, StageNeeds]:
    return {one.stage: one for one in resources.needs(pipeline, machine, **more)}


def test_each_stage_that_computes_with_a_model_has_a_gpu_and_the_training_one_for_each_process() -> None:
    found = of(made({"processes": 2}), TWO_GPUS)
    assert {stage: one.gpus for stage, one in found.items() if one.gpus} == {
        "train": 2,
        "evaluate": 1,
        "merge": 1,
        "package": 1,
    }
    assert found["train"].cores is None
    assert found["evaluate"].cores is None
    assert found["init"].cores == 8  # nothing is quantized


def test_a_stage_has_a_gpu_only_for_what_the_pipeline_asks_of_it() -> None:
    document = tiny_settings()
    document["quantize"] = {"method": "nf4"}
    document["package"] |= {"merged": True}
    document["evaluate"] |= {"processes": 3}
    text = yaml.safe_dump({"pipelines": {"pets": document}, "channels": {"production": {}}})
    found = of(parse_config(text.encode(), Path("pipelines.yaml")).pipeline("pets"), TWO_GPUS)
    gpus = {stage: one.gpus for stage, one in found.items() if one.gpus}
    assert gpus == {"init": 1, "train": 1, "evaluate": 2, "merge": 1, "package": 1}


@pytest.mark.parametrize(
    ("train", "machine"), [({"device": "cpu"}, TWO_GPUS), ({}, NO_GPU)], ids=["device cpu", "a machine without GPUs"]
)
def test_a_training_on_the_cpu_has_all_cores_and_no_gpu(train: dict[str, Any], machine: Machine) -> None:
    found = of(made(train), machine)["train"]
    assert (found.gpus, found.cores) == (0, 8)


def test_stages_that_compute_with_no_model_are_not_counted() -> None:
    found = of(made(), NO_GPU)
    assert {stage for stage, one in found.items() if one.cores is None} == {"fetch", "validate", "gate", "release"}


def test_of_several_machines_each_gives_its_share_of_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_NNODES", "2")
    assert of(made({"processes": 4}), TWO_GPUS)["train"].gpus == 2


def test_what_is_given_counts_and_every_figure_has_its_origin() -> None:
    text = yaml.safe_dump(
        {
            "pipelines": {"pets": tiny_settings() | {"resources": {"train": {"memory_gb": 3, "cores": 2}}}},
            "channels": {"production": {}},
        },
        sort_keys=False,
    )
    config = parse_config(text.encode(), Path("pipelines.yaml"))
    line = text.splitlines().index("        cores: 2") + 1
    pipeline = config.pipeline("pets")
    found = of(pipeline, NO_GPU, origin=resources.origins(config, "pets"), training_gb=1.5)
    train = found["train"]
    assert (train.gpus, train.cores, train.memory_gb) == (0, 2, 3.0)
    assert train.origins == {
        "gpus": "plan",
        "cores": f"pipelines.yaml:{line}",
        "memory_gb": f"pipelines.yaml:{line - 1}",
    }
    row = next(row for row in resources.table(list(found.values())).splitlines() if row.startswith("  train"))
    assert f"2 (pipelines.yaml:{line})" in row
    assert f"3.0 (pipelines.yaml:{line - 1})" in row


def test_the_planned_memory_of_a_training_stands_where_none_is_given() -> None:
    train = of(made(), NO_GPU, training_gb=1.5)["train"]
    assert (train.memory_gb, train.origins["memory_gb"]) == (1.5, "plan")


@pytest.mark.parametrize(
    ("pipeline", "machine", "told"),
    [
        (made(init={"cores": 9}), NO_GPU, "init asks for 9 cores (`resources.init.cores`, here); expected at most 8"),
        (
            made(merge={"memory_gb": 64.5}),
            NO_GPU,
            "merge asks for 64.5 GB of memory (`resources.merge.memory_gb`, here); expected at most 64.0",
        ),
        (
            made(package={"gpus": 3}),
            TWO_GPUS,
            "package asks for 3 GPUs (`resources.package.gpus`, here); expected at most 2",
        ),
        (made({"processes": 3}), TWO_GPUS, "train asks for 3 GPUs (one for each of `train.processes`"),
        (made({"device": "cuda"}), NO_GPU, "train asks for 1 GPU (one for each of `train.processes`"),
        (
            made({"processes": 2}, train={"gpus": 2}),
            NO_GPU,
            "train asks for 2 GPUs (`resources.train.gpus`, here); expected at most 0",
        ),
    ],
)
def test_a_stage_that_asks_for_more_than_the_machine_has_is_refused(
    pipeline: Pipeline, machine: Machine, told: str
) -> None:
    found = resources.needs(pipeline, machine, origin=lambda _stage, _key: "here")
    with pytest.raises(
        ConfigError, match=f"pipeline pets asks for more than this machine has:\n  stage {re.escape(told)}"
    ):
        resources.check_machine(found, machine, "pets")


def test_all_that_is_too_much_is_told_at_once() -> None:
    found = resources.needs(made(init={"cores": 9}, merge={"memory_gb": 65, "gpus": 1}), NO_GPU)
    with pytest.raises(ConfigError) as caught:
        resources.check_machine(found, NO_GPU, "pets")
    assert [line.split()[1] for line in str(caught.value).splitlines()[1:-1]] == ["init", "merge", "merge"]


def test_what_the_machine_has_exactly_is_not_too_much() -> None:
    pipeline = made({"processes": 2}, evaluate={"cores": 8, "memory_gb": 64, "gpus": 2})
    resources.check_machine(resources.needs(pipeline, TWO_GPUS), TWO_GPUS, "pets")


@pytest.mark.parametrize(
    ("pipeline", "expected"),
    [
        (made(), "gpu"),
        (made({"device": "cpu"}), "cpu"),
        (made(train={"gpus": 0}), "cpu"),
        (made({"device": "cpu"}, evaluate={"gpus": 1}), "gpu"),
        (made({"device": "cpu"}, evaluate={"gpus": 0, "cores": 2}), "cpu"),
    ],
)
def test_a_pipeline_belongs_on_a_machine_with_gpus_unless_no_stage_may_use_one(
    pipeline: Pipeline, expected: str
) -> None:
    assert resources.class_of(pipeline) == expected


def test_a_pod_for_a_whole_run_has_the_most_that_a_stage_is_given() -> None:
    pipeline = made({"processes": 4}, train={"gpus": 4, "memory_gb": 20.5}, merge={"memory_gb": 40, "cores": 6})
    assert resources.job_variables(pipeline) == {"gpus": "4", "memory": "40G", "cpu_request": "6"}
    assert resources.job_variables(made({"device": "cpu"})) == {"gpus": "0"}
    assert resources.job_variables(made()) == {}


def test_a_calibrated_start_has_all_cores_and_holds_no_gpu() -> None:
    document = tiny_settings()
    document["quantize"] = {"method": "nf4", "init": {"kind": "loftq", "weighting": "full"}}
    document["adapter"] |= {"method": "loftq"}
    text = yaml.safe_dump({"pipelines": {"pets": document}, "channels": {"production": {}}})
    found = of(parse_config(text.encode(), Path("pipelines.yaml")).pipeline("pets"), TWO_GPUS)
    assert (found["init"].gpus, found["init"].cores) == (0, 8)
