"""A pipeline's training on several nodes as a Kubernetes manifest: KubeRay's RayJob, or Kubeflow's TrainJob.

    python -m graftline.workflow.manifests PIPELINE rayjob|trainjob --nodes N

Both mount the claim of infra/k8s/storage.yaml that all nodes see; the project's checkout lies there. A RayJob makes a
Ray cluster for the training (``train.engine: ray``), whose head runs the train stage and whose workers train; one that
is lost is replaced. A TrainJob starts the train stage with torchrun on every node (``train.engine: torchrun``).
Sizes are fixed: a step's rows depend on them.
"""

import argparse
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ruamel.yaml import YAML

from graftline import settings
from graftline.errors import ConfigError
from graftline.program import guarded

Kind = Literal["rayjob", "trainjob"]
_USER = 10001
"""The image's user (infra/docker)."""
_SHARED, _VOLUMES = "/scratch", {"work": "/scratch", "temporary": "/tmp", "shared-memory": "/dev/shm"}  # noqa: S108  # in a pod
_HEAD_CPUS, _HEAD_MEMORY = "4", "32Gi"
_ENGINES: dict[Kind, str] = {"rayjob": "ray", "trainjob": "torchrun"}


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """What a training gets, beside what its pipeline says."""

    count: int
    """Nodes; ``train.processes`` are shared out evenly over them."""
    image: str
    """Made by infra/docker, with graftline and Ray."""
    memory: str
    """Of each node, as Kubernetes writes it: 256Gi."""
    claim: str
    """A persistent volume claim that all nodes mount."""
    folder: str
    """The project's folder in the claim."""


def render(pipeline: settings.Pipeline, name: str, kind: Kind, nodes: Nodes) -> dict[str, Any]:
    """The manifest of the training of pipeline ``name``.

    Raises:
        ConfigError: the pipeline's processes cannot be shared out over the nodes, or another engine starts them.
    """
    train = pipeline.train
    if train.engine != _ENGINES[kind]:
        raise ConfigError(
            f"a {kind} needs train.engine: {_ENGINES[kind]}, {name} has {train.engine}; change it, or render a "
            f"{next(other for other, engine in _ENGINES.items() if engine == train.engine)}"
        )
    if nodes.count < 1 or train.processes % nodes.count:
        raise ConfigError(
            f"train.processes is {train.processes} on {nodes.count} nodes; expected a multiple of the number of nodes"
        )
    each = train.processes // nodes.count
    made = (
        _ray_job(name, nodes, each, train.device) if kind == "rayjob" else _train_job(name, nodes, each, train.device)
    )
    labels = {"app.kubernetes.io/part-of": "graftline", "app.kubernetes.io/name": f"train-{name}"}
    return made | {"metadata": {"name": f"train-{name}"[:47].rstrip("-"), "namespace": "graftline", "labels": labels}}


def _ray_job(name: str, nodes: Nodes, each: int, device: str) -> dict[str, Any]:
    workers = {
        "groupName": "workers",
        "replicas": nodes.count,
        "minReplicas": nodes.count,
        "maxReplicas": nodes.count,
        "rayStartParams": {"num-cpus": str(each)},
        "template": _pod("ray-worker", nodes, _resources(each, nodes.memory, device)),
    }
    head = {
        # It runs the stage, the workers train.
        "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},  # noqa: S104  # KubeRay asks it from outside the pod
        "template": _pod("ray-head", nodes, _limits(_HEAD_CPUS, _HEAD_MEMORY)),
    }
    spec = {
        "entrypoint": shlex.join(_stage("python", name, nodes)),
        # A killed training is tried again by KubeRay; it resumes from its checkpoint.
        "backoffLimit": 2,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 3600,
        "rayClusterSpec": {"headGroupSpec": head, "workerGroupSpecs": [workers]},
    }
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "spec": spec}


def _train_job(name: str, nodes: Nodes, each: int, device: str) -> dict[str, Any]:
    pod = _pod("node", nodes, {})["spec"]
    patched = {key: pod["containers"][0][key] for key in ("name", "volumeMounts", "securityContext")}
    of_pod = {key: pod[key] for key in ("serviceAccountName", "securityContext", "volumes")} | {"containers": [patched]}
    job = {"name": "node", "template": {"spec": {"template": {"spec": of_pod}}}}
    spec = {
        # Kubeflow's own runtime: it tells torchrun by its variables (PET_…) which node is which.
        "runtimeRef": {"name": "torch-distributed"},
        "trainer": {
            "image": nodes.image,
            "command": _stage("torchrun", name, nodes),
            "env": pod["containers"][0]["env"],
            "numNodes": nodes.count,
            "numProcPerNode": each,
            "resourcesPerNode": _resources(each, nodes.memory, device),
        },
        "runtimePatches": [
            {"manager": "graftline", "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [job]}}}}
        ],
    }
    return {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "spec": spec}


def _stage(program: str, name: str, nodes: Nodes) -> list[str]:
    """The command of the train stage in the project's folder."""
    return ["bash", "-c", f"cd {shlex.quote(nodes.folder)} && exec {program} -m tasks.train {name}"]


def _resources(processes: int, memory: str, device: str) -> dict[str, Any]:
    """A core for each process, and a GPU unless they train on processors."""
    found = _limits(str(processes), memory)
    if device != "cpu":
        found["limits"]["nvidia.com/gpu"] = str(processes)
    return found


def _limits(cpus: str, memory: str) -> dict[str, Any]:
    return {"requests": {"cpu": cpus, "memory": memory}, "limits": {"memory": memory}}


def _pod(container: str, nodes: Nodes, resources: dict[str, Any]) -> dict[str, Any]:
    """A pod without rights that it does not need, as those of infra/k8s."""
    return {
        "metadata": {"labels": {"app.kubernetes.io/part-of": "graftline", "app.kubernetes.io/name": "training"}},
        "spec": {
            "serviceAccountName": "trainer",
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": _USER,
                "runAsGroup": _USER,
                "fsGroup": _USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": container,
                    "image": nodes.image,
                    "env": [
                        {"name": "HOME", "value": "/tmp"},  # noqa: S108
                        {"name": "GRAFTLINE_CACHE", "value": f"{_SHARED}/cache"},
                    ],
                    "resources": resources,
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "volumeMounts": [{"name": volume, "mountPath": path} for volume, path in _VOLUMES.items()],
                }
            ],
            "volumes": [
                {"name": "work", "persistentVolumeClaim": {"claimName": nodes.claim}},
                {"name": "temporary", "emptyDir": {}},
                {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}},
            ],
        },
    }


def main() -> None:
    """Command line; prints the manifest as YAML."""
    parser = argparse.ArgumentParser(prog="python -m graftline.workflow.manifests", description=main.__doc__)
    parser.add_argument("pipeline", help="a name from pipelines.yaml")
    parser.add_argument("kind", choices=get_args(Kind))
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--image", default="registry.example.org/graftline:cuda")
    parser.add_argument("--memory", default="64Gi", help="of each node")
    parser.add_argument("--claim", default="shared", help="a persistent volume claim that all nodes mount")
    parser.add_argument("--folder", help=f"the project's folder there; by default {_SHARED}/ and this folder's name")
    given = parser.parse_args()
    with guarded():
        nodes = Nodes(
            count=given.nodes,
            image=given.image,
            memory=given.memory,
            claim=given.claim,
            folder=given.folder or f"{_SHARED}/{Path.cwd().name}",
        )
        pipeline = settings.load(Path(settings.DEFAULT_FILE)).pipeline(given.pipeline)
        YAML().dump(render(pipeline, given.pipeline, given.kind, nodes), sys.stdout)


if __name__ == "__main__":
    main()
