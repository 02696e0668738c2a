"""Prefect's server is killed and started again in the middle of a run; its database is SQLite, its default.

Leases are kept in files, as docs/operations.md says: with Prefect's default a new server knows no lease of the old one,
their slots stay taken, and the run waits for ever.
"""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from graftline.workflow.stages import STAGES
from tests.flows.deployed import BIN, Server, is_healthy, kill_tree, make_project, wait_until
from tests.ports import free_port
from tests.workflow.tiny_project import PIPELINE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
LEASES = "prefect.server.concurrency.lease_storage"


@pytest.fixture
def server(tmp_path: Path) -> Server:
    for name in ("checkouts", "prefect"):
        (tmp_path / name).mkdir()
    make_project(tmp_path / "repository", tmp_path / "store")
    return Server(tmp_path, f"http://127.0.0.1:{free_port()}/api", database=None)


def start(server: Server) -> subprocess.Popen[bytes]:
    port = server.url.removesuffix("/api").rpartition(":")[2]
    command = [BIN / "prefect", "server", "start", "--host", "127.0.0.1", "--port", port, "--no-ui"]
    environment = server.environment | {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": f"{LEASES}.filesystem"}
    process = subprocess.Popen(command, cwd=server.folder, env=environment, stderr=subprocess.DEVNULL)
    wait_until(lambda: is_healthy(server.url), 400, "the Prefect server")
    return process


def stop(process: subprocess.Popen[bytes]) -> None:
    kill_tree(process.pid)
    process.wait()


def retrain(server: Server) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flows.retrain", PIPELINE],
        cwd=server.folder / "repository",
        env=server.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.long
def test_a_run_outlives_its_server_or_the_next_one_repeats_no_finished_stage(server: Server) -> None:
    hold = server.folder / "hold"
    hold.touch()
    running = start(server)
    try:
        run = retrain(server)
        wait_until(lambda: any(name.startswith("train@") for name in server.started()), 400, "the training to start")
        stop(running)
        running = start(server)
        hold.unlink()
        log, _ = run.communicate(timeout=400)

        again = retrain(server)
        log_again, _ = again.communicate(timeout=400)
    finally:
        stop(running)

    assert again.returncode == 0, log + log_again
    starts = Counter(name.partition("@")[0] for name in server.started())
    assert set(starts) == set(STAGES)
    assert {stage for stage, count in starts.items() if count > 1} <= {"train"}, log + log_again
