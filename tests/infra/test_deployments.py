"""prefect.yaml: what Prefect itself reads from it, and that its flows take what it gives them."""

import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from prefect import Flow
from prefect.cli.deploy._models import PrefectYamlModel

from graftline.plan.resources import Class

ROOT = Path(__file__).resolve().parents[2]
FILE: dict[str, Any] = yaml.safe_load((ROOT / "prefect.yaml").read_text())
DEPLOYMENTS: dict[str, dict[str, Any]] = {one["name"]: one for one in FILE["deployments"]}


def flow_of(deployment: dict[str, Any]) -> Flow[..., Any]:
    path, name = deployment["entrypoint"].split(":")
    flow = getattr(import_module(path.removesuffix(".py").replace("/", ".")), name)
    assert isinstance(flow, Flow)
    return flow


def test_prefect_reads_the_file_whole() -> None:
    model = PrefectYamlModel.model_validate(FILE)
    assert [deployment.name for deployment in model.deployments] == list(DEPLOYMENTS)
    known = set(type(model.deployments[0]).model_fields)
    assert all(set(deployment) <= known for deployment in DEPLOYMENTS.values())


def test_every_flow_has_a_deployment() -> None:
    deployed = {one["entrypoint"].split(":")[0] for one in DEPLOYMENTS.values()}
    written = {
        f"flows/{path.name}" for path in (ROOT / "flows").glob("*.py") if re.search(r"^@flow", path.read_text(), re.M)
    }
    assert deployed == written


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_the_flow_takes_the_parameters_and_explains_each_of_its_own(name: str) -> None:
    flow = flow_of(DEPLOYMENTS[name])
    known = inspect.signature(flow.fn).parameters
    assert set(DEPLOYMENTS[name]["parameters"]) <= set(known)
    described = flow.parameters.model_dump()["properties"]
    assert [key for key in known if not described[key].get("description")] == []


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_run_beyond_a_deployment_s_limit_waits(name: str) -> None:
    # Retrainings and rollouts of different pipelines run at once; one pipeline's retrainings wait by a lease.
    expected = 8 if name in ("retrain", "rollout") else 1
    assert DEPLOYMENTS[name]["concurrency_limit"] == {"limit": expected, "collision_strategy": "ENQUEUE"}


def test_the_version_is_the_one_that_is_installed() -> None:
    assert f"prefect=={FILE['prefect-version']}\n" in (ROOT / "constraints.txt").read_text()


def test_queues_are_the_classes_of_machines_and_what_only_starts_runs_needs_no_gpu() -> None:
    queues = {name: one["work_pool"]["work_queue_name"] for name, one in DEPLOYMENTS.items()}
    assert set(queues.values()) == set(get_args(Class))
    assert {name for name, queue in queues.items() if queue == "cpu"} == {"nightly", "watch", "promote", "rollout"}
