"""A PostgreSQL server for a test, where one is installed."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.ports import free_port, wait_for_port


@contextlib.contextmanager
def postgres() -> Iterator[str | None]:
    """The address of an empty database for Prefect; None if PostgreSQL is not installed."""
    initdb, server = shutil.which("initdb"), shutil.which("postgres")
    if not initdb or not server:
        yield None
        return
    folder = Path(tempfile.mkdtemp(prefix="graftline-postgres-"))
    prefix: list[str] = []
    if os.geteuid() == 0:  # It refuses to run as root.
        shutil.chown(folder, "nobody", "nogroup")
        prefix = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
    data = str(folder / "data")
    subprocess.run(
        [*prefix, initdb, "--pgdata", data, "--username", "prefect", "--auth", "trust", "--no-sync"],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    port = free_port()
    settings = ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off"]
    process = subprocess.Popen(
        [*prefix, server, "-D", data, "-p", str(port), *settings],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for_port(port, process, what="PostgreSQL")
        yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/postgres"
    finally:
        process.terminate()
        process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)
