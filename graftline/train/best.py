"""Selects the best adapter by the loss on held-out rows, with early stopping."""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy
import torch
from transformers import PreTrainedModel

from graftline.data.columns import columns_of
from graftline.data.template import Encoded
from graftline.errors import TrainError
from graftline.settings.model import Train
from graftline.train.batches import MicroBatch, check_rows, pad_rows
from graftline.train.checkpoint import load_trainable, replace_folder, save_trainable
from graftline.train.devices import DTYPES, needs_autocast, resolve_device, resolve_precision
from graftline.train.distributed import is_main, wait_for_all
from graftline.train.preferences import loss_of
from graftline.train.results import StepMetrics

Evaluate = Callable[[PreTrainedModel], float]
"""Scores the current model, in evaluation mode; lower is better. It draws no random numbers."""
_FOLDER = "best-"


class BestAdapter:
    """Evaluates every ``settings.evaluate_every`` steps; ``best-<step>`` holds the adapter with the lowest score.

    The best one as of the newest checkpoint is kept too: a training that resumes from there may need it.
    """

    def __init__(self, model: PreTrainedModel, work: Path, *, evaluate: Evaluate | None, settings: Train) -> None:
        self._model, self._work, self._evaluate, self._settings = model, work, evaluate, settings
        self._at_checkpoint: int | None = None

    def score(self, step: int, before: Sequence[StepMetrics]) -> float | None:
        """Evaluate after ``step`` if due, and save the adapter if it beats all ``before``.

        Raises:
            TrainError: the score is not finite.
        """
        if self._evaluate is None or step % self._settings.evaluate_every:
            return None
        self._model.eval()
        # Evaluation must not advance the random state, which a resumed training has to reproduce.
        with torch.no_grad(), torch.random.fork_rng():
            score = float(self._evaluate(self._model))
        self._model.train()
        if not math.isfinite(score):
            raise TrainError(
                f"after step {step} the loss on the held-out rows is {score}; a finite one is expected. Lower "
                "train.learning_rate, or write another train.precision than fp16"
            )
        best = _best(before)
        if is_main() and (best is None or score < best[0]):
            with replace_folder(self._folder(step)) as folder:
                save_trainable(self._model, folder)
            self._keep({step, self._at_checkpoint})
        return score

    def mark(self, steps: Sequence[StepMetrics]) -> None:
        """Record that a checkpoint exists after ``steps``."""
        best = _best(steps)
        self._at_checkpoint = best and best[1]

    def _folder(self, step: int) -> Path:
        return self._work / f"{_FOLDER}{step}"

    def _keep(self, steps: set[int | None]) -> None:
        wanted = {self._folder(step) for step in steps if step is not None}
        for folder in set(self._work.glob(f"{_FOLDER}*")) - wanted:
            shutil.rmtree(folder, ignore_errors=True)

    def is_exhausted(self, steps: Sequence[StepMetrics]) -> bool:
        """Whether the last ``settings.patience`` evaluations did not improve on the best one before them."""
        scores = [metrics.score for metrics in steps if metrics.score is not None]
        patience = self._settings.patience
        return 0 < patience < len(scores) and min(scores[:-patience]) <= min(scores[-patience:])

    def load(self, steps: Sequence[StepMetrics]) -> int | None:
        """Load the best adapter into the model; returns its step, or None without an evaluation."""
        best = _best(steps)
        if best is None:
            return None
        wait_for_all()
        load_trainable(self._model, self._folder(best[1]))
        return best[1]


def _best(steps: Sequence[StepMetrics]) -> tuple[float, int] | None:
    """(lowest score, its first step)."""
    return min(((metrics.score, metrics.step) for metrics in steps if metrics.score is not None), default=None)


# The held-out loss, which decides early stopping and the best adapter.


def held_out_loss(rows: Sequence[Encoded], settings: Train) -> Evaluate:
    """Make a function that returns a model's mean negative log-likelihood per supervised token of ``rows``, in nats.

    It uses the precision of the training and batches of ``settings.batch_size`` rows of similar length.

    Raises:
        TrainError: there are no rows, or one has no supervised token.
    """
    check_rows(rows)
    columns = columns_of(rows)
    ordered = columns.take(numpy.argsort(columns.lengths, kind="stable"))
    starts = range(0, len(ordered), settings.batch_size)
    batches = [pad_rows(list(ordered[start : start + settings.batch_size])) for start in starts]
    num_supervised = torch.tensor(sum(len(batch["targets"]) for batch in batches))
    device = resolve_device(settings.device)
    dtype = DTYPES[resolve_precision(settings.precision, device)]

    @torch.no_grad()
    def evaluate(model: PreTrainedModel) -> float:
        loss, place = loss_of(model, settings.objective), next(model.parameters()).device
        with torch.autocast(device, dtype=dtype, enabled=needs_autocast(model, dtype)):
            parts = [loss(_on(batch, place), num_supervised=num_supervised.to(place)) for batch in batches]
        return float(torch.stack(parts).sum())

    return evaluate


def _on(batch: MicroBatch, place: torch.device) -> MicroBatch:
    return {name: tensor.to(place) for name, tensor in batch.items()}  # type: ignore[return-value,attr-defined]
