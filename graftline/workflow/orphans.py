"""End the temporary Prefect server of a flow that was killed before it could clean up.

A watcher process waits for the end of its standard input, a pipe that the system closes when the flow ends, and then
kills the servers with the flow's mark. A flow that ends normally stops its server and dismisses the watcher.

Ctrl-C, which a terminal sends to every process of the flow, does not reach those servers: one that was still importing
would print its frames. The flow stops them.
"""

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from typing import Any

import psutil

_MARK = "GRAFTLINE_FLOW"
_SERVER = "PREFECT__SERVER_EPHEMERAL"
"""Prefect sets it only for its temporary server."""
_SECONDS = 3.0
"""How long the watcher looks for servers: one may just be starting when its flow is killed."""


def watch() -> None:
    """Start a watcher for the servers that this process will start; they inherit the mark with the environment."""
    if os.environ.get("PREFECT_API_URL"):
        return  # somebody else's server
    _shield_from_ctrl_c()
    os.environ[_MARK] = uuid.uuid4().hex
    # In a new session, so that a signal to the flow's process group does not reach it.
    watcher = subprocess.Popen(
        [sys.executable, "-I", __file__, os.environ[_MARK]],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=os.path.sep,
        start_new_session=True,
    )
    # Registered before Prefect's clean-up, and so run after it.
    atexit.register(watcher.communicate, b"the flow ended by itself")


def _shield_from_ctrl_c() -> None:
    from prefect.settings import PREFECT_API_URL

    if PREFECT_API_URL.value():
        return  # A profile names a server, so none is started.
    from prefect.server.api import server  # seconds, which starting a server takes anyway

    class Shielded(server.SubprocessASGIServer):
        def _run_uvicorn_command(self) -> "subprocess.Popen[Any]":
            # The server inherits the signals that this thread blocks.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                return super()._run_uvicorn_command()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    server.SubprocessASGIServer = Shielded  # type: ignore[misc]


def _end_servers(mark: str) -> None:
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                surroundings = process.environ()
                if surroundings.get(_MARK) == mark and _SERVER in surroundings:
                    process.kill()
        time.sleep(0.2)


def main() -> None:
    """``python -I graftline/workflow/orphans.py MARK``, with the lifeline as standard input."""
    if not os.read(0, 1):
        _end_servers(sys.argv[1])


if __name__ == "__main__":
    main()
