"""The loss on rows that are not trained on: what early stopping and the choice of the best adapter look at."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from graftline.data.template import Encoded
from graftline.settings.model import Train
from graftline.train.batches import MicroBatch, check_rows, pad_rows
from graftline.train.best import Evaluate
from graftline.train.devices import DTYPES, resolve_device, resolve_precision
from graftline.train.loss import SupervisedLoss


def held_out_loss(rows: Sequence[Encoded], settings: Train) -> Evaluate:
    """A function that gives a model's mean negative log-likelihood per supervised token of ``rows``, in nats.

    It computes as the training does: in its precision, ``settings.batch_size`` rows at a time, rows of similar length
    together.

    Raises:
        TrainError: there is no row, or one without a supervised token.
    """
    check_rows(rows)
    ordered = sorted(rows, key=lambda row: len(row.input_ids))
    starts = range(0, len(ordered), settings.batch_size)
    batches = [pad_rows(ordered[start : start + settings.batch_size]) for start in starts]
    num_supervised = torch.tensor(sum(len(batch["targets"]) for batch in batches))
    device = resolve_device(settings.device)
    dtype = DTYPES[resolve_precision(settings.precision, device)]

    @torch.no_grad()
    def evaluate(model: PreTrainedModel) -> float:
        loss, place = SupervisedLoss(model), next(model.parameters()).device
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            parts = [loss(_on(batch, place), num_supervised=num_supervised.to(place)) for batch in batches]
        return float(torch.stack(parts).sum())

    return evaluate


def _on(batch: MicroBatch, place: torch.device) -> MicroBatch:
    return {name: tensor.to(place) for name, tensor in batch.items()}  # type: ignore[return-value,attr-defined]
