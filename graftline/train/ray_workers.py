"""Runs a training's processes as Ray Train workers: on this machine, or on the nodes of a Ray cluster.

Ray chooses the nodes, starts the processes and assigns their ranks, as torchrun does on one machine. If a worker is
lost (its node was taken, its memory ran out), all stop; Ray restarts them, on other nodes if necessary, and the
training resumes from its newest checkpoint. Workers run in the project's folder, which every node must see at the same
path.

The process that starts the workers supervises them through one actor, the `_Board`: it prints their lines, forwards
SIGTERM, and learns why a worker gave up. The board has the training's name in the cluster, so two trainings of the same
name never run at once. Board and workers end with the process that started them, however that ends.
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
"""Maximum number of starts without a new checkpoint in between, so that a recurring error ends the training."""

OnLine = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where the workers run and what each of them needs."""

    processes: int
    """Number of workers."""
    address: str | None
    """Address of the Ray cluster, as for ``ray.init``. None: the cluster in ``RAY_ADDRESS``, else one that is started
    on this machine's loopback address and ends with this process."""
    device: str
    """`cuda`: one GPU per worker; `cpu`: none; `auto`: one if the cluster has GPUs."""
    wait_seconds: float = 90.0
    """How long to wait for another training of the same name, which may still be ending after its starter died."""


def train_with_ray(
    work: Callable[[], None],
    *,
    name: str,
    cluster: Cluster,
    folder: Path,
    steps_kept: Callable[[], int],
    on_line: OnLine,
    beside: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> None:
    """Run ``work`` in every worker, in this process's folder; returns when all have ended.

    Args:
        work: runs a training process from its start or newest checkpoint to the end. Pickled for the workers.
        name: name of the training, unique in the cluster.
        cluster: where the workers run.
        folder: folder for Ray Train's own state, visible to all nodes.
        steps_kept: returns the steps of the newest checkpoint; 0 if there is none. Pickled for the workers too.
        on_line: called with each line of the workers' output.
        beside: entered once no other training of this name runs, left when this one has ended.

    Raises:
        ConfigError: Ray is not installed, or its version is not supported.
        LockedError: a training of this name is running in the cluster.
        ClusterError: the cluster cannot be reached.
        TrainError: workers ended repeatedly without a new checkpoint.
        PreemptedError: this process was asked to stop (SIGTERM); the steps so far are in a checkpoint.
        GraftlineError: a worker raised it.
    """
    # Workers stay in the project's folder; the board collects their output.
    os.environ.update(RAY_TRAIN_V2_ENABLED="1", RAY_CHDIR_TO_TRIAL_DIR="0", RAY_TRAIN_ENABLE_PRINT_PATCH="0")
    with connected(cluster.address, processes=cluster.processes) as ray:
        board = _pin_up(ray, name, cluster.wait_seconds, on_line)
        with beside():
            with _watched(ray, board, on_line):
                _fit(ray, _Job(board=board, root=Path.cwd(), work=work, steps_kept=steps_kept), name, cluster, folder)
            reason = ray.get(board.reason.remote())
            if reason is not None:
                kind, message = reason
                raise kind(message)


class _Board:
    """Actor through which the workers and the process that started them communicate."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._lines: list[str] = []
        self._reason: tuple[type[GraftlineError], str] | None = None
        self._is_asked_to_end = False
        self._kept, self._starts = -1, 0
        self._last_trace = ""

    def owner(self) -> str:
        """The process that started the training."""
        return self._owner

    def tell(self, line: str) -> None:
        """Add a line of a worker's output."""
        self._lines.append(line)

    def take_lines(self) -> list[str]:
        """The lines since the last call."""
        lines, self._lines = self._lines, []
        return lines

    def give_up(self, kind: type[GraftlineError], message: str) -> None:
        """Record that a worker cannot continue and a restart would not help. The first reason counts."""
        self._reason = self._reason or (kind, message)

    def reason(self) -> tuple[type[GraftlineError], str] | None:
        """Why a worker gave up."""
        return self._reason

    def note(self, trace: str) -> None:
        """Record a worker's failure that a restart may avoid."""
        self._last_trace = trace

    def begin(self, steps_kept: int) -> None:
        """Record a start of the first worker, with ``steps_kept`` steps in a checkpoint; give up after too many."""
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
        """Ask the training to stop at a checkpoint."""
        self._is_asked_to_end = True

    def is_asked_to_end(self) -> bool:
        """Whether the training was asked to stop."""
        return self._is_asked_to_end


def _pin_up(ray: ModuleType, name: str, wait_seconds: float, on_line: OnLine) -> Any:
    """Create the board of the training ``name`` on this node, the only one in the cluster."""
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
    """Collect the workers' lines and forward SIGTERM to them until the block ends."""
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

    # After ray.init, which installs its own handler.
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
    """Input of a worker."""

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
        # The board counts lost workers; there is no limit as long as new checkpoints are written.
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
        return  # Ray restarted the workers; they would give up for the same reason.
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
        ray.get(board.give_up.remote(PreemptedError, str(error)))  # every worker stops after the same step
    except GraftlineError as error:
        kind = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
        ray.get(board.give_up.remote(kind, str(error)))
        raise  # stops the other workers, which may be waiting for this one
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
    """Send the first worker's output and log, and the warnings of all workers, to the board."""

    class ToBoard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            board.tell.remote(self.format(record))

    handler, logger = ToBoard(logging.INFO if is_first else logging.WARNING), logging.getLogger("graftline")
    handler.setFormatter(logging.Formatter("train: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # Ray's own handler would print it again
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
    """Standard error of a worker; sends each complete line to the board."""

    def __init__(self, board: Any) -> None:
        self._board, self._begun = board, ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in filter(str.strip, lines):
            self._board.tell.remote(line.rstrip())
        return len(text)

    def flush(self) -> None:
        """Nothing to do: complete lines are sent at once."""


@contextlib.contextmanager
def _listening(ray: ModuleType, board: Any) -> Iterator[None]:
    """Tell the training when to stop at a checkpoint: SIGTERM to a worker never reaches it."""
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
