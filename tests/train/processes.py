"""Several processes of a training, forked from a test."""

import os
import signal
import time
import traceback
from collections.abc import Callable

import torch

from tests.ports import free_port


def run_processes(body: Callable[[int], None], count: int = 2) -> list[int]:
    """Run ``body(rank)`` in forked processes with torchrun's environment; returns their exit codes."""
    port = free_port()
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            os.environ |= {"WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(count)}
            code = 1
            # Where an earlier test had several OpenMP threads, a child would wait for those, which fork does not copy.
            torch.set_num_threads(1)
            try:
                body(rank)
                code = 0
            except BaseException:  # noqa: BLE001 - the exit code says it
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    codes: dict[int, int] = {}
    while len(codes) < count:
        # Only these: another test's process may end meanwhile.
        for child in set(children) - codes.keys():
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
        if any(codes.values()):  # as torchrun does: the others would wait for the one that failed
            for other in set(children) - codes.keys():
                os.kill(other, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[child] for child in children]
