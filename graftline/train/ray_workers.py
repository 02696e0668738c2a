"""A training's processes as workers of Ray Train: on this machine, or on the nodes of a Ray cluster.

Ray chooses the nodes, starts the processes and tells each its rank, as torchrun does on one machine. A worker that is
lost (its node was taken, its memory ran out) ends them all; Ray starts them again, on other nodes where it must, and
the training resumes from its newest checkpoint. Workers work in the project's folder, which every node must see at the
same path.

The process that starts them watches over them through one actor, the `_Board`: it prints the workers' lines, passes a
SIGTERM on, and learns why a worker gave up. The board has the training's name in the cluster, so that there is never a
second training of the same name, and it and the workers end with the process that started them, however that ends.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from graftline import errors
from graftline.errors import GraftlineError, LockedError, PreemptedError, TrainError
from graftline.ray_cluster import NAMESPACE, connected
from graftline.train import preemption

_LOG = logging.getLogger(__name__)
_LOOK_SECONDS = 0.5
_ASK_SECONDS = 1.0
_STARTS = 3
"""How often workers are started without a new checkpoint in between: an error that comes each time ends it."""

OnLine = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where the workers run and what each of them needs."""

    processes: int
    """Workers."""
    address: str | None
    """Of the Ray cluster, as ``ray.init`` takes it. None: the cluster that ``RAY_ADDRESS`` names, else one that is
    started on this machine's loopback address and ends with this process."""
    device: str
    """`cuda`: a GPU for each worker; `cpu`: none; `auto`: one where the cluster has GPUs."""
    wait_seconds: float = 90.0
    """How long another training of the same name is waited for: that of a starter that has died may still be ending."""


def train_with_ray(
    work: Callable[[], None],
    *,
    name: str,
    cluster: Cluster,
    folder: Path,
    steps_kept: Callable[[], int],
    on_line: OnLine,
) -> None:
    """Run ``work`` in every worker, in this process's folder; returns when all have ended.

    Args:
        work: a training's process, from its start or its newest checkpoint to the end. Sent to the workers by pickle.
        name: of the training; there is one of this name in a cluster.
        cluster: where the workers run.
        folder: for Ray Train's own state, seen by all nodes.
        steps_kept: steps of the newest checkpoint; 0 if there is none. Sent to the workers too.
        on_line: is called with each line of the workers' output.

    Raises:
        ConfigError: Ray is not installed, or in a version that is not supported.
        LockedError: a training of this name is running in the cluster.
        ClusterError: the cluster cannot be reached.
        TrainError: workers ended again and again without a new checkpoint.
        PreemptedError: this process was asked to end (SIGTERM); the steps so far are in a checkpoint.
        GraftlineError: a worker raised it.
    """
    # Workers stay in the project's folder; what they print is taken by the board.
    os.environ.update(RAY_TRAIN_V2_ENABLED="1", RAY_CHDIR_TO_TRIAL_DIR="0", RAY_TRAIN_ENABLE_PRINT_PATCH="0")
    with connected(cluster.address, processes=cluster.processes) as ray:
        board = _pin_up(ray, name, cluster.wait_seconds, on_line)
        with _watched(ray, board, on_line):
            _fit(ray, _Job(board=board, root=Path.cwd(), work=work, steps_kept=steps_kept), name, cluster, folder)
        reason = ray.get(board.reason.remote())
        if reason is not None:
            kind, message = reason
            raise kind(message)


class _Board:
    """What the workers and the process that started them tell each other; an actor."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._lines: list[str] = []
        self._reason: tuple[type[GraftlineError], str] | None = None
        self._is_asked_to_end = False
        self._kept, self._starts = -1, 0
        self._last_trace = ""

    def owner(self) -> str:
        """Who started the training."""
        return self._owner

    def tell(self, line: str) -> None:
        """A line of a worker's output."""
        self._lines.append(line)

    def take_lines(self) -> list[str]:
        """The lines since the last call."""
        lines, self._lines = self._lines, []
        return lines

    def give_up(self, kind: type[GraftlineError], message: str) -> None:
        """A worker cannot go on, and starting it again would not help. The first reason counts."""
        self._reason = self._reason or (kind, message)

    def reason(self) -> tuple[type[GraftlineError], str] | None:
        """Why a worker gave up."""
        return self._reason

    def note(self, trace: str) -> None:
        """A worker failed in a way that another start may not meet."""
        self._last_trace = trace

    def begin(self, steps_kept: int) -> None:
        """The first worker begins, with ``steps_kept`` steps in a checkpoint; gives up if that is once too often."""
        if self._kept >= 0:
            self.tell(f"train: a worker was lost, all begin again after step {steps_kept}")
        self._starts = self._starts + 1 if steps_kept <= self._kept else 1
        self._kept = max(self._kept, steps_kept)
        if self._starts > _STARTS:
            about = self._last_trace.strip() or "they were killed: look at the nodes' memory and at Ray's logs"
            self.give_up(
                TrainError,
                f"the workers ended {_STARTS} times after step {self._kept} without a new checkpoint: {about}",
            )

    def ask_to_end(self) -> None:
        """The training is to stop at a checkpoint."""
        self._is_asked_to_end = True

    def is_asked_to_end(self) -> bool:
        """Whether it is."""
        return self._is_asked_to_end


def _pin_up(ray: ModuleType, name: str, wait_seconds: float, on_line: OnLine) -> Any:
    """The board of the training ``name``, on this node; there is one in the cluster."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    actor = ray.remote(num_cpus=0, max_concurrency=1)(_Board).options(
        name=f"train {name}", scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False)
    )
    owner = f"process {os.getpid()} on {os.uname().nodename}"
    end, is_told = time.monotonic() + wait_seconds, False
    while True:
        try:
            board = actor.remote(owner)
            ray.get(board.owner.remote())
        except ValueError as error:  # the name is taken
            running = f"the training {name} is running in this Ray cluster already, started by {_owner(ray, name)}"
            if time.monotonic() > end:
                raise LockedError(f"{running}; wait for it or stop that process") from error
            if not is_told:
                on_line(f"train: {running}; it is waited for up to {wait_seconds:.0f} s")
                is_told = True
            time.sleep(2 * _LOOK_SECONDS)
        else:
            return board


def _owner(ray: ModuleType, name: str) -> str:
    try:
        return str(ray.get(ray.get_actor(f"train {name}", namespace=NAMESPACE).owner.remote(), timeout=10))
    except (ValueError, ray.exceptions.RayError):
        return "another process"


@contextlib.contextmanager
def _watched(ray: ModuleType, board: Any, on_line: OnLine) -> Iterator[None]:
    """Take the workers' lines, and pass SIGTERM on to them, until the block ends."""
    asked, ended = threading.Event(), threading.Event()

    def pass_on() -> None:
        for line in ray.get(board.take_lines.remote()):
            on_line(line)

    def watch() -> None:
        was_asked = False
        while not ended.wait(_LOOK_SECONDS):
            if asked.is_set() and not was_asked:
                was_asked = True
                ray.get(board.ask_to_end.remote())
            pass_on()

    # After ray.init, which sets a handler of its own.
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        with contextlib.suppress(ray.exceptions.RayError):
            pass_on()
        signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What a worker is given."""

    board: Any
    root: Path
    work: Callable[[], None] = field(repr=False)
    steps_kept: Callable[[], int] = field(repr=False)


def _fit(ray: ModuleType, job: _Job, name: str, cluster: Cluster, folder: Path) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    has_gpus = ray.cluster_resources().get("GPU", 0) >= 1
    wants_gpus = cluster.device == "cuda" or (cluster.device == "auto" and has_gpus)
    trainer = TorchTrainer(
        _run_worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(num_workers=cluster.processes, use_gpu=wants_gpus),
        # Lost workers are counted by the board: without limit as long as there are new checkpoints.
        run_config=RunConfig(
            name=name.replace("/", "-"),
            storage_path=str(folder.resolve()),
            failure_config=FailureConfig(max_failures=-1),
        ),
    )
    try:
        trainer.fit()
    except ray.exceptions.RayError as error:
        raise TrainError(f"Ray ended the training: {' '.join(str(error).split())}") from error


def _run_worker(config: dict[str, _Job]) -> None:
    import ray
    from ray import train

    job = config["job"]
    board, is_first = job.board, train.get_context().get_world_rank() == 0
    if ray.get(board.reason.remote()) is not None:
        return  # Ray has started the workers again; the reason would be the same.
    try:
        _enter(job.root)
        if is_first:
            ray.get(board.begin.remote(job.steps_kept()))
            if reason := ray.get(board.reason.remote()):
                kind, message = reason
                raise kind(message)
        with _telling(ray, board, is_first=is_first), _listening(ray, board):
            job.work()
    except PreemptedError as error:
        ray.get(board.give_up.remote(PreemptedError, str(error)))  # each worker comes here after the same step
    except GraftlineError as error:
        kind = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
        ray.get(board.give_up.remote(kind, str(error)))
        raise  # ends the others, which may wait for this one
    except Exception:
        ray.get(board.note.remote(traceback.format_exc(limit=-3)))
        raise


def _enter(root: Path) -> None:
    try:
        os.chdir(root)
    except OSError as error:
        raise TrainError(
            f"the node {os.uname().nodename} does not see the project's folder {root} ({error.strerror}); keep it on "
            "storage that every node of the Ray cluster mounts at the same path"
        ) from error


@contextlib.contextmanager
def _telling(ray: ModuleType, board: Any, *, is_first: bool) -> Iterator[None]:
    """The first worker's output and log, and warnings of all, go to the board."""

    class ToBoard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            board.tell.remote(self.format(record))

    handler, logger = ToBoard(logging.INFO if is_first else logging.WARNING), logging.getLogger("graftline")
    handler.setFormatter(logging.Formatter("train: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # Ray's own handler would print it once more
    before = sys.stderr
    if is_first:
        sys.stderr = _ToBoard(board)
    try:
        yield
    finally:
        sys.stderr = before
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = True


class _ToBoard:
    """Standard error of a worker: each whole line goes to the board."""

    def __init__(self, board: Any) -> None:
        self._board, self._begun = board, ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in filter(str.strip, lines):
            self._board.tell.remote(line.rstrip())
        return len(text)

    def flush(self) -> None:
        """Lines are sent as they end."""


@contextlib.contextmanager
def _listening(ray: ModuleType, board: Any) -> Iterator[None]:
    """Tell the training when it is to end at a checkpoint: a worker's own SIGTERM never reaches it."""
    ended = threading.Event()

    def listen() -> None:
        while not ended.wait(_ASK_SECONDS):
            with contextlib.suppress(ray.exceptions.RayError):
                if ray.get(board.is_asked_to_end.remote()):
                    preemption.ask()
                    return

    threading.Thread(target=listen, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
