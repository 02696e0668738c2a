"""Trackers: where a training's figures are written beside its journal, through transformers' own callbacks.

| tracker     | writes                                                             | look with                     |
|-------------|--------------------------------------------------------------------|-------------------------------|
| tensorboard | ``tensorboard/`` in the given folder                               | ``tensorboard --logdir``      |
| dvclive     | ``dvclive/``: ``metrics.json`` and a table a figure under ``plots/`` | ``dvc metrics``, ``dvc plots`` |
| mlflow      | a run on the server that ``MLFLOW_TRACKING_URI`` names             | ``mlflow ui``                 |

A tracker that is started in the middle is told all steps before it first, from the journal: a training that was killed
has one curve without gaps and without steps that were done twice.
"""

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import DVCLiveCallback, MLflowCallback, TensorBoardCallback

from graftline.errors import TrainError
from graftline.settings.model import Tracker
from graftline.train.results import StepMetrics

_INSTALL = {
    "tensorboard": "pip install 'graftline[trackers]'",
    "dvclive": "pip install 'graftline[trackers]'",
    "mlflow": "pip install mlflow (docs/training.md says where)",
}


def tracker_callbacks(trackers: Sequence[Tracker], folder: Path) -> list[TrainerCallback]:
    """The callbacks of ``trackers``; their folders in ``folder`` start empty.

    Raises:
        TrainError: a tracker's package is not installed.
    """
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise TrainError(f"train.report_to names {name}, which is not installed; run: {_INSTALL[name]}")
    return [_MAKE[name](_emptied(folder / name)) for name in trackers]


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _tensorboard(folder: Path) -> TrainerCallback:
    from torch.utils.tensorboard import SummaryWriter  # an extra

    return TensorBoardCallback(SummaryWriter(str(folder)))


def _dvclive(folder: Path) -> TrainerCallback:
    from dvclive.live import Live  # an extra

    # No experiment of DVC's own: the stage that runs this is part of one already.
    live = Live(str(folder), save_dvc_exp=False, dvcyaml=False)
    live.step = 1  # as everybody else counts
    return DVCLiveCallback(live=live)


_MAKE: dict[Tracker, Callable[[Path], TrainerCallback]] = {
    "tensorboard": _tensorboard,
    "dvclive": _dvclive,
    "mlflow": lambda _: MLflowCallback(),
}


def as_logs(metrics: StepMetrics) -> dict[str, float]:
    """What transformers calls a step's figures."""
    logs = {"loss": metrics.loss, "grad_norm": metrics.grad_norm, "learning_rate": metrics.learning_rate}
    return logs if metrics.score is None else logs | {"eval_loss": metrics.score}


class TellSteps(TrainerCallback):
    """Tells trackers, when they have started, the steps of an earlier process."""

    def __init__(self, trackers: Sequence[TrainerCallback], steps: Callable[[], Sequence[StepMetrics]]) -> None:
        self._trackers, self._steps = trackers, steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Pass on every step that the journal holds."""
        now = state.global_step
        for metrics in self._steps():
            state.global_step = metrics.step
            for tracker in self._trackers:
                tracker.on_log(args, state, control, logs=as_logs(metrics))
        state.global_step = now
