"""The stage train under a flow: asked to end, it is tried again and resumes; in a Ray cluster there is one at a time.

Prefect, DVC, the stages and Ray are the real ones; the model is tiny.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.line.project import environment
from tests.ray_cluster import ray_cluster
from tests.workflow.tiny_project import PIPELINE, change, make_repository

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ONLY_TRAIN = f"""
from pathlib import Path
from graftline.workflow import process
with process.flow_command():
    from prefect import flow

    @flow
    def only_train():
        process.reproduce("train", "{PIPELINE}", Path())

    only_train()
"""


def make_project(folder: Path, **train: object) -> Path:
    """A project whose next stage is the training."""
    make_repository(folder)
    change(folder, "train", batch_size=4, device="cpu", **train)
    targets = [f"{stage}@{PIPELINE}" for stage in ("validate", "init")]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # of the stages' `python`
    variables = environment(folder, folder.parent) | {"PATH": path}
    for command in (["graftline.workflow.resolve", PIPELINE], ["dvc", "repro", "-q", *targets]):
        subprocess.run([sys.executable, "-m", *command], cwd=folder, env=variables, check=True)
    return folder


@contextlib.contextmanager
def flow(project: Path, **more: str) -> Iterator[subprocess.Popen[str]]:
    """A run of the flow. At the end it is killed, if it still runs."""
    with subprocess.Popen(
        [sys.executable, "-c", ONLY_TRAIN],
        cwd=project,
        env=environment(project, project.parent / f"cache-{project.name}") | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: subprocess.Popen[str], wanted: str) -> str:
    """The flow's log, up to a line that fits."""
    log = ""
    assert process.stdout is not None
    for line in process.stdout:
        log += line
        if re.search(wanted, line):
            return log
    pytest.fail(f"the flow ended without {wanted!r}:\n{log}")


@pytest.mark.long
def test_a_training_that_is_asked_to_end_is_tried_again_by_prefect_and_resumes(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project", steps=400, checkpoint_every=1000)
    with flow(project) as running:
        read_until(running, r"train  \d+/400 steps")
        (training,) = (
            process
            for process in psutil.Process(running.pid).children(recursive=True)
            if process.cmdline()[1:] == ["-m", "tasks.train", PIPELINE]
        )
        training.send_signal(signal.SIGTERM)
        log, _ = running.communicate()
    assert running.returncode == 0, log
    (kept,) = set(
        re.findall(r"error \(may pass\): this process was asked to end \(SIGTERM\) after step (\d+) of 400", log)
    )
    assert "failed (exit code 75)" in log
    assert f"resuming from step {kept}" in log
    steps = (project / "runs" / PIPELINE / "train" / "history.json").read_text(encoding="utf-8").count('"step"')
    assert steps == 400


@pytest.mark.ray
def test_a_second_flow_waits_for_the_training_in_the_cluster_continues_it_and_leaves_none_when_cancelled(
    tmp_path: Path,
) -> None:
    kept = tmp_path / "kept"
    endless = {"steps": 1_000_000, "checkpoint_every": 20, "checkpoints": str(kept)}
    project = make_project(tmp_path / "project", engine="ray", processes=2, **endless)
    other = Path(shutil.copytree(project, tmp_path / "other"))
    with ray_cluster() as cluster, flow(project, **cluster.environment) as first:
        # The workers' progress is the flow's log.
        read_until(first, r"train  \d+/1000000 steps .*left")
        workers = cluster.processes("RayTrainWorker")
        assert len(workers) == 2

        with flow(other, **cluster.environment) as second:
            # As a flow that is tried again while the training of its last attempt still runs.
            read_until(second, rf"the training {PIPELINE}/train-\w+ is running in this Ray cluster already, started by")
            assert set(cluster.processes("RayTrainWorker")) == set(workers)
            first.kill()
            log = read_until(second, r"train  \d+/1000000 steps .*left")
            assert int(re.findall(r"train: resuming from step (\d+)", log)[0]) >= 20
            assert not any(worker.is_running() for worker in workers)
            workers = cluster.processes("RayTrainWorker")
            assert len(workers) == 2

            second.send_signal(signal.SIGTERM)  # as Prefect cancels a run
            second.communicate()
        psutil.wait_procs(workers, timeout=120)
        assert not any(worker.is_running() for worker in workers)
