"""Loss on supervised positions only; logits exist for one small chunk of positions at a time.

Logits are often the largest tensor of a training: about 10 bytes x positions x vocabulary with the usual loss. Here the
decoder's body runs as usual, hidden states are gathered at the supervised positions, and the head runs on chunks of
them. Forward also computes each chunk's gradient, so that its logits are freed before the next chunk; backward only
scales the stored gradients of the gathered hidden states (N, H) and of the head's own trainable parameters (an adapter
on the head), as in Liger Kernel's fused linear cross-entropy (Hsu et al. 2024, 2410.10989).

Each chunk reads the whole head (1 GB at V = 128k in bf16), so a GPU uses large chunks. There the logits are overwritten
with their gradient a few positions at a time, so that fp32 copies stay small.

Shapes: B rows, T positions, H hidden size, V vocabulary, N supervised positions, C positions per chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from graftline.errors import TrainError
from graftline.train.batches import MicroBatch, hidden_states

_FP32_BYTES = 64 << 20
"""Size of one fp32 copy of the logits; up to three are live at once (logits, log-softmax, one-hot targets)."""
_CUDA_POSITIONS = 2048
"""Positions per chunk on a GPU: at V = 128k, 525 MB of logits in bf16. With 131, which fit 64 MiB, a step of 8,192
tokens read the head 62 times and spent 40 of its 1,195 ms on that (H200).
"""
_PROBE_TOKENS = 8


class SupervisedLoss(nn.Module):
    """A causal language model whose forward returns a micro-batch's loss, so that DDP or FSDP can wrap all of it.

    The head is called as a module (never its raw weight), so adapters and quantized layers apply.
    """

    def __init__(self, model: PreTrainedModel, *, chunk_tokens: int | None = None) -> None:
        """``model``: any causal model whose logits are ``head(body(input_ids))``; checked by `check_head`.

        ``chunk_tokens`` as in `head_loss`.
        """
        super().__init__()
        self.model, self._chunk_tokens = model, chunk_tokens

    def forward(self, micro_batch: MicroBatch, *, num_supervised: Tensor) -> Tensor:
        """Summed negative log-likelihood of the micro-batch divided by ``num_supervised``, a scalar in nats.

        ``num_supervised`` counts the supervised tokens of the whole optimizer step, so the sum over its micro-batches
        is the mean per token, however the step is split.
        """
        hidden_NH = hidden_states(self.model, micro_batch).flatten(0, 1)[micro_batch["predict_at"]]
        loss = head_loss(self.head, hidden_NH, micro_batch["targets"], chunk_tokens=self._chunk_tokens)
        return loss / num_supervised

    @property
    def head(self) -> nn.Module:
        """The layer that maps hidden states to logits."""
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Module):
            raise TrainError(f"{type(self.model).__name__} has no output layer; a causal language model is expected")
        return head


def head_loss(head: nn.Module, hidden_NH: Tensor, targets_N: Tensor, *, chunk_tokens: int | None = None) -> Tensor:
    """Sum over N of the cross-entropy of ``head(hidden)`` against the targets, in nats, in fp32.

    ``chunk_tokens``: positions per chunk; by default `chunk_of` for the hidden states' device.
    """
    trainable = [parameter for parameter in head.parameters() if parameter.requires_grad]
    chunk = chunk_tokens or chunk_of(head, hidden_NH.device.type)
    if not torch.is_grad_enabled():
        return torch.stack([_chunk_loss(head, h, t) for h, t in _chunks(hidden_NH, targets_N, chunk)]).sum()
    return _HeadLoss.apply(head, targets_N, chunk, hidden_NH, *trainable)


def chunk_of(head: nn.Module, device: str) -> int:
    """Positions per chunk: on a CPU as many as fit one fp32 copy of the logits in 64 MiB, on a GPU at least 2,048."""
    small = _positions(int(head.out_features))  # type: ignore[arg-type]
    return max(small, _CUDA_POSITIONS) if device == "cuda" else small


def _positions(vocabulary: int) -> int:
    return max(1, _FP32_BYTES // (4 * vocabulary))


def _chunks(hidden_NH: Tensor, targets_N: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(targets_N), chunk):
        yield hidden_NH[start : start + chunk], targets_N[start : start + chunk]


def _chunk_loss(head: nn.Module, hidden_CH: Tensor, targets_C: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden_CH).float(), targets_C, reduction="sum")


@torch.no_grad()
def _become_gradient(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """Overwrite the logits with the gradient of the cross-entropy; returns its sum in nats.

    softmax − one-hot, from the kernels that autograd of `F.cross_entropy` calls, so the bytes are the same.
    """
    total, size = torch.zeros((), device=logits_CV.device), _positions(logits_CV.shape[1])
    for logits, targets in zip(logits_CV.split(size), targets_C.split(size), strict=True):
        log_p = F.log_softmax(logits.float(), dim=-1)
        total += F.nll_loss(log_p, targets, reduction="sum")
        picked = torch.zeros_like(log_p).scatter_(1, targets[:, None], -1.0)
        if logits.dtype == torch.float32:
            torch.ops.aten._log_softmax_backward_data.out(picked, log_p, 1, torch.float32, out=logits)
        else:
            logits.copy_(torch.ops.aten._log_softmax_backward_data(picked, log_p, 1, torch.float32))
    return total


class _HeadLoss(torch.autograd.Function):
    """`head_loss` with gradients computed chunk by chunk in forward."""

    @staticmethod
    def forward(
        ctx: Any, head: nn.Module, targets_N: Tensor, chunk: int, hidden_NH: Tensor, *trainable: Tensor
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden_NH.device)
        hidden_grad_NH = torch.empty_like(hidden_NH)
        head_grads = [torch.zeros_like(parameter) for parameter in trainable]
        done = 0
        for hidden_CH, targets_C in _chunks(hidden_NH, targets_N, chunk):
            with torch.enable_grad():
                leaf_CH = hidden_CH.detach().requires_grad_()
                logits_CV = head(leaf_CH)
                grad_CV = logits_CV.detach()
                total += _become_gradient(grad_CV, targets_C)
                grad_CH, *grads = torch.autograd.grad(logits_CV, (leaf_CH, *trainable), grad_CV)
            hidden_grad_NH[done : done + len(targets_C)] = grad_CH
            done += len(targets_C)
            for sum_so_far, grad in zip(head_grads, grads, strict=True):
                sum_so_far += grad
        ctx.save_for_backward(hidden_grad_NH, *head_grads)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        return (None, None, None, *(grad * grad_output.to(grad.dtype) for grad in ctx.saved_tensors))


@torch.no_grad()
def check_head(model: PreTrainedModel, token_ids: list[int]) -> None:
    """Check on a few tokens that the model's logits are its head applied to its body's hidden states.

    Some architectures scale or cap their logits after the head; this loss would then be silently wrong.

    Raises:
        TrainError: they are not.
    """
    loss = SupervisedLoss(model)
    was_training = model.training
    model.eval()
    ids_BT = torch.tensor([token_ids[:_PROBE_TOKENS]], device=next(model.parameters()).device)
    expected = model(input_ids=ids_BT, use_cache=False).logits
    actual = loss.head(model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state)
    model.train(was_training)
    if not torch.allclose(actual.float(), expected.float(), rtol=1e-3, atol=1e-3, equal_nan=True):
        raise TrainError(
            f"{type(model).__name__} changes its logits after the output layer (scaling or soft-capping), which the "
            "chunked loss does not know; an architecture whose logits are its output layer's is expected"
        )
