"""A linear layer whose frozen weight stays quantized in memory.

x: (..., I) activations, W: (O, I) dequantized weight, y = x Wᵀ + bias (QLoRA §3, arXiv 2305.14314).

The weight is dequantized in the forward pass and again in the backward pass; neither keeps a dense copy, so a training
step holds one dense layer at a time. Both dequantize to the *activation's* dtype: the matrix product needs that dtype
anyway, rounding table[code] · absmax once loses least, and forward and backward see the same W (bitsandbytes' backward
uses the source's dtype, so its gradient is not that of its forward).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from graftline.weights.quant import cuda
from graftline.weights.quant.blockwise import Nested, Quantized, dequantize


class QuantLinear(nn.Module):
    """Linear layer over a `Quantized` weight of shape (out_features, in_features); nothing in it is trained.

    Constants are held as the bits of their floats: casting a model to 16 bits must not round them.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Quantized, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.scheme = weight.scheme
        self.register_buffer("packed", weight.packed)
        if isinstance(weight.absmax, Nested):
            self.register_buffer("absmax", weight.absmax.codes)
            self.register_buffer("nested_absmax", _bits(weight.absmax.absmax))
            self.register_buffer("nested_offset", _bits(weight.absmax.offset))
        else:
            self.register_buffer("absmax", _bits(weight.absmax))
            self.register_buffer("nested_absmax", None)
            self.register_buffer("nested_offset", None)
        self.register_buffer("bias", bias)

    @property
    def quantized(self) -> Quantized:
        """The weight as it is held, sharing memory."""
        shape = (self.out_features, self.in_features)
        if self.nested_absmax is None or self.nested_offset is None:
            return Quantized(self.packed, _floats(self.absmax), shape, self.scheme)
        nested = Nested(self.absmax, _floats(self.nested_absmax), _floats(self.nested_offset))
        return Quantized(self.packed, nested, shape, self.scheme)

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (out_features, in_features), dequantized into new memory."""
        weight = self.quantized
        return cuda.dequantize(weight, dtype) if cuda.has_kernel(weight) else dequantize(weight, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """X (..., in_features) -> (..., out_features), in x's dtype or autocast's."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if not (torch.is_grad_enabled() and x.requires_grad) and cuda.has_kernel(self.quantized):
            return cuda.linear(x, self.quantized, self.bias)
        y: Tensor = _DequantizedLinear.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Sizes and scheme, as nn.Linear prints itself."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {self.scheme}"


class _DequantizedLinear(torch.autograd.Function):
    """y = x Wᵀ with ∂L/∂x = ∂L/∂y W. Saves the layer (quantized), never W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantLinear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.dense_weight(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        return grad_y @ ctx.layer.dense_weight(grad_y.dtype), None


def _bits(values: Tensor) -> Tensor:
    return values.view(torch.int32)


def _floats(bits: Tensor) -> Tensor:
    return bits.view(torch.float32)
