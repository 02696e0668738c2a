"""Manifests of trainings on several nodes: from a pipeline's settings, as Kubernetes, KubeRay and Kubeflow take them.

The fields of RayJob (ray.io/v1) and TrainJob (trainer.kubeflow.org/v1alpha1) below were written down from the types
that KubeRay (ray-operator/apis/ray/v1) and Kubeflow Trainer (pkg/apis/trainer/v1alpha1) publish, both Apache-2.0: those
that a manifest of ours may have, nothing else is allowed. Pods are checked by Kubernetes' own schemas.
"""

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from graftline.errors import ConfigError
from graftline.settings import Pipeline
from graftline.workflow.manifests import Kind, Nodes, render
from tests.line.project import write_yaml
from tests.workflow.opened import open_pipeline
from tests.workflow.tiny_project import PIPELINE, tiny_settings

ROOT = Path(__file__).resolve().parents[2]


def fields(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


def listed(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item}


TEXT, COUNT, ANYTHING = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}, {"type": "object"}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
METADATA = fields(["name"], name={**TEXT, "maxLength": 47}, namespace=TEXT, labels=TEXTS)
GROUP = {"rayStartParams": TEXTS, "template": fields(["spec"], metadata=ANYTHING, spec=ANYTHING)}
RAY_JOB = fields(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=METADATA,
    spec=fields(
        ["entrypoint", "rayClusterSpec"],
        entrypoint=TEXT,
        backoffLimit=COUNT,
        shutdownAfterJobFinishes={"type": "boolean"},
        ttlSecondsAfterFinished=COUNT,
        rayClusterSpec=fields(
            ["headGroupSpec"],
            headGroupSpec=fields(["template"], **GROUP),
            workerGroupSpecs=listed(
                fields(
                    ["groupName", "template", "minReplicas", "maxReplicas"],
                    groupName=TEXT,
                    replicas=COUNT,
                    minReplicas=COUNT,
                    maxReplicas=COUNT,
                    **GROUP,
                )
            ),
        ),
    ),
)
CONTAINER_PATCH = fields(
    ["name"], name=TEXT, env=listed(ANYTHING), volumeMounts=listed(ANYTHING), securityContext=ANYTHING
)
POD_PATCH = fields(
    [],
    serviceAccountName=TEXT,
    volumes=listed(ANYTHING),
    containers=listed(CONTAINER_PATCH),
    securityContext=ANYTHING,
    nodeSelector=TEXTS,
)
JOB_PATCH = fields(["name"], name=TEXT, template=fields([], spec=fields([], template=fields([], spec=POD_PATCH))))
TRAIN_JOB = fields(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "trainer.kubeflow.org/v1alpha1"},
    kind={"const": "TrainJob"},
    metadata=METADATA,
    spec=fields(
        ["runtimeRef"],
        runtimeRef=fields(["name"], name=TEXT),
        trainer=fields(
            [],
            image=TEXT,
            command=listed(TEXT),
            args=listed(TEXT),
            env=listed(ANYTHING),
            numNodes={"type": "integer", "minimum": 1},
            numProcPerNode={"type": "integer", "minimum": 1},
            resourcesPerNode=fields([], requests=TEXTS, limits=TEXTS),
        ),
        runtimePatches=listed(
            fields(
                ["manager"],
                manager=TEXT,
                trainingRuntimeSpec=fields([], template=fields([], spec=fields([], replicatedJobs=listed(JOB_PATCH)))),
            )
        ),
    ),
)
SCHEMAS: dict[Kind, dict[str, Any]] = {"rayjob": RAY_JOB, "trainjob": TRAIN_JOB}
ENGINES: dict[Kind, str] = {"rayjob": "ray", "trainjob": "torchrun"}


def pipeline(folder: Path, **train: Any) -> Pipeline:
    settings = tiny_settings()
    settings["train"] |= train
    write_yaml(folder, {"pipelines": {PIPELINE: settings}, "channels": {"production": {}}})
    return open_pipeline(PIPELINE, folder).pipeline


def nodes(count: int, **given: str) -> Nodes:
    values = {
        "image": "registry.example.org/graftline:cuda",
        "memory": "256Gi",
        "claim": "shared",
        "folder": "/scratch/p",
    }
    return Nodes(count=count, **(values | given))


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The pods that a manifest makes; of a TrainJob with what its runtime's container gets."""
    if job["kind"] == "RayJob":
        cluster = job["spec"]["rayClusterSpec"]
        return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    patch = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
    pod = copy.deepcopy(patch["template"]["spec"]["template"]["spec"])
    trainer = job["spec"]["trainer"]
    given = {key: trainer[key] for key in ("image", "command", "env")} | {"resources": trainer["resourcesPerNode"]}
    pod["containers"][0] |= given
    return [pod]


@pytest.mark.parametrize("kind", list(SCHEMAS))
@pytest.mark.parametrize("version", ["1.31.0", "1.37.0"])
def test_a_manifest_has_known_fields_and_pods_that_kubernetes_takes(kind: Kind, version: str, tmp_path: Path) -> None:
    job = render(pipeline(tmp_path, processes=16, engine=ENGINES[kind]), PIPELINE, kind, nodes(2))
    jsonschema.validate(job, SCHEMAS[kind])
    for pod in pods(job):
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": pod}
        kubernetes_validate.validate(whole, version, strict=True)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job | {"spec": job["spec"] | {"entryPoint": "misspelt"}}, SCHEMAS[kind])


@pytest.mark.parametrize("kind", list(SCHEMAS))
def test_processes_are_shared_out_over_nodes_with_a_gpu_each(kind: Kind, tmp_path: Path) -> None:
    job = render(pipeline(tmp_path, processes=16, engine=ENGINES[kind]), PIPELINE, kind, nodes(2))
    container = pods(job)[-1]["containers"][0]
    assert container["resources"] == {
        "requests": {"cpu": "8", "memory": "256Gi"},
        "limits": {"memory": "256Gi", "nvidia.com/gpu": "8"},
    }
    if kind == "rayjob":
        workers = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
        # No elastic sizes: a step's rows depend on them.
        assert [workers[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [2, 2, 2]
        assert job["spec"]["entrypoint"] == f"bash -c 'cd /scratch/p && exec python -m tasks.train {PIPELINE}'"
    else:
        trainer = job["spec"]["trainer"]
        assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 8)
        assert trainer["command"] == ["bash", "-c", f"cd /scratch/p && exec torchrun -m tasks.train {PIPELINE}"]
    on_processors = pipeline(tmp_path, processes=4, engine=ENGINES[kind], device="cpu")
    container = pods(render(on_processors, PIPELINE, kind, nodes(4)))[-1]["containers"][0]
    assert container["resources"]["limits"] == {"memory": "256Gi"}


@pytest.mark.parametrize("kind", list(SCHEMAS))
def test_pods_have_no_rights_that_they_do_not_need_and_see_the_claim(kind: Kind, tmp_path: Path) -> None:
    job = render(pipeline(tmp_path, processes=2, engine=ENGINES[kind]), PIPELINE, kind, nodes(2, claim="ours"))
    for pod in pods(job):
        assert pod["serviceAccountName"] == "trainer"
        assert (pod["securityContext"]["runAsNonRoot"], pod["securityContext"]["runAsUser"]) == (True, 10001)
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert {"name": "work", "persistentVolumeClaim": {"claimName": "ours"}} in pod["volumes"]


def test_a_folder_with_blanks_and_quotes_stays_one_word(tmp_path: Path) -> None:
    (tmp_path / "it's here").mkdir()
    job = render(
        pipeline(tmp_path, processes=1, engine="torchrun"),
        PIPELINE,
        "trainjob",
        nodes(1, folder=str(tmp_path / "it's here")),
    )
    bash, flag, script = job["spec"]["trainer"]["command"]
    script = script.replace("exec torchrun -m", "pwd; echo")
    done = subprocess.run([bash, flag, script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == str(tmp_path / "it's here")


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.processes is 16 on 3 nodes; expected a multiple"):
        render(pipeline(tmp_path, processes=16, engine="ray"), PIPELINE, "rayjob", nodes(3))
    with pytest.raises(ConfigError, match=r"train\.processes is 16 on 0 nodes"):
        render(pipeline(tmp_path, processes=16, engine="ray"), PIPELINE, "rayjob", nodes(0))
    with pytest.raises(ConfigError, match=r"a rayjob needs train\.engine: ray, pets has torchrun; .* a trainjob"):
        render(pipeline(tmp_path, processes=16), PIPELINE, "rayjob", nodes(2))


def test_the_command_prints_yaml_for_kubectl(tmp_path: Path) -> None:
    pipeline(tmp_path, processes=4, engine="ray")
    done = subprocess.run(
        [sys.executable, "-m", "graftline", "manifest", PIPELINE, "rayjob", "--nodes", "2", "--memory", "9Gi"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (job,) = yaml.safe_load_all(io.StringIO(done.stdout))
    assert job["metadata"]["name"] == "train-pets"
    assert f"cd /scratch/{tmp_path.name} " in job["spec"]["entrypoint"]
    assert pods(job)[1]["containers"][0]["resources"]["limits"] == {"memory": "9Gi", "nvidia.com/gpu": "2"}
