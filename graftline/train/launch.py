"""Start a training's processes with torchrun, on this machine or together with others.

On one machine torchrun finds a free port itself. On several, torchrun's own environment variables say who is who:
``PET_NNODES``, ``PET_NODE_RANK``, ``PET_MASTER_ADDR``, ``PET_MASTER_PORT`` (every option of torch.distributed.run has
one). Then only the first machine knows when the training starts; it writes the others' command to the file that
``GRAFTLINE_JOIN_FILE`` names, in a folder that all of them see (infra/k8s/work-pool.json).
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from graftline.digest import write_text
from graftline.errors import TrainError
from graftline.limits import memory_kills, why_killed
from graftline.train.distributed import num_processes

_JOIN_FILE = "GRAFTLINE_JOIN_FILE"
_KILLED = re.compile(r"exitcode\s*: -9\b")
"""How torchrun tells it."""
_EXPLAINED = "error: "
"""Begins the line with which a process says what is wrong."""


def must_launch(processes: int) -> bool:
    """Whether this process has to start those of the training, rather than being one of them.

    Raises:
        TrainError: torchrun started another number of them.
    """
    running = num_processes()
    if running > 1 and running != processes:
        raise TrainError(
            f"torchrun started {running} processes, train.processes is {processes}; the rows of a step depend on it: "
            f"write train.processes: {running}, or start {processes}"
        )
    return running < processes


def launch(command: Sequence[str], *, processes: int, on_line: Callable[[str], None]) -> None:
    """Run ``python -m <command>`` in ``processes`` processes over all machines; returns when they have ended.

    Raises:
        TrainError: one failed, or the processes cannot be shared out evenly over the machines.
    """
    nodes = int(os.environ.get("PET_NNODES", "1"))
    if processes % nodes:
        raise TrainError(f"train.processes is {processes} on {nodes} machines; expected a multiple of {nodes}")
    options = [f"--nproc-per-node={processes // nodes}", *(["--standalone"] if nodes == 1 else [])]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *options, "-m", *command]
    if nodes > 1 and _JOIN_FILE in os.environ:
        write_text(Path(os.environ[_JOIN_FILE]), f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(torchrun)}\n")
    _run(torchrun, on_line)


def _run(torchrun: Sequence[str], on_line: Callable[[str], None]) -> None:
    explained, kills_before, was_killed = "", memory_kills(), False
    with subprocess.Popen(
        torchrun, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            on_line(line.rstrip("\n"))
            was_killed = was_killed or bool(_KILLED.search(line))
            if line.startswith(_EXPLAINED) and not explained:
                explained = line.removeprefix(_EXPLAINED).strip()
    if process.returncode and was_killed and not explained:
        raise TrainError(f"a process of the training was ended by SIGKILL: {why_killed(kills_before)}")
    if process.returncode:
        raise TrainError(
            explained or f"torchrun ended with exit code {process.returncode}; its output above says which process"
        )
