"""Metrics of a training, per step and in total, and the trackers that record them."""

import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from graftline.errors import TrainError
from graftline.settings.model import Tracker


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Metrics of one optimizer step."""

    step: int
    """Step number, from 1."""
    total_steps: int
    loss: float
    """Mean negative log-likelihood in nats per supervised token of the step, before the update."""
    grad_norm: float
    """Global L2 norm of the gradients before clipping."""
    learning_rate: float
    """Learning rate of this update."""
    tokens: int
    """Input tokens of the step on all devices, excluding padding."""
    supervised_tokens: int
    """Tokens in the loss, on all devices."""
    score: float | None = None
    """Evaluation score after this step; lower is better. None without an evaluation."""


OnStep = Callable[[StepMetrics], None]
"""Called after every optimizer step."""


def ignore_step(metrics: StepMetrics) -> None:
    """Step callback that does nothing."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Result of a training. Counts cover the whole training, times only this process, not those before a resume."""

    losses: tuple[float, ...]
    """Loss of every step, including those before a resume."""
    steps: int
    scores: tuple[tuple[int, float], ...]
    """Step and score of each evaluation; lower is better."""
    best_step: int | None
    """Step of the best adapter, which the model now has; None without an evaluation: it has the last step's."""
    tokens: int
    """Input tokens of all steps, excluding padding."""
    tokens_per_second: float
    """Input tokens per second in this process; 0 if nothing was left to do."""
    peak_bytes: int
    """Peak memory during this process's steps: allocated CUDA memory, or the process's resident set on CPU."""
    optimizer_bytes: int
    """Memory of the optimizer's states; 0 if nothing was left to do."""
    seconds: float
    """Wall-clock seconds of this process's steps, including checkpoints."""


# Trackers: where a training's metrics are written besides its journal.
#
# | tracker     | writes                                                             | view with                      |
# |-------------|--------------------------------------------------------------------|--------------------------------|
# | tensorboard | ``tensorboard/`` in the given folder                               | ``tensorboard --logdir``       |
# | dvclive     | ``dvclive/``: ``metrics.json``, a table per metric in ``plots/``   | ``dvc metrics``, ``dvc plots`` |
# | mlflow      | a run on the server that ``MLFLOW_TRACKING_URI`` names             | ``mlflow ui``                  |
# | wandb       | ``wandb/``, offline unless ``WANDB_MODE`` says otherwise           | ``wandb sync``                 |
#
# A tracker that starts mid-training first gets all earlier steps from the journal, so a killed training has one curve
# without gaps or repeated steps.

_INSTALL = {
    "tensorboard": "pip install 'graftline[trackers]'",
    "dvclive": "pip install 'graftline[trackers]'",
    "mlflow": "pip install mlflow (docs/training.md says where)",
    "wandb": "pip install wandb",
}
_RUN_NAME = "graftline"


class _Writer(Protocol):
    def log(self, step: int, figures: dict[str, float]) -> None:
        """Write one step's metrics."""

    def close(self) -> None:
        """Write everything to disk, or send it."""


class Trackers:
    """The trackers of a training; each writes to a subfolder of ``folder`` that starts empty."""

    def __init__(self, names: Sequence[Tracker], folder: Path) -> None:
        """Check the trackers, without starting them.

        Raises:
            TrainError: a tracker's package is not installed.
        """
        for name in names:
            if importlib.util.find_spec(name) is None:
                raise TrainError(f"train.report_to names {name}, which is not installed; run: {_INSTALL[name]}")
        self._names, self._folder = names, folder
        self._writers: list[_Writer] = []

    def __enter__(self) -> Self:
        """Start the trackers."""
        for name in self._names:
            shutil.rmtree(self._folder / name, ignore_errors=True)
            self._writers.append(_MAKE[name](self._folder / name))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        """Close the trackers, even after an error."""
        for writer in self._writers:
            writer.close()

    def tell(self, steps: Sequence[StepMetrics]) -> None:
        """Write the metrics of ``steps``."""
        for metrics in steps if self._writers else ():
            figures = {"loss": metrics.loss, "grad_norm": metrics.grad_norm, "learning_rate": metrics.learning_rate}
            if metrics.score is not None:
                figures["eval_loss"] = metrics.score
            for writer in self._writers:
                writer.log(metrics.step, figures)


def _slashed(name: str, training: str = "") -> str:
    """``eval_loss`` -> ``eval/loss``, ``loss`` -> ``<training>loss``: the names that these tools expect."""
    return name.replace("eval_", "eval/") if name.startswith("eval_") else f"{training}{name}"


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # optional dependency

        self._writer = SummaryWriter(str(folder))

    def log(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(_slashed(name, "train/"), value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _DvcLive:
    def __init__(self, folder: Path) -> None:
        from dvclive.live import Live  # optional dependency

        self._live = Live(str(folder), save_dvc_exp=False, dvcyaml=False)

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._live.step = step
        for name, value in figures.items():
            self._live.log_metric(_slashed(name), value)
        self._live.make_summary()

    def close(self) -> None:
        self._live.end()


class _MLflow:
    def __init__(self, folder: Path) -> None:
        import mlflow  # not among the pinned packages

        self._mlflow = mlflow
        self._starts_run = mlflow.active_run() is None
        if self._starts_run:
            mlflow.start_run(run_name=_RUN_NAME)

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._mlflow.log_metrics(figures, step=step)

    def close(self) -> None:
        if self._starts_run:
            self._mlflow.end_run()


class _WandB:
    def __init__(self, folder: Path) -> None:
        import wandb  # not among the pinned packages

        folder.mkdir(parents=True)
        mode = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(project=os.environ.get("WANDB_PROJECT", _RUN_NAME), dir=str(folder), mode=mode)

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._run.log({_slashed(name, "train/"): value for name, value in figures.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


_MAKE: dict[Tracker, Callable[[Path], _Writer]] = {
    "tensorboard": _TensorBoard,
    "dvclive": _DvcLive,
    "mlflow": _MLflow,
    "wandb": _WandB,
}
