"""Kubernetes: rendered by kustomize where kubectl is there; pods without rights; a work pool that Prefect renders."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from prefect.utilities.templating import apply_values, find_placeholders

from graftline.plan.resources import job_variables
from graftline.settings import Pipeline
from tests.ports import free_port
from tests.workflow.tiny_project import tiny_settings

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "infra" / "k8s"
WORK_POOL: dict[str, Any] = json.loads((FOLDER / "work-pool.json").read_text())


def objects() -> list[dict[str, Any]]:
    names = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]
    return [one for name in names for one in yaml.safe_load_all((FOLDER / name).read_text())]


def named(kind: str) -> set[str]:
    return {one["metadata"]["name"] for one in objects() if one["kind"] == kind}


def render(**values: Any) -> dict[str, Any]:
    """The job configuration as Prefect makes it from the template's defaults and a deployment's values."""
    defaults = {k: p["default"] for k, p in WORK_POOL["variables"]["properties"].items() if "default" in p}
    jsonschema.validate(defaults | values, WORK_POOL["variables"])
    applied: dict[str, Any] = apply_values(WORK_POOL["job_configuration"], defaults | values, remove_notset=False)
    return applied


def pods() -> dict[str, dict[str, Any]]:
    found = {
        one["metadata"]["name"]: one["spec"]["template"]["spec"] for one in objects() if one["kind"] == "Deployment"
    }
    return found | {"flow-run": render()["job_manifest"]["spec"]["template"]["spec"]}


def test_every_file_is_a_resource() -> None:
    listed = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]
    assert {*listed, "kustomization.yaml"} == {path.name for path in FOLDER.glob("*.yaml")}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_renders_it_with_our_image_and_namespace() -> None:
    done = subprocess.run(["kubectl", "kustomize", str(FOLDER)], capture_output=True, text=True, check=True)
    rendered = list(yaml.safe_load_all(done.stdout))
    assert len(rendered) == len(objects()) + 1  # The config map is generated.
    assert all(one["metadata"].get("namespace") == "graftline" for one in rendered if one["kind"] != "Namespace")
    assert "image: registry.example.org/graftline:cuda" in done.stdout


@pytest.mark.parametrize("name", ["worker", "serving", "flow-run"])
def test_a_pod_has_no_rights_that_it_does_not_need(name: str) -> None:
    pod = pods()[name]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert "memory" in container["resources"]["limits"]
        assert "cpu" in container["resources"]["requests"]


@pytest.mark.parametrize("name", ["worker", "serving", "flow-run"])
def test_a_pod_names_accounts_and_claims_that_exist_and_mounts_its_volumes(name: str) -> None:
    pod = pods()[name]
    assert pod["serviceAccountName"] in named("ServiceAccount")
    claims = {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
    assert claims <= named("PersistentVolumeClaim")
    mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_selectors_choose_the_pods_that_are_made() -> None:
    labels = [one["spec"]["template"]["metadata"]["labels"] for one in objects() if one["kind"] == "Deployment"]
    services = [one["spec"]["selector"] for one in objects() if one["kind"] == "Service"]
    budgets = [one["spec"]["selector"]["matchLabels"] for one in objects() if one["kind"] == "PodDisruptionBudget"]
    flow_run = render()["job_manifest"]["spec"]["template"]
    assert budgets == [{"app.kubernetes.io/name": "serving"}]
    assert services == [*budgets, flow_run["metadata"]["labels"]]
    assert services[0] in labels
    assert flow_run["spec"]["subdomain"] in named("Service")


def test_the_work_pool_leaves_no_placeholder_and_takes_gpus_and_memory() -> None:
    job = render(gpus="2", memory="64Gi")["job_manifest"]
    assert not find_placeholders(json.dumps(job))
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"memory": "64Gi", "nvidia.com/gpu": "2"}
    assert job["metadata"]["namespace"] == "graftline"


def test_the_work_pool_takes_what_a_pipeline_s_stages_are_given() -> None:
    given = Pipeline.model_validate_json(
        json.dumps(
            tiny_settings()
            | {"resources": {"train": {"gpus": 1, "cores": 6, "memory_gb": 20.5}, "merge": {"memory_gb": 40}}}
        )
    )
    job = render(**job_variables(given))["job_manifest"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["resources"] == {
        "requests": {"cpu": "6", "memory": "40G"},
        "limits": {"memory": "40G", "nvidia.com/gpu": "1"},
    }


SHARED = {"name": "work", "persistentVolumeClaim": {"claimName": "shared"}}


def test_several_nodes_are_pods_of_one_indexed_job_that_share_a_checkout() -> None:
    job = render(nodes=2, work_volume=SHARED)["job_manifest"]["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 2, 2)
    assert SHARED in job["template"]["spec"]["volumes"]
    assert "shared" in named("PersistentVolumeClaim")


def start_pod(folder: Path, index: int, *command: str, nodes: int = 2) -> subprocess.Popen[str]:
    """A pod's process as the job starts it, its name server replaced by this machine's address."""
    (container,) = render(nodes=nodes)["job_manifest"]["spec"]["template"]["spec"]["containers"]
    bash, flag, script, name = container["command"]
    here = {"HOSTNAME": f"train-x7-{index}", "JOB_COMPLETION_INDEX": str(index), "PYTHONPATH": str(ROOT)}
    local = script.replace("$job-0.flow-run", "127.0.0.1").replace("29400", str(shared_port()))
    return subprocess.Popen([bash, flag, local, name, *command], cwd=folder, env=os.environ | here)


@functools.cache
def shared_port() -> int:
    return free_port()


def test_a_single_pod_runs_the_flow_where_it_is(tmp_path: Path) -> None:
    assert start_pod(tmp_path, 0, "sh", "-c", "pwd > here", nodes=1).wait() == 0
    assert (tmp_path / "here").read_text().strip() == str(tmp_path)


def test_other_pods_join_what_the_first_one_starts_and_end_without_it_if_it_starts_nothing(tmp_path: Path) -> None:
    start = (
        'echo "echo $PET_NNODES $PET_NODE_RANK > joined" > join.part; mv join.part "$GRAFTLINE_JOIN_FILE"; '
        "until [ -e joined ]; do sleep 0.1; done; exit 3"
    )
    first, second = start_pod(tmp_path, 0, "sh", "-c", start), start_pod(tmp_path, 1, "false")
    assert (first.wait(), second.wait()) == (3, 0)
    place = tmp_path / "train-x7"
    assert (place / "joined").read_text().split() == ["2", "0"]
    for left in place.iterdir():
        left.unlink()
    first, second = start_pod(tmp_path, 0, "true"), start_pod(tmp_path, 1, "false")
    assert (first.wait(), second.wait()) == (0, 0)


@pytest.mark.slow
def test_two_pods_train_one_adapter(tmp_path: Path, tiny_llama: Path) -> None:
    command = ["tests.train.two_processes", str(tiny_llama), str(tmp_path / "out")]
    code = f"from graftline.train.distributed import launch; launch({command}, processes=2, on_line=print)"
    pods = [start_pod(tmp_path, 0, sys.executable, "-c", code), start_pod(tmp_path, 1, "false")]
    assert [pod.wait() for pod in pods] == [0, 0]
    assert len(json.loads((tmp_path / "out" / f"{tiny_llama.name}-replicated" / "losses.json").read_text())) == 4


@pytest.mark.parametrize("version", ["1.31.0", "1.37.0"])
def test_the_job_that_a_run_becomes_is_what_kubernetes_defines(version: str) -> None:
    job = render()["job_manifest"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    # Prefect's worker makes lists of these two.
    container["env"] = [{"name": name, "value": value} for name, value in container["env"].items()]
    container["args"] = ["prefect", "flow-run", "execute"]
    kubernetes_validate.validate(job, version, strict=True)


def test_every_variable_of_the_work_pool_is_used_and_explained() -> None:
    used = {placeholder.name for placeholder in find_placeholders(json.dumps(WORK_POOL["job_configuration"]))}
    variables = WORK_POOL["variables"]["properties"]
    assert used == set(variables)
    assert all(variable["description"] for variable in variables.values())


def test_values_of_the_wrong_kind_are_refused() -> None:
    with pytest.raises(jsonschema.ValidationError):
        render(gpus="two")
    with pytest.raises(jsonschema.ValidationError):
        render(image_pull_policy="Sometimes")
