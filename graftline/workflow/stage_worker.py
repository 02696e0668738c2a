"""Processes that run trainings and evaluations of a sweep's cells one after another, and keep the base between them.

A cell's stages are still DVC's: their own processes hand the work over (`graftline.handover`) and pass its exit code
on. So a cell has the files, the cache entries and the checkpoints that it would have alone; it saves the imports and
the loading of the base. A stage that fails leaves the process as it was: the next one gets modules of its own, and the
base anew if its tensors changed (`graftline.weights.kept_base`). A process that was killed is started again.
"""

import contextlib
import gc
import importlib
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock

from graftline import handover
from graftline.errors import GraftlineError
from graftline.train import preemption
from graftline.workflow import stage, stages, worktree

logger = logging.getLogger("graftline.stage_worker")

_ASK_SECONDS = 0.2
"""A training that has not begun its first step forgets that it was asked to end."""


class StageWorkers:
    """The processes of one sweep: one for each cell that runs at the same time."""

    def __init__(self, code: Path, sockets: Path) -> None:
        """Start without one.

        Args:
            code: a checkout of the commit of all cells, whose code the processes run.
            sockets: an empty folder with a short path.
        """
        self._code, self._sockets = code, sockets
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._started = 0

    @contextlib.contextmanager
    def borrow(self) -> Iterator[dict[str, str]]:
        """A process for one cell, as environment variables of its stages."""
        with self._lock:
            self._idle = [worker for worker in self._idle if worker.is_alive()]
            worker = self._idle.pop() if self._idle else self._start()
        try:
            yield {handover.VARIABLE: worker.address}
        finally:
            with self._lock:
                self._idle.append(worker)

    def close(self) -> None:
        """End the processes, which do nothing now."""
        for worker in self._idle:
            worker.end()

    def _start(self) -> "_Worker":
        self._started += 1
        return _Worker(self._code, str(self._sockets / str(self._started)))


class _Worker(threading.Thread):
    """One process, and the thread that reads its output."""

    def __init__(self, code: Path, address: str) -> None:
        super().__init__(daemon=True)
        self.address, self._code = address, code
        self.start()

    def run(self) -> None:
        command = [sys.executable, "-m", "graftline.workflow.stage_worker", self.address]
        try:
            stages.run_command(command, stage="worker", pipeline="sweep", root=self._code, on_line=logger.info)
        except GraftlineError as error:
            logger.warning("%s; another one is started for the next cell", error)

    def end(self) -> None:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self.address)
        self.join()


@contextlib.contextmanager
def workers(root: Path, revision: str) -> Iterator[StageWorkers]:
    """The processes of a sweep of ``root`` at a commit, ended after the block."""
    with contextlib.ExitStack() as stack:
        sockets = stack.enter_context(tempfile.TemporaryDirectory(prefix="graftline-"))
        (root / ".cache").mkdir(exist_ok=True)
        with FileLock(root / ".cache" / "sweep.lock"):
            code = stack.enter_context(worktree.isolated(root, revision))
        made = StageWorkers(code, Path(sockets))
        stack.callback(made.close)
        yield made


def serve(address: str) -> None:
    """Run the stages that are asked for at the socket ``address``, until one asks this process to end."""
    stage.check_code()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        from graftline.weights import kept_base  # seconds, in which the first request can wait

        kept = kept_base.keep_bases()
        for name in handover.STAGES:
            importlib.import_module(f"tasks.{name}")
        while True:
            connection, _ = listener.accept()
            with connection:
                request, outputs = handover.receive(connection)
                if request is None:
                    return
                code, was_left = _run_for(connection, request, outputs)
            if code == stage.EXIT_PREEMPTED and not was_left:
                return  # SIGTERM was for this process
            kept.check()
            _forget_compiled()


def _run_for(connection: socket.socket, request: handover.Request, outputs: Sequence[int]) -> tuple[int, bool]:
    """Run a stage, and end it where the process that asked has ended: a training after the step that runs.

    Returns its exit code, and whether the other side left.
    """
    is_done, is_left = threading.Event(), threading.Event()

    def watch() -> None:
        with contextlib.suppress(OSError):
            connection.recv(1)
        if is_done.is_set():
            return
        is_left.set()
        if request.stage != "train":
            os.kill(os.getpid(), signal.SIGTERM)
        while not is_done.wait(_ASK_SECONDS):
            preemption.ask()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    with _writing_to(outputs):
        code = _run(request)
    is_done.set()
    with contextlib.suppress(ConnectionError):
        handover.answer(connection, code)
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    watcher.join()
    return code, is_left.is_set()


def _run(request: handover.Request) -> int:
    """Run a stage as its own process would; returns the exit code."""
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.folder)
    logging.getLogger().handlers.clear()  # the stage's frame makes its own
    module = importlib.import_module(f"tasks.{request.stage}")
    try:
        stage.run_guarded(request.stage, request.pipeline, module.run, measure=True, is_own_process=False)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001  # whatever it was, the next cell is another stage
        traceback.print_exc()
        return 1
    finally:
        gc.collect()
    return 0


@contextlib.contextmanager
def _writing_to(outputs: Sequence[int]) -> Iterator[None]:
    """Let standard output and error be these files, also for this process's children."""
    own = [os.dup(descriptor) for descriptor in (1, 2)]
    for descriptor, output in enumerate(outputs, 1):
        os.dup2(output, descriptor)
        os.close(output)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, before in enumerate(own, 1):
            os.dup2(before, descriptor)
            os.close(before)


def _forget_compiled() -> None:
    """Let the next training compile anew: torch stops compiling a function that it has compiled eight times."""
    if "torch._dynamo" in sys.modules:
        import torch

        torch.compiler.reset()


if __name__ == "__main__":
    serve(sys.argv[1])
