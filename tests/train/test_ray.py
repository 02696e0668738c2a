"""Trainings in workers of Ray Train: the same bytes as torchrun's, lost workers, errors, SIGTERM, one at a time.

One cluster of two processors on the loopback address serves all tests.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.ray_cluster import RayCluster, ray_cluster

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster() as running:
        yield running


def start(*arguments: object, cluster: RayCluster) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.train.ray_training", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(*arguments: object, cluster: RayCluster) -> tuple[int, str]:
    with start(*arguments, cluster=cluster) as process:
        output, _ = process.communicate(timeout=1500)
    return process.returncode, output


def pids(out: Path) -> list[int]:
    """The processes of the last start, once both have begun."""
    files = [out / "started-0", out / "started-1"]
    end = time.monotonic() + 1000
    while not all(file.exists() and file.read_text().endswith("\n") for file in files):
        assert time.monotonic() < end
        time.sleep(0.2)
    return [int(file.read_text().split()[-1]) for file in files]


def test_a_worker_is_killed_and_the_bytes_are_those_of_torchrun(
    cluster: RayCluster, tiny_llama: Path, tmp_path: Path
) -> None:
    bytes_of = {}
    for engine, *killed_at in (("torchrun",), ("ray", "5")):
        out = tmp_path / engine
        out.mkdir()
        code, output = run(tiny_llama, out, engine, *killed_at, cluster=cluster)
        assert code == 0, output
        bytes_of[engine] = (out / "trained" / "adapter.safetensors").read_bytes()
    assert bytes_of["ray"] == bytes_of["torchrun"]
    # It went on at the checkpoint of step 4, so that step 5 alone was done twice.
    assert (tmp_path / "ray" / "steps-done").read_text().split() == ["1", "2", "3", "4", "5", "5", "6"]
    assert "train: a worker was lost, all begin again after step 4" in output


def test_an_error_that_explains_itself_ends_all_workers_and_is_not_tried_again(
    cluster: RayCluster, tmp_path: Path
) -> None:
    code, output = run(tmp_path, "error", cluster=cluster)
    assert code == 2
    assert output.splitlines()[-1] == "error: row 7 has no answer; add one"
    assert "Traceback" not in output
    assert len((tmp_path / "started-1").read_text().split()) == 1


def test_workers_that_end_again_and_again_without_a_new_checkpoint_are_given_up(
    cluster: RayCluster, tmp_path: Path
) -> None:
    code, output = run(tmp_path, "crash", cluster=cluster)
    assert code == 2
    assert "the workers ended 3 times after step 0 without a new checkpoint" in output
    assert "ZeroDivisionError: of a third party" in output
    assert len((tmp_path / "started-1").read_text().split()) == 3


def test_there_is_one_training_of_a_name_and_it_ends_with_its_starter(cluster: RayCluster, tmp_path: Path) -> None:
    with start(tmp_path, "wait", cluster=cluster) as first:
        workers = pids(tmp_path)
        code, output = run(tmp_path, "wait", cluster=cluster)
        assert code == 2
        told = f"is running in this Ray cluster already, started by process {first.pid} on "
        assert [told in line for line in output.splitlines()] == [True, True], output
        assert "; it is waited for up to 1 s" in output.splitlines()[0]
        assert (tmp_path / "beside").read_text() == "begun\n", "what goes with a training began for the refused one"
        first.kill()
    psutil.wait_procs([psutil.Process(pid) for pid in workers if psutil.pid_exists(pid)], timeout=120)
    assert not any(map(psutil.pid_exists, workers))
    for file in tmp_path.glob("started-*"):
        file.unlink()

    with start(tmp_path, "wait", cluster=cluster) as second:
        pids(tmp_path)
        second.send_signal(signal.SIGTERM)
        output, _ = second.communicate(timeout=600)
    assert second.returncode == 2
    assert output.splitlines()[-1] == "error: asked to end after step 0 of 6"


def test_a_cluster_that_cannot_be_reached_is_named(cluster: RayCluster, tmp_path: Path) -> None:
    nowhere = {"RAY_ADDRESS": "127.0.0.1:1"}
    code, output = run(tmp_path, "wait", cluster=replace(cluster, environment=cluster.environment | nowhere))
    assert code == 2
    assert "no Ray cluster could be used at 127.0.0.1:1" in output
    assert "Traceback" not in output
