"""A stage's process hands its work to one that keeps the base in memory, before imports that take seconds.

    GRAFTLINE_STAGE_WORKER=SOCKET python -m tasks.train PIPELINE

The request is a line of JSON with the two output files attached (SCM_RIGHTS), so that the other process writes straight
into them (`graftline.workflow.stage_worker`); the answer is a line with the exit code. Where nobody listens, the stage
does its work itself.
"""

import json
import os
import signal
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

VARIABLE = "GRAFTLINE_STAGE_WORKER"
STAGES = ("train", "evaluate")
"""The stages that load the base."""
EXIT_KILLED = 128 + signal.SIGKILL


@dataclass(frozen=True)
class Request:
    """One stage to run."""

    stage: str
    pipeline: str
    folder: str
    """The checkout."""
    environment: dict[str, str]


def where_asked() -> None:
    """In a stage's process that is told of a worker: have the work done there, and end with its exit code."""
    address, (stage, pipeline) = os.environ.pop(VARIABLE, None), _started(sys.orig_argv)
    if not address or stage not in STAGES:
        return
    request = Request(stage, pipeline, str(Path.cwd()), dict(os.environ))
    try:
        code = ask(address, request)
    except OSError:
        return  # nobody listens
    if code is None:
        sys.stderr.write("error: the process that runs this sweep's trainings and evaluations was ended\n")
        code = EXIT_KILLED
    sys.exit(code)


def ask(address: str, request: Request) -> int | None:
    """Have a stage run with this process's outputs; returns its exit code, None if the worker ended meanwhile.

    Raises:
        OSError: nobody listens at ``address``.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        try:
            socket.send_fds(connection, [b"{"], [sys.stdout.fileno(), sys.stderr.fileno()])
            connection.sendall(json.dumps(asdict(request)).encode()[1:] + b"\n")
            answer = connection.makefile(encoding="utf-8").readline()
        except ConnectionError:
            return None
    return int(json.loads(answer)["code"]) if answer.endswith("\n") else None


def receive(connection: socket.socket) -> tuple[Request | None, list[int]]:
    """The other side's request and its two outputs; None if the connection only asks the worker to end."""
    data, files, _, _ = socket.recv_fds(connection, 1 << 16, 2)
    while not data.endswith(b"\n"):
        more = connection.recv(1 << 16)
        if not more:
            return None, files
        data += more
    return Request(**json.loads(data)), files


def answer(connection: socket.socket, code: int) -> None:
    """Tell the exit code."""
    connection.sendall(json.dumps({"code": code}).encode() + b"\n")


def _started(words: list[str]) -> tuple[str, str]:
    """Stage and pipeline of ``python -m tasks.STAGE PIPELINE``; empty for another command."""
    match words[1:]:
        case ["-m", module, pipeline] if module.startswith("tasks."):
            return module.removeprefix("tasks."), pipeline
    return "", ""
