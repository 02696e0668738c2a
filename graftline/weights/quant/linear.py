"""Linear layers whose frozen weight stays quantized in memory, and models loaded with them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from graftline.errors import CheckpointError
from graftline.weights.cast import cast
from graftline.weights.model_folder import ModelReader, find_module, place_of, refuse_missing, skeleton_of
from graftline.weights.quant.blockwise import NestedConstants, QuantizedWeight, dequantize
from graftline.weights.quant.scheme import NESTED_BLOCK_SIZE, code_table, dynamic_map
from graftline.weights.quant.tensors import from_tensors, part_names, quantized_weights

# bitsandbytes' CUDA kernels for NF4 weights, used where they exist.
#
# They take the same bytes as `blockwise`: codes, constants and tables are bit-equal.

# bitsandbytes loads CUDA libraries on import, which takes seconds: it is imported where a CUDA weight is used.


def has_cuda_kernel(weight: QuantizedWeight) -> bool:
    """Whether the weight lies on a CUDA device, is NF4, and bitsandbytes was built for CUDA."""
    if weight.packed.device.type != "cuda" or weight.scheme.code != "nf4":
        return False
    import bitsandbytes.cextension as extension

    return bool(extension.lib.compiled_with_cuda)


def cuda_dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """As `blockwise.dequantize`, by one kernel."""
    import bitsandbytes.functional as kernels

    dense: Tensor = kernels.dequantize_4bit(weight.packed.view(-1, 1), _state(weight, dtype))
    return dense


def cuda_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """X Wᵀ + bias without a dense W: the fused kernel of decoding. Not for training: it saves nothing for backward."""
    from bitsandbytes.autograd._functions import matmul_4bit

    bias = None if bias is None else bias.to(x.dtype)
    y: Tensor = matmul_4bit(x, weight.packed.view(1, -1), _state(weight, x.dtype), bias=bias)
    return y


def _state(weight: QuantizedWeight, dtype: torch.dtype) -> Any:
    """The constants as bitsandbytes wants them."""
    from bitsandbytes.functional import QuantState

    device = weight.packed.device
    common = {
        "shape": torch.Size(weight.shape),
        "code": code_table("nf4").to(device),
        "quant_type": "nf4",
        "dtype": dtype,
    }
    if not isinstance(weight.absmax, NestedConstants):
        return QuantState(absmax=weight.absmax, blocksize=weight.scheme.block_size, **common)
    outer = QuantState(
        absmax=weight.absmax.absmax, blocksize=NESTED_BLOCK_SIZE, code=dynamic_map().to(device), dtype=torch.float32
    )
    offset = weight.absmax.offset
    return QuantState(
        absmax=weight.absmax.codes, blocksize=weight.scheme.block_size, offset=offset, state2=outer, **common
    )


# A linear layer whose frozen weight stays quantized in memory.
#
# x: (..., I) activations, W: (O, I) dequantized weight, y = x Wᵀ + bias (QLoRA §3, arXiv 2305.14314).
#
# The weight is dequantized in the forward pass and again in the backward pass; neither keeps a dense copy, so a
# training step holds one dense layer at a time. Both dequantize to the *activation's* dtype: the matrix product needs
# that dtype anyway, rounding table[code] · absmax once loses least, and forward and backward see the same W
# (bitsandbytes' backward uses the source's dtype, so its gradient is not that of its forward).


class QuantLinear(nn.Module):
    """Linear layer over a `QuantizedWeight` weight of shape (out_features, in_features); nothing in it is trained.

    Constants are held as the bits of their floats: casting a model to 16 bits must not round them.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.scheme = weight.scheme
        self.register_buffer("packed", weight.packed)
        if isinstance(weight.absmax, NestedConstants):
            self.register_buffer("absmax", weight.absmax.codes)
            self.register_buffer("nested_absmax", _bits(weight.absmax.absmax))
            self.register_buffer("nested_offset", _bits(weight.absmax.offset))
        else:
            self.register_buffer("absmax", _bits(weight.absmax))
            self.register_buffer("nested_absmax", None)
            self.register_buffer("nested_offset", None)
        self.register_buffer("bias", bias)

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight as it is held, sharing memory."""
        shape = (self.out_features, self.in_features)
        if self.nested_absmax is None or self.nested_offset is None:
            return QuantizedWeight(self.packed, _floats(self.absmax), shape, self.scheme)
        nested = NestedConstants(self.absmax, _floats(self.nested_absmax), _floats(self.nested_offset))
        return QuantizedWeight(self.packed, nested, shape, self.scheme)

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (out_features, in_features), dequantized into new memory."""
        weight = self.quantized
        return cuda_dequantize(weight, dtype) if has_cuda_kernel(weight) else dequantize(weight, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """X (..., in_features) -> (..., out_features), in x's dtype or autocast's."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if not (torch.is_grad_enabled() and x.requires_grad) and has_cuda_kernel(self.quantized):
            return cuda_linear(x, self.quantized, self.bias)
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


# Load a model folder: dense, or quantized with `QuantLinear` in place of the linear layers.
#
# The model is made without memory for its parameters; tensors are then read one by one and put in place, so that
# loading takes one copy of the weights and one tensor.


def load_model(folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model from a folder, in evaluation mode, floating-point parameters in ``dtype``.

    Quantized weights stay as they are stored; their layers are `QuantLinear`. Tied weights share memory.

    Raises:
        CheckpointError: unknown architecture, damaged weights, tensors missing, left over or of a wrong shape.
        NumberTypeError: a weight does not fit ``dtype``.
        QuantizeError: quantized in a way that is not supported.
    """
    reader = ModelReader(folder)
    model = skeleton_of(reader, dtype)
    left = set(reader.names())
    for name, state_key in quantized_weights(reader.names()).items():
        left -= {name, state_key, *part_names(name, reader.names())}
        bias_name = name.removesuffix("weight") + "bias"
        bias = cast(reader.read(bias_name), dtype, bias_name) if bias_name in left else None
        left.discard(bias_name)
        _put_quantized(
            model, name.removesuffix(".weight"), QuantLinear(from_tensors(name, state_key, reader.read), bias)
        )
    for name in sorted(left - set(model.all_tied_weights_keys)):
        owner, last = place_of(model, name, reader.info(name).shape)
        owner._parameters[last] = nn.Parameter(cast(reader.read(name), dtype, name))
    model.tie_weights()
    _check_complete(model, folder)
    model.to(torch.device(device))  # type: ignore[arg-type] # transformers wraps nn.Module.to without its types
    return model.eval()


def _put_quantized(model: nn.Module, path: str, layer: QuantLinear) -> None:
    """Put a quantized layer in the place of a linear one."""
    old = find_module(model, path, path)
    weight = getattr(old, "weight", None)
    if not isinstance(old, nn.Linear | Conv1D) or weight is None:
        raise CheckpointError(f"{path} is quantized, but is no linear layer of {type(model).__name__}")
    shape = tuple(weight.shape) if isinstance(old, nn.Linear) else tuple(weight.shape)[::-1]
    if (layer.out_features, layer.in_features) != shape:
        raise CheckpointError(f"{path} is quantized with shape {layer.quantized.shape}, config.json asks for {shape}")
    if (layer.bias is None) != (old.bias is None):
        raise CheckpointError(f"{path} has a bias in only one of its weights and config.json")
    parent, _, last = path.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def _check_complete(model: PreTrainedModel, folder: Path) -> None:
    refuse_missing(sorted(name for name, parameter in model.named_parameters() if parameter.is_meta), model, folder)
