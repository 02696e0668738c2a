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

# bitsandbytes' CUDA kernels for NF4 weights, used where they exist; they take the same bytes as `blockwise`. Importing
# bitsandbytes loads CUDA libraries and takes seconds, so it is imported only for weights on a CUDA device.


def has_cuda_kernel(weight: QuantizedWeight) -> bool:
    """Whether the weight is NF4 on a CUDA device, and bitsandbytes was built for CUDA."""
    if weight.packed.device.type != "cuda" or weight.scheme.code != "nf4":
        return False
    import bitsandbytes.cextension as extension

    return bool(extension.lib.compiled_with_cuda)


def cuda_dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """As `blockwise.dequantize`, in one kernel."""
    import bitsandbytes.functional as kernels

    dense: Tensor = kernels.dequantize_4bit(weight.packed.view(-1, 1), _state(weight, dtype))
    return dense


def cuda_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """X Wᵀ + bias without a dense W, by the fused kernel for decoding; it saves nothing for a backward pass."""
    from bitsandbytes.autograd._functions import matmul_4bit

    bias = None if bias is None else bias.to(x.dtype)
    y: Tensor = matmul_4bit(x, weight.packed.view(1, -1), _state(weight, x.dtype), bias=bias)
    return y


def _state(weight: QuantizedWeight, dtype: torch.dtype) -> Any:
    """The constants in bitsandbytes' form."""
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


class QuantLinear(nn.Module):
    """Linear layer over a `QuantizedWeight` of shape (out_features, in_features) = (O, I); nothing in it is trained.

    x: (..., I) activations, W: (O, I) dequantized weight, y = x Wᵀ + bias (QLoRA §3, arXiv 2305.14314). W is
    dequantized in the forward and again in the backward pass, so a training step holds one dense layer at a time. Both
    dequantize to the *activation's* dtype: the product needs it anyway, table[code] · absmax is rounded only once, and
    both passes see the same W (bitsandbytes' backward uses the source's dtype: not the gradient of its forward).

    Constants are held as the bits of their floats, so that casting the model to 16 bits does not round them.
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
        """The weight, sharing memory with the layer."""
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


def load_model(folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model from a dense or quantized folder, in evaluation mode, its parameters in ``dtype``.

    Quantized weights stay as they are stored; their layers are `QuantLinear`. Tied weights share memory. Tensors are
    read one by one, so loading takes the memory of the weights and of one tensor.

    Raises:
        CheckpointError: unknown architecture, damaged weights, tensors missing, left over or of a wrong shape.
        NumberTypeError: a weight does not fit ``dtype``.
        QuantizeError: quantized in an unsupported way.
    """
    reader = ModelReader(folder)
    model = skeleton_of(reader, dtype)
    left = set(reader.names())
    for name, state_key in quantized_weights(reader.names()).items():
        left -= {name, state_key, *part_names(name)}
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
    refuse_missing(sorted(name for name, parameter in model.named_parameters() if parameter.is_meta), model, folder)
    model.to(torch.device(device))  # type: ignore[arg-type] # transformers wraps nn.Module.to without its types
    return model.eval()


def _put_quantized(model: nn.Module, path: str, layer: QuantLinear) -> None:
    """Replace a linear layer by a quantized one."""
    old = find_module(model, path, path)
    weight = getattr(old, "weight", None)
    if not isinstance(old, nn.Linear | Conv1D) or weight is None:
        raise CheckpointError(f"{path} is quantized, but is not a linear layer of {type(model).__name__}")
    shape = tuple(weight.shape) if isinstance(old, nn.Linear) else tuple(weight.shape)[::-1]
    if (layer.out_features, layer.in_features) != shape:
        raise CheckpointError(f"{path} is quantized with shape {layer.quantized.shape}, config.json asks for {shape}")
    if (layer.bias is None) != (old.bias is None):
        raise CheckpointError(f"{path} has a bias in only one of its weights and config.json")
    parent, _, last = path.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)
