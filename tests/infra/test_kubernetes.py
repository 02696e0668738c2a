"""Kubernetes: rendered by kustomize where kubectl is there; pods without rights; a work pool that Prefect renders."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from prefect.utilities.templating import apply_values, find_placeholders

from graftline.plan.resources import job_variables
from graftline.settings import Pipeline
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
    assert services == budgets
    assert services[0] in labels
    policies = {
        one["metadata"]["name"]: one["spec"]["podSelector"] for one in objects() if one["kind"] == "NetworkPolicy"
    }
    (chosen,) = policies["training-in"]["matchExpressions"]
    assert flow_run["metadata"]["labels"][chosen["key"]] in chosen["values"]


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


def test_a_run_may_join_a_ray_cluster_whose_nodes_see_its_checkout() -> None:
    pod = render(ray_address="ray-head-svc:6379", work_volume=SHARED)["job_manifest"]["spec"]["template"]["spec"]
    assert SHARED in pod["volumes"]
    assert "shared" in named("PersistentVolumeClaim")
    script = pod["containers"][0]["command"][2]
    assert 'ray start --address="ray-head-svc:6379" --num-cpus=0' in script
    with pytest.raises(jsonschema.ValidationError):
        render(ray_address="head:6379; rm -r /")


def test_without_a_cluster_a_pod_runs_the_flow_alone_and_as_its_first_process(tmp_path: Path) -> None:
    (container,) = render()["job_manifest"]["spec"]["template"]["spec"]["containers"]
    command = [*container["command"], "sh", "-c", "echo $$ ${RAY_ADDRESS-none} > here; exit 3"]
    with subprocess.Popen(command, cwd=tmp_path) as pod:
        assert pod.wait() == 3
    assert (tmp_path / "here").read_text().split() == [str(pod.pid), "none"]


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
