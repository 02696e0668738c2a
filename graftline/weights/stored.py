"""Layers that keep a 16-bit weight as it is stored, and convert it where it is used.

In fp32 arithmetic a model then takes two bytes a weight instead of four and gives the same results: every bfloat16 and
every float16 number is also an fp32 number. Only one layer's weight is in fp32 at a time.

Dimensions: O = output features, I = input features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graftline.weights.experts import ExpertStack

_PIECE = 1 << 26
"""Number of weights converted at once: 256 MiB in fp32. Only a head, or a very wide layer, has more."""


class StoredLinear(nn.Linear):
    """A linear layer in its input's number type, whatever its weight's is. Not trained."""

    def forward(self, input: Tensor) -> Tensor:  # nn.Linear's own name
        """X (..., I) -> (..., O) in x's number type."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        if self.weight.dtype == input.dtype or self.weight.numel() <= _PIECE:
            return F.linear(input, self.weight.to(input.dtype), bias)
        rows = max(1, _PIECE // self.in_features)
        parts = [F.linear(input, piece.to(input.dtype)) for piece in self.weight.split(rows)]
        y = torch.cat(parts, dim=-1)
        return y if bias is None else y.add_(bias)


class StoredConv1D(Conv1D):
    """GPT-2's linear layer, whose weight is (I, O), in its input's number type."""

    def forward(self, x: Tensor) -> Tensor:
        """X (..., I) -> (..., O) in x's number type."""
        y = torch.addmm(self.bias.to(x.dtype), x.view(-1, x.shape[-1]), self.weight.to(x.dtype))
        return y.view(*x.shape[:-1], self.nf)


class StoredEmbedding(nn.Embedding):
    """An embedding that returns its rows in the number type ``gives``, whatever its table's is."""

    gives: torch.dtype = torch.float32

    def forward(self, input: Tensor) -> Tensor:  # nn.Embedding's own name
        """Token ids -> rows."""
        return super().forward(input).to(self.gives)


_KEEPING: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: StoredLinear,
    Conv1D: StoredConv1D,
    nn.Embedding: StoredEmbedding,
}
"""Other classes, such as an embedding that scales its rows, compute differently: their weights are converted. Experts
always compute in their input's number type."""


def can_keep(layer: nn.Module) -> bool:
    """Whether a layer's weight can stay in another number type than the arithmetic's."""
    return type(layer) in _KEEPING or isinstance(layer, ExpertStack)


def keep_stored(model: nn.Module, arithmetic: torch.dtype) -> None:
    """Let each layer whose weight has another number type than ``arithmetic`` convert it where it is used."""
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        if type(layer) in _KEEPING and isinstance(weight, Tensor) and weight.dtype != arithmetic:
            layer.__class__ = _KEEPING[type(layer)]
            if isinstance(layer, StoredEmbedding):
                layer.gives = arithmetic


def keeps_stored(layer: nn.Module) -> bool:
    """Whether a layer converts its weight where it is used."""
    return isinstance(layer, StoredLinear | StoredConv1D | StoredEmbedding)


def arithmetic_of(model: nn.Module) -> torch.dtype:
    """The number type that a model computes in, which need not be that of its weights."""
    if any(map(keeps_stored, model.modules())):
        return torch.float32
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
