"""A Ray cluster of two processors on the loopback address, for tests."""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # with 0 Ray listens on the loopback address alone
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    # On a machine that other tests keep busy, what is late is not dead.
    "RAY_agent_register_timeout_ms": "600000",
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_health_check_timeout_ms": "60000",
    "RAY_health_check_failure_threshold": "60",
    "RAY_gcs_server_request_timeout_seconds": "300",
}
_START = (
    "import ray, sys; ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80_000_000); "
    "print(ray.get_runtime_context().gcs_address, flush=True); sys.stdin.read()"
)
_TRIES = 10
"""Ray waits half a minute for its own processes to begin, whatever else the machine does."""


@dataclass(frozen=True)
class RayCluster:
    """A running cluster."""

    address: str
    environment: dict[str, str]
    """For a process that is to connect to it."""
    process: psutil.Process

    def processes(self, name: str) -> list[psutil.Process]:
        """The cluster's processes that are at work on what begins with ``name``."""
        found = []
        for process in self.process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith(f"ray::{name}"):
                    found.append(process)
        return found


@contextlib.contextmanager
def ray_cluster(**environment: str) -> Iterator[RayCluster]:
    """A cluster whose workers have ``environment``; when the block ends, none of its processes is left."""
    pytest.importorskip("ray", reason="ray is not installed; pip install 'graftline[ray]'")
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # Ray's sockets lie in it: their paths must be short
    own = _ENVIRONMENT | environment | {"RAY_TMPDIR": folder}
    try:
        for _ in range(_TRIES):
            with _started(own) as (process, address):
                if address:
                    assert address.startswith("127.0.0.1:"), "not on the loopback address"
                    yield RayCluster(address, own | {"RAY_ADDRESS": address}, process)
                tree = _tree(process)
            left = _end({*tree, *_with_folder(folder)})
            if address:
                break
        else:
            pytest.fail(f"Ray did not start in {_TRIES} tries")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert not left, f"left behind: {left}"


def _tree(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


def _with_folder(folder: str) -> list[psutil.Process]:
    """Processes of a cluster's folder: some of Ray's leave the tree when their parents end."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RAY_TMPDIR") == folder:
                found.append(process)
    return found


def _end(processes: set[psutil.Process]) -> list[psutil.Process]:
    """Wait for processes to end; kill and return those that do not."""
    _, left = psutil.wait_procs(processes, timeout=60)
    for one in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    return left


@contextlib.contextmanager
def _started(environment: dict[str, str]) -> Iterator[tuple[psutil.Process, str]]:
    """A process that has a cluster, and the cluster's address: empty where it did not start."""
    with subprocess.Popen(
        [sys.executable, "-c", _START],
        env=os.environ | environment | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        started = psutil.Process(process.pid)
        try:
            address = process.stdout.readline().strip()
            yield started, address
        finally:
            process.communicate("")
