"""Losses on preference pairs: DPO and KTO against the base with the adapter switched off, ORPO without a reference.

With S = log π(y | x), the sum over an answer's tokens, of the chosen answer w and the rejected one l:

    DPO   −log σ(β [(S_w − S_w_ref) − (S_l − S_l_ref)])                      (Rafailov et al. 2023, arXiv 2305.18290)
    ORPO  −s_w − β log σ(log odds(s_w) − log odds(s_l)),  s = S / tokens,
          odds(s) = eˢ / (1 − eˢ)                                            (Hong et al. 2024, arXiv 2403.07691)
    KTO   ½ [1 − σ(β (S_w − S_w_ref − z))] + ½ [1 − σ(β (z − S_l + S_l_ref))]
                                                                       (Ethayarajh et al. 2024, arXiv 2402.01306)

KTO's z, a constant, is how far the model has moved from its base: the mean of S − S_ref over the micro-batch's prompts,
each with an answer of another pair, or 0 if that is less. Both answers have the weight 1, as with pairs in the paper.

Log-likelihoods are computed twice, in chunks (`graftline.train.loss`): once without gradients, for the loss and its
derivative with respect to each S, then as a weighted sum of cross-entropies that has the loss's gradient. The logits of
all positions never exist at once.

Rows come in pairs: a chosen answer directly followed by its rejected one.

Shapes: P pairs, N supervised positions, H hidden size.
"""

from collections.abc import Sequence

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from graftline.adapters.base import adapters_off
from graftline.data.columns import EncodedColumns, columns_of, joined
from graftline.data.template import Encoded
from graftline.errors import TrainError
from graftline.settings.model import Train
from graftline.settings.objective import Objective
from graftline.train.batches import MicroBatch, hidden_states
from graftline.train.loss import ClassLoss, SupervisedLoss, head_loss, log_likelihoods

_LEAST_MISS = 1e-7
"""Smallest 1 − p with which an odds ratio is computed; a likelihood of 1 has infinite odds."""

_LEAST_SCALE = 1e-30


class PreferenceLoss(SupervisedLoss):
    """`SupervisedLoss` with an objective on pairs."""

    def __init__(self, model: PreTrainedModel, objective: Objective, *, chunk_tokens: int | None = None) -> None:
        super().__init__(model, chunk_tokens=chunk_tokens)
        self._objective = objective

    def count(self, micro_batch: MicroBatch) -> int:
        """Pairs of a micro-batch."""
        return len(micro_batch["num_targets"]) // 2

    def forward(self, micro_batch: MicroBatch, *, num_supervised: Tensor) -> Tensor:
        """Summed loss of the micro-batch's pairs divided by ``num_supervised``, the pairs of the optimizer step."""
        targets, sizes = micro_batch["targets"], micro_batch["num_targets"]
        hidden_NH = self._hidden(micro_batch)
        with torch.no_grad():
            found = self._sums(hidden_NH, targets, sizes)
            reference = self._reference(micro_batch) if self._objective.has_reference else torch.zeros_like(found)
            moved = self._moved(mismatched(micro_batch)) if self._objective.kind == "kto" else None
        with torch.enable_grad():
            leaf = found.detach().requires_grad_()
            each = (leaf.view(-1, 2), reference.view(-1, 2), sizes.view(-1, 2))
            losses = pair_losses(*each, self._objective, moved=moved)
            loss = losses.sum() / num_supervised
            (by_sum,) = torch.autograd.grad(loss, leaf)
        if not torch.is_grad_enabled():
            return loss.detach()
        # Weights near 1: smaller ones would round the logits' gradients, which may be in 16 bits, to zero.
        scale = by_sum.abs().amax().clamp(min=_LEAST_SCALE)
        weights_N = (-by_sum / scale).repeat_interleave(sizes)
        weighted = head_loss(
            self.head, hidden_NH, targets, after=self.after, chunk_tokens=self._chunk_tokens, weights_N=weights_N
        )
        return (weighted - weighted.detach()) * scale + loss.detach()

    def _hidden(self, micro_batch: MicroBatch) -> Tensor:
        return hidden_states(self.model, micro_batch).flatten(0, 1)[micro_batch["predict_at"]]

    def _sums(self, hidden_NH: Tensor, targets_N: Tensor, sizes: Tensor) -> Tensor:
        """Log-likelihood of each row's answer, in nats."""
        each_N = log_likelihoods(self.head, hidden_NH, targets_N, after=self.after, chunk_tokens=self._chunk_tokens)
        rows = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
        return torch.zeros(len(sizes), device=each_N.device).index_add_(0, rows, each_N)

    def _reference(self, micro_batch: MicroBatch) -> Tensor:
        was_training = self.model.training
        self.model.eval()
        with adapters_off(self.model):
            sums = self._sums(self._hidden(micro_batch), micro_batch["targets"], micro_batch["num_targets"])
        self.model.train(was_training)
        return sums

    def _moved(self, micro_batch: MicroBatch) -> Tensor:
        """KTO's z from answers that are not their prompts'."""
        sums = self._sums(self._hidden(micro_batch), micro_batch["targets"], micro_batch["num_targets"])
        return (sums - self._reference(micro_batch)).mean().clamp(min=0)


def pair_losses(
    sums_P2: Tensor, reference_P2: Tensor, sizes_P2: Tensor, objective: Objective, *, moved: Tensor | None = None
) -> Tensor:
    """The loss of each pair (P,) from the log-likelihoods of its chosen and its rejected answer; ``moved``: KTO's z."""
    if objective.kind == "kto":
        from_base_P2 = sums_P2 - reference_P2 - (0.0 if moved is None else moved)
        return (1 - torch.sigmoid(objective.beta * from_base_P2 * from_base_P2.new_tensor([1.0, -1.0]))).mean(dim=1)
    if objective.kind == "dpo":
        chosen, rejected = (sums_P2 - reference_P2).unbind(1)
        return -F.logsigmoid(objective.beta * (chosen - rejected))
    means_P2 = sums_P2 / sizes_P2
    log_odds_P2 = means_P2 - torch.log(-torch.expm1(means_P2.clamp(max=-_LEAST_MISS)))
    return -means_P2[:, 0] - objective.beta * F.logsigmoid(log_odds_P2[:, 0] - log_odds_P2[:, 1])


def mismatched(micro_batch: MicroBatch) -> MicroBatch:
    """Each prompt of a micro-batch of pairs with the answer, of the same kind, of the pair before."""
    ids_BT, sizes = micro_batch["input_ids"], micro_batch["num_targets"].tolist()
    answers = micro_batch["targets"].split(sizes)
    # Where each prompt's last token stands in its row.
    lasts = [int(at[0]) - row * ids_BT.shape[1] for row, at in enumerate(micro_batch["predict_at"].split(sizes))]
    rows = [torch.cat([ids_BT[row, : last + 1], answers[row - 2]]) for row, last in enumerate(lasts)]
    made_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    starts = [row * made_BT.shape[1] + last for row, last in enumerate(lasts)]
    predict_at = [torch.arange(start, start + sizes[row - 2]) for row, start in enumerate(starts)]
    made = MicroBatch(
        input_ids=made_BT,
        predict_at=torch.cat(predict_at).to(ids_BT.device),
        targets=torch.cat([answers[row - 2] for row in range(len(rows))]),
        num_tokens=micro_batch["num_tokens"],
        num_targets=micro_batch["num_targets"].roll(2),
    )
    if "prefix_ids" in micro_batch:
        made["prefix_ids"] = micro_batch["prefix_ids"]
    return made


def interleaved(chosen: Sequence[Encoded], rejected: Sequence[Encoded]) -> EncodedColumns:
    """Pairs as rows: every chosen answer followed by its rejected one.

    Raises:
        TrainError: there are not as many chosen answers as rejected ones.
    """
    if len(chosen) != len(rejected):
        raise TrainError(
            f"{len(chosen)} chosen and {len(rejected)} rejected answers; expected one of each in every pair"
        )
    both = joined([columns_of(chosen), columns_of(rejected)])
    return both.take(numpy.arange(2 * len(chosen)).reshape(2, -1).T.ravel())


def check_pairs(num_rows: int, settings: Train) -> None:
    """Refuse rows that cannot be pairs, chosen and rejected in turn, where the objective is on pairs.

    Raises:
        TrainError: their number is odd, or they would be packed.
    """
    if settings.objective.on_pairs and (num_rows % 2 or settings.packing):
        raise TrainError(
            f"objective {settings.objective.kind} with {num_rows} rows, packing {settings.packing}; expected two rows "
            "a pair, chosen and rejected, and no packing"
        )
    if settings.objective.kind == "kto" and settings.batch_size == 1:
        raise TrainError(
            "objective kto with a batch_size of 1; expected 2 or more: it needs the answers of another pair"
        )


def steps_of_pairs(steps: NDArray[numpy.int64]) -> NDArray[numpy.int64]:
    """Steps of pairs (steps, pairs a step) as steps of rows (steps, 2 × pairs a step)."""
    found: NDArray[numpy.int64] = (2 * steps[:, :, None] + numpy.arange(2)).reshape(len(steps), -1)
    return found


def loss_of(model: PreTrainedModel, objective: Objective) -> SupervisedLoss:
    """The module that computes an objective's loss."""
    if objective.on_pairs:
        return PreferenceLoss(model, objective)
    return ClassLoss(model) if objective.classifies else SupervisedLoss(model)
