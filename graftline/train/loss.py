"""Loss on supervised positions only; logits exist for one small chunk of positions at a time.

Logits are often the largest tensor of a training: about 10 bytes x positions x vocabulary with the usual loss. Here the
decoder's body runs as usual, hidden states are gathered at the supervised positions, and the head runs on chunks of
them. Forward also computes each chunk's gradient, so that its logits are freed before the next chunk; backward only
scales the stored gradients of the gathered hidden states (N, H) and of the head's own trainable parameters (an adapter
on the head), as in Liger Kernel's fused linear cross-entropy (Hsu et al. 2024, 2410.10989). What a model does to its
logits after the head (Granite divides them, Gemma 2 caps them) is done to each chunk.

Each chunk reads the whole head (1 GB at V = 128k in bf16), so a GPU uses large chunks. There the logits are overwritten
with their gradient a few positions at a time, so that fp32 copies stay small.

Shapes: B rows, T positions, H hidden size, V vocabulary, N supervised positions, C positions per chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from graftline.adapters.class_head import class_head_of
from graftline.errors import TrainError
from graftline.train.batches import MicroBatch, hidden_states
from graftline.weights.sharded import free_gathered

_FP32_BYTES = 64 << 20
"""Size of one fp32 copy of the logits; up to three are live at once (logits, log-softmax, one-hot targets)."""
_CUDA_POSITIONS = 2048
"""Positions per chunk on a GPU: at V = 128k, 525 MB of logits in bf16. With 131, which fit 64 MiB, a step of 8,192
tokens read the head 62 times and spent 40 of its 1,195 ms on that (H200).
"""
_PROBE_TOKENS = 8


@dataclass(frozen=True)
class AfterHead:
    """How a model transforms its head's output h: ``cap · tanh(h / divisor / cap)``; without a cap ``h / divisor``."""

    divisor: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "AfterHead":
        """As the classes of Granite (``logits_scaling``) and of Gemma 2 and 3 (``final_logit_softcapping``) do it."""
        text = config.get_text_config()
        divisor, cap = getattr(text, "logits_scaling", None), getattr(text, "final_logit_softcapping", None)
        return cls(1.0 if divisor is None else float(divisor), None if cap is None else float(cap))

    def logits(self, h: Tensor) -> Tensor:
        """The model's logits; ``h`` itself where nothing is done, otherwise a new tensor."""
        logits = h if self.divisor == 1 else h / self.divisor
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def backward_(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Turn the gradient of the logits into that of h, in place."""
        if self.cap is not None:
            grad.addcmul_(grad * logits, logits, value=-1 / self.cap**2)
        return grad if self.divisor == 1 else grad.div_(self.divisor)


PLAIN = AfterHead()


class SupervisedLoss(nn.Module):
    """A causal language model whose forward returns a micro-batch's loss, so that DDP or FSDP can wrap all of it.

    The head is called as a module (never its raw weight), so adapters and quantized layers apply.
    """

    def __init__(self, model: PreTrainedModel, *, chunk_tokens: int | None = None) -> None:
        """``model``: a causal model whose logits are `AfterHead` of ``head(body(input_ids))``; see `check_head`.

        ``chunk_tokens`` as in `head_loss`.
        """
        super().__init__()
        self.model, self._chunk_tokens = model, chunk_tokens
        self.after = AfterHead.of(model.config)

    def count(self, micro_batch: MicroBatch) -> int:
        """What the step's loss is averaged over in a micro-batch: its supervised tokens."""
        return len(micro_batch["targets"])

    def forward(self, micro_batch: MicroBatch, *, num_supervised: Tensor) -> Tensor:
        """Summed negative log-likelihood of the micro-batch divided by ``num_supervised``, a scalar in nats.

        ``num_supervised`` counts the supervised tokens of the whole optimizer step, so the sum over its micro-batches
        is the mean per token, however the step is split.
        """
        hidden_NH = hidden_states(self.model, micro_batch).flatten(0, 1)[micro_batch["predict_at"]]
        targets_N = micro_batch["targets"]
        loss = head_loss(self.head, hidden_NH, targets_N, after=self.after, chunk_tokens=self._chunk_tokens)
        return loss / num_supervised

    @property
    def head(self) -> nn.Module:
        """The layer that maps hidden states to logits."""
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Module):
            raise TrainError(f"{type(self.model).__name__} has no output layer; a causal language model is expected")
        return head


class ClassLoss(SupervisedLoss):
    """`SupervisedLoss` of rows whose one target is a class (`graftline.data.class_rows`), by the head for classes."""

    def __init__(self, model: PreTrainedModel, *, chunk_tokens: int | None = None) -> None:
        super().__init__(model, chunk_tokens=chunk_tokens)
        self.after = PLAIN

    @property
    def head(self) -> nn.Module:
        """The layer that maps hidden states to classes."""
        head = class_head_of(self.model)
        if head is None:
            raise TrainError(f"this {type(self.model).__name__} has no head for classes; add one before its adapter")
        return head


def head_loss(
    head: nn.Module,
    hidden_NH: Tensor,
    targets_N: Tensor,
    *,
    after: AfterHead = PLAIN,
    chunk_tokens: int | None = None,
    weights_N: Tensor | None = None,
) -> Tensor:
    """Sum over N of the cross-entropy of the logits ``after(head(hidden))`` against the targets, in nats, in fp32.

    ``chunk_tokens``: positions per chunk; by default `chunk_of` for the hidden states' device. ``weights_N``: a factor
    on each position's cross-entropy; 1 when left out.
    """
    trainable = [parameter for parameter in head.parameters() if parameter.requires_grad]
    chunk = chunk_tokens or chunk_of(head, hidden_NH.device.type)
    if not torch.is_grad_enabled():
        if weights_N is not None:
            each_N = log_likelihoods(head, hidden_NH, targets_N, after=after, chunk_tokens=chunk)
            return -torch.dot(each_N, weights_N)
        parts = [_chunk_loss(head, h, t, after) for h, t in _chunks(hidden_NH, targets_N, chunk)]
        return torch.stack(parts).sum()
    return _HeadLoss.apply((head, after), targets_N, weights_N, chunk, hidden_NH, *trainable)


@torch.no_grad()
def log_likelihoods(
    head: nn.Module,
    hidden_NH: Tensor,
    targets_N: Tensor,
    *,
    after: AfterHead = PLAIN,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Log-likelihood of each target (N,), in nats, in fp32, without gradient; chunks as in `head_loss`."""
    chunk = chunk_tokens or chunk_of(head, hidden_NH.device.type)
    found = [
        -F.cross_entropy(after.logits(head(hidden)).float(), targets, reduction="none")
        for hidden, targets in _chunks(hidden_NH, targets_N, chunk)
    ]
    return torch.cat(found) if found else torch.zeros(0, device=hidden_NH.device)


def chunk_of(head: nn.Module, device: str) -> int:
    """Positions per chunk: on a CPU as many as fit one fp32 copy of the logits in 64 MiB, on a GPU at least 2,048."""
    small = _positions(int(head.out_features))  # type: ignore[arg-type]
    return max(small, _CUDA_POSITIONS) if device == "cuda" else small


def _positions(vocabulary: int) -> int:
    return max(1, _FP32_BYTES // (4 * vocabulary))


def _chunks(hidden_NH: Tensor, targets_N: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(targets_N), chunk):
        yield hidden_NH[start : start + chunk], targets_N[start : start + chunk]


def _chunk_loss(head: nn.Module, hidden_CH: Tensor, targets_C: Tensor, after: AfterHead) -> Tensor:
    return F.cross_entropy(after.logits(head(hidden_CH)).float(), targets_C, reduction="sum")


@torch.no_grad()
def _become_gradient(heads_CV: Tensor, targets_C: Tensor, after: AfterHead, weights_C: Tensor | None = None) -> Tensor:
    """Overwrite the head's output with the gradient of the (weighted) cross-entropy; returns its sum in nats.

    softmax − one-hot, from the kernels that autograd of `F.cross_entropy` calls, so the bytes are the same.
    """
    total, size = torch.zeros((), device=heads_CV.device), _positions(heads_CV.shape[1])
    each: list[Tensor] = []
    for h, targets in zip(heads_CV.split(size), targets_C.split(size), strict=True):
        logits = after.logits(h)
        log_p = F.log_softmax(logits.float(), dim=-1)
        total += F.nll_loss(log_p, targets, reduction="sum")
        if weights_C is not None:
            each.append(F.nll_loss(log_p, targets, reduction="none"))
        picked = torch.zeros_like(log_p).scatter_(1, targets[:, None], -1.0)
        if logits.dtype == torch.float32 and after.cap is None:
            torch.ops.aten._log_softmax_backward_data.out(picked, log_p, 1, torch.float32, out=h)
            after.backward_(h, logits)
        else:
            grad = torch.ops.aten._log_softmax_backward_data(picked, log_p, 1, torch.float32)
            h.copy_(after.backward_(grad, logits))
    if weights_C is None:
        return total
    heads_CV.mul_(weights_C.to(heads_CV.dtype).unsqueeze(1))
    return torch.dot(torch.cat(each), weights_C)


class _HeadLoss(torch.autograd.Function):
    """`head_loss` with gradients computed chunk by chunk in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        output: tuple[nn.Module, AfterHead],
        targets_N: Tensor,
        weights_N: Tensor | None,
        chunk: int,
        hidden_NH: Tensor,
        *trainable: Tensor,
    ) -> Tensor:
        head, after = output
        total = torch.zeros((), dtype=torch.float32, device=hidden_NH.device)
        hidden_grad_NH = torch.empty_like(hidden_NH)
        head_grads = [torch.zeros_like(parameter) for parameter in trainable]
        done = 0
        for hidden_CH, targets_C in _chunks(hidden_NH, targets_N, chunk):
            with torch.enable_grad():
                leaf_CH = hidden_CH.detach().requires_grad_()
                logits_CV = head(leaf_CH)
                grad_CV = logits_CV.detach()
                weights_C = None if weights_N is None else weights_N[done : done + len(targets_C)]
                total += _become_gradient(grad_CV, targets_C, after, weights_C)
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
        return (None, None, None, None, *(grad * grad_output.to(grad.dtype) for grad in ctx.saved_tensors))


@torch.no_grad()
def check_head(model: PreTrainedModel, token_ids: list[int]) -> None:
    """Check on a few tokens that the model's logits are `AfterHead` of its head of its body's hidden states.

    Where a class does something else to its logits, this loss would be silently wrong.

    Raises:
        TrainError: they are not.
    """
    loss = SupervisedLoss(model)
    was_training = model.training
    model.eval()
    ids_BT = torch.tensor([token_ids[:_PROBE_TOKENS]], device=next(model.parameters()).device)
    expected = model(input_ids=ids_BT, use_cache=False).logits
    hidden_BTH = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
    actual = loss.after.logits(loss.head(hidden_BTH))
    free_gathered(model)
    model.train(was_training)
    if not torch.allclose(actual.float(), expected.float(), rtol=1e-3, atol=1e-3, equal_nan=True):
        raise TrainError(
            f"{type(model).__name__} changes its logits after the output layer in a way that the chunked loss does not "
            "know; expected are the output layer's logits, divided (logits_scaling) or capped (final_logit_softcapping)"
        )
