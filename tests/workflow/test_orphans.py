"""A temporary Prefect server does not outlive its flow, however that ends."""

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

# As Prefect starts its temporary server: a child with the flow's environment and this variable.
FLOW = """
import os, subprocess, sys, time
from graftline.workflow.outcome import explained_errors
with explained_errors():
    server = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(300)"], env=os.environ | {"PREFECT__SERVER_EPHEMERAL": "1"}
    )
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    print(server.pid, other.pid, flush=True)
    if sys.argv[1] == "kill":
        os.kill(os.getpid(), 9)
    server.kill(), other.kill()
"""


def run(how: str, **more: str) -> list[psutil.Process]:
    surroundings = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"} | more
    # The children keep the pipe open: one line is read, not all.
    with subprocess.Popen(
        [sys.executable, "-c", FLOW, how], env=surroundings, stdout=subprocess.PIPE, text=True
    ) as flow:
        assert flow.stdout is not None
        pids = [int(word) for word in flow.stdout.readline().split()]
        found = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
        flow.wait()
    return found


def has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for_the_end_of(process: psutil.Process) -> None:
    end = time.monotonic() + 60
    while not has_ended(process):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_the_server_of_a_killed_flow_ends_and_nothing_else_does() -> None:
    server, other = run("kill")
    try:
        wait_for_the_end_of(server)
        assert not has_ended(other)
    finally:
        other.kill()


def test_nobody_watches_after_a_flow_that_ended_by_itself() -> None:
    mark = uuid.uuid4().hex
    run("end", **{MARK: mark})
    watchers = [process for process in psutil.process_iter() if is_watcher(process, mark)]
    psutil.wait_procs(watchers, timeout=60)
    assert not [process for process in watchers if process.is_running()]


MARK = "GRAFTLINE_TESTS_FLOW"
"""Tells a flow's processes from those of other tests that run at the same time."""


def is_watcher(process: psutil.Process, mark: str) -> bool:
    try:
        is_one = any(Path(word).name == "orphans.py" for word in process.cmdline())
        return is_one and process.environ().get(MARK) == mark
    except psutil.Error:
        return False


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/api"])
def test_a_server_that_others_started_is_not_watched(url: str) -> None:
    server, other = run("kill", PREFECT_API_URL=url)
    try:
        time.sleep(1)
        assert not has_ended(server)
    finally:
        server.kill()
        other.kill()


SERVER = """
import os, psutil, signal, subprocess
from graftline.workflow.outcome import explained_errors
with explained_errors():
    from prefect.server.api.server import SubprocessASGIServer
    server = SubprocessASGIServer(port=1)._run_uvicorn_command()
    psutil.Process(server.pid).suspend()  # as early as it can be: Ctrl-C finds it before it can have caught anything
    os.kill(server.pid, signal.SIGINT)
    psutil.Process(server.pid).resume()
    try:
        print(server.wait(2), end=" ")
    except subprocess.TimeoutExpired:
        print("runs", end=" ")
    print(signal.pthread_sigmask(signal.SIG_BLOCK, []))
    server.terminate()
    server.wait()
"""


def test_ctrl_c_does_not_reach_the_server_of_a_flow() -> None:
    surroundings = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    ended = subprocess.run([sys.executable, "-c", SERVER], env=surroundings, capture_output=True, text=True)
    assert ended.stdout.strip() == "runs set()", ended.stderr
    assert "KeyboardInterrupt" not in ended.stderr
