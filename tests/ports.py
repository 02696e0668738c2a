"""Ports for servers that tests start as processes of their own."""

import contextlib
import socket
import subprocess
import time


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def wait_for_port(port: int, process: subprocess.Popen[bytes], *, what: str, seconds: float = 60) -> None:
    """Wait until ``process`` listens.

    Raises:
        RuntimeError: it ended, or did not listen in time.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise RuntimeError(f"{what} did not open port {port}")
