"""What Ray's workers do in `test_ray`: a few steps of the tiny model, and ways in which a worker may end."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from graftline.errors import DataError, PreemptedError
from graftline.train.preemption import Preemption
from graftline.train.ray_workers import Cluster, train_with_ray
from graftline.train.results import StepMetrics

# What needs a model is imported where one is trained: Ray starts workers again and again, and imports take longest.


def train_tiny(base: Path, out: Path, *, killed_at: int = 0) -> None:
    """Six steps in each process; the first one of Ray's is killed once, after step ``killed_at``."""
    from graftline.train.checkpoint import save_trainable
    from graftline.train.distributed import rank
    from graftline.train.trainer import train
    from tests.sections import train_section
    from tests.train.rows import lora_model, make_rows

    def on_step(metrics: StepMetrics) -> None:
        with (out / "steps-done").open("a") as file:
            file.write(f"{metrics.step}\n")
        if metrics.step == killed_at and not (out / "killed").exists():
            (out / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    model = lora_model(base)
    settings = train_section(steps=6, batch_size=4, learning_rate=1e-2, checkpoint_every=2, device="cpu", threads=1)
    train(model, make_rows(40), settings=settings, work=out / "work", on_step=on_step)
    if rank() == 0:
        (out / "trained").mkdir()
        save_trainable(model, out / "trained")


def end_in(out: Path, *, way: str) -> None:
    """``error``: the second process finds bad rows, while the first waits for it; ``crash``: it always breaks.

    ``wait``: until the training is asked to end.
    """
    rank = os.environ["RANK"]
    with (out / f"started-{rank}").open("a") as file:
        file.write(f"{os.getpid()}\n")
    if way == "error" and rank == "1":
        raise DataError("row 7 has no answer; add one")
    if way == "crash" and rank == "1":
        raise ZeroDivisionError("of a third party")
    with Preemption() as preemption:
        while not preemption.is_asked:
            time.sleep(0.1)
    raise PreemptedError("asked to end after step 0 of 6")


def no_steps() -> int:
    """A training without a checkpoint."""
    return 0


@contextlib.contextmanager
def note(file: Path) -> Iterator[None]:
    """Say that the training has begun."""
    with file.open("a") as stream:
        stream.write("begun\n")
    yield


def main() -> None:
    """``BASE OUT torchrun|ray [KILLED_AT]`` or ``OUT error|crash|wait``; RAY_ADDRESS names the cluster."""
    import tests.train.ray_training as module  # by the name under which the workers import it

    if sys.argv[2] in ("error", "crash", "wait"):
        out, way = Path(sys.argv[1]), sys.argv[2]
        work, kept = partial(module.end_in, out, way=way), module.no_steps
    else:
        from graftline.train.checkpoint import newest_step
        from graftline.train.distributed import launch

        base, out, engine = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
        killed_at = int(sys.argv[4]) if len(sys.argv) > 4 else 0
        if engine == "torchrun" and "RANK" not in os.environ:
            launch(["tests.train.ray_training", *sys.argv[1:]], processes=2, on_line=print)
            return
        work, kept = partial(module.train_tiny, base, out, killed_at=killed_at), partial(newest_step, out / "work")
        if engine == "torchrun":
            work()
            return
    cluster = Cluster(processes=2, address=None, device="cpu", wait_seconds=1.0)
    beside = partial(note, out / "beside")
    train_with_ray(
        work, name=out.name, cluster=cluster, folder=out / "ray", steps_kept=kept, on_line=print, beside=beside
    )


if __name__ == "__main__":
    from graftline.program import guarded

    with guarded():
        main()
