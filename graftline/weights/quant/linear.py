"""Linear layers whose frozen weight stays quantized in memory, and models loaded with them."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from graftline.errors import CheckpointError, TrainError
from graftline.weights.cast import cast
from graftline.weights.experts import expert_stacks, find_slot, missing_experts
from graftline.weights.frozen import FrozenProduct
from graftline.weights.model_folder import ModelReader, find_module, place_of, refuse_missing, skeleton_of
from graftline.weights.quant.blockwise import NestedConstants, QuantizedWeight
from graftline.weights.quant.kernels import (
    cuda_linear,
    dequantize_compiled,
    dequantize_here,
    fp8_linear,
    has_cuda_kernel,
)
from graftline.weights.quant.shared_dense import shared
from graftline.weights.quant.tensors import from_tensors, part_names, quantized_weights, refuse_nan
from graftline.weights.sharded import read_shares, shard, whole
from graftline.weights.stored import can_keep, keep_stored

# A linear layer whose frozen weight stays quantized in memory.
#
# x: (..., I) activations, W: (O, I) dequantized weight, y = x Wᵀ + bias (QLoRA §3, arXiv 2305.14314).
#
# The weight is dequantized in the forward pass and again in the backward pass; neither keeps a dense copy, so a
# training step holds one dense layer at a time. Both dequantize to the *activation's* dtype: the matrix product needs
# that dtype anyway, rounding table[code] · absmax once loses least, and forward and backward see the same W
# (bitsandbytes' backward uses the source's dtype, so its gradient is not that of its forward).


_DECODED_TOKENS = 64


class QuantLinear(nn.Module):
    """Linear layer over a `QuantizedWeight` of shape (out_features, in_features) = (O, I); nothing in it is trained.

    x: (..., I) activations, W: (O, I) dequantized weight, y = x Wᵀ + bias (QLoRA §3, arXiv 2305.14314). W is
    dequantized in the forward and again in the backward pass, so a training step holds one dense layer at a time. Both
    dequantize to the *activation's* dtype: the product needs it anyway, table[code] · absmax is rounded only once, and
    both passes see the same W (bitsandbytes' backward uses the source's dtype: not the gradient of its forward).

    With ``fp8_products`` a layer in FP8 rounds x to FP8 as well in training's forward pass; its gradient is that of the
    product with x as it is, and evaluation rounds nothing.

    Constants are held as the bits of their floats, so that casting the model to 16 bits does not round them.

    Codes and constants are buffers; of a base that several processes share out (`graftline.weights.sharded`) they are
    parameters, which alone FSDP2 cuts and gathers.
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
        self.fp8_products = False
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
        """The weight, sharing memory with the layer; a sharded one is gathered, by all processes together."""
        shape = (self.out_features, self.in_features)
        packed, absmax = whole(self.packed), whole(self.absmax)
        if self.nested_absmax is None or self.nested_offset is None:
            return QuantizedWeight(packed, _floats(absmax), shape, self.scheme)
        nested = NestedConstants(absmax, _floats(whole(self.nested_absmax)), _floats(self.nested_offset))
        return QuantizedWeight(packed, nested, shape, self.scheme)

    def use_parameters(self) -> None:
        """Hold codes and constants as frozen parameters, so that they can be sharded."""
        for name in ("packed", "absmax", "nested_absmax"):
            tensor = getattr(self, name)
            if tensor is not None:
                delattr(self, name)
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (out_features, in_features), dequantized into new memory."""
        if torch.compiler.is_compiling():
            return dequantize_compiled(self.quantized, dtype, backward=False)
        return dequantize_here(self.quantized, dtype)

    def product(self, x: Tensor) -> Tensor:
        """X Wᵀ without the bias."""
        if self.fp8_products and self.training:
            return fp8_linear(x, self.quantized)
        return nn.functional.linear(x, self._product_weight(x.dtype))

    def input_gradient(self, grad_y: Tensor) -> Tensor:
        """∂L/∂x = ∂L/∂y W: the weight is dequantized again."""
        if torch.compiler.is_compiling():
            return grad_y @ dequantize_compiled(self.quantized, grad_y.dtype, backward=True)
        return grad_y @ self._product_weight(grad_y.dtype)

    def _product_weight(self, dtype: torch.dtype) -> Tensor:
        """`dense_weight`, or the one that trainings side by side share, for a product that does not change it."""
        dense = None if torch.compiler.is_compiling() else shared()
        if dense is None:
            return self.dense_weight(dtype)
        quantized = self.quantized
        return dense.get(quantized, dtype, lambda: dequantize_here(quantized, dtype))

    def forward(self, x: Tensor) -> Tensor:
        """X (..., in_features) -> (..., out_features), in x's dtype or autocast's."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if _is_decoding(x) and has_cuda_kernel(self.quantized):
            return cuda_linear(x, self.quantized, self.bias)
        y: Tensor = FrozenProduct.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Sizes and scheme, as nn.Linear prints itself."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {self.scheme}"


_LARGEST_GAP = 0.1
"""‖y − x Wᵀ‖ / ‖x Wᵀ‖ of a product in FP8. Rounding x alone costs some 0.03; a lost scale is far above."""


def use_fp8_products(model: nn.Module) -> None:
    """Let the layers in FP8 take x in FP8 too, in training, after one product of each shape was compared here.

    Raises:
        TrainError: there is none in FP8, or this device or this torch does not compute the product.
    """
    layers = [module for module in model.modules() if isinstance(module, QuantLinear) and module.scheme.code == "fp8"]
    if not layers:
        raise TrainError("train.fp8_products needs a base in FP8; write quantize.method: fp8, or leave it out")
    for layer in {(each.in_features, each.out_features): each for each in layers}.values():
        if why_not := _why_no_fp8(layer):
            raise TrainError(
                f"train.fp8_products: {layer.packed.device} does not compute a product of shape ({layer.out_features}, "
                f"{layer.in_features}) in FP8 ({why_not}); a GPU of compute capability 8.9 or later and sizes that are "
                "multiples of 16 are expected: leave it out, and the base in FP8 is dequantized instead"
            )
    for layer in layers:
        layer.fp8_products = True


@torch.no_grad()
def _why_no_fp8(layer: QuantLinear) -> str | None:
    chooser = torch.Generator().manual_seed(0)
    x = torch.randn(16, layer.in_features, generator=chooser).to(layer.packed.device, torch.bfloat16)
    exact = nn.functional.linear(x, layer.dense_weight(x.dtype)).float()
    try:
        found = fp8_linear(x, layer.quantized).float()
    except (RuntimeError, ValueError, NotImplementedError) as error:  # what torch says of a device or a shape
        return " ".join(str(error).split())[:200]
    gap = float((found - exact).norm() / exact.norm().clamp(min=_LEAST_NORM))
    return None if gap <= _LARGEST_GAP else f"it is {gap:.2g} from the dequantized one"


_LEAST_NORM = 1e-30


def _is_decoding(x: Tensor) -> bool:
    """A few tokens and no gradient: then a kernel that never makes the dense weight is faster than one that does."""
    few = x.numel() <= _DECODED_TOKENS * x.shape[-1]
    return few and not (torch.is_grad_enabled() and x.requires_grad) and not torch.compiler.is_compiling()


def _bits(values: Tensor) -> Tensor:
    return values.view(torch.int32)


def _floats(bits: Tensor) -> Tensor:
    return bits.view(torch.float32)


_HALF = (torch.bfloat16, torch.float16)


def load_model(
    folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32, keep: bool = False
) -> PreTrainedModel:
    """A causal language model from a dense or quantized folder, in evaluation mode, its parameters in ``dtype``.

    Quantized weights stay as they are stored; their layers are `QuantLinear`. Tied weights share memory. Tensors are
    read one by one and put on the device, so main memory holds one tensor of a model that goes elsewhere.

    With ``keep`` the weights of linear layers and embeddings stay in the number type that they are stored in, and are
    converted to ``dtype`` where they are used (`graftline.weights.stored`): for fp32 arithmetic in half the memory.

    Raises:
        CheckpointError: unknown architecture, damaged weights, tensors missing, left over or of a wrong shape.
        NumberTypeError: a weight does not fit ``dtype``.
        QuantizeError: quantized in an unsupported way.
    """
    reader, place = ModelReader(folder), torch.device(device)
    model = skeleton_of(reader, dtype)
    left = set(reader.names())
    for name, state_key in quantized_weights(reader.names()).items():
        left -= {name, state_key, *part_names(name)}
        bias_name = name.removesuffix("weight") + "bias"
        bias = cast(reader.read(bias_name), dtype, bias_name) if bias_name in left else None
        left.discard(bias_name)
        layer = QuantLinear(from_tensors(name, state_key, reader.read), bias).to(place)
        _put_quantized(model, name.removesuffix(".weight"), layer)
    for name in sorted(left - set(model.all_tied_weights_keys)):
        if found := find_slot(model, name, reader.info(name).shape):
            stack, slot = found
            stays = keep and reader.info(name).dtype in _HALF
            stack.put(slot, (reader.read(name) if stays else cast(reader.read(name), dtype, name)).to(place))
            continue
        owner, last = place_of(model, name, reader.info(name).shape)
        stays = keep and last == "weight" and can_keep(owner) and reader.info(name).dtype in _HALF
        tensor = reader.read(name) if stays else cast(reader.read(name), dtype, name)
        owner._parameters[last] = nn.Parameter(tensor.to(place))
    model.tie_weights()
    if keep:
        keep_stored(model, dtype)
    refuse_missing(missing_experts(model, reader.names()), model, folder)
    refuse_missing(sorted(name for name, parameter in model.named_parameters() if parameter.is_meta), model, folder)
    model.to(place)  # type: ignore[arg-type] # transformers wraps nn.Module.to without its types
    return model.eval()


def load_shares(folder: Path, *, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """`load_model` over all processes of a training: each reads, and holds, its share of every tensor.

    No process ever has more of the base than its share and what is gathered at a time (`graftline.weights.sharded`).

    Raises:
        TrainError: the model's class does not say what its blocks are, or it has experts.
        CheckpointError, NumberTypeError, QuantizeError: as `load_model`.
    """
    reader, place = ModelReader(folder), torch.device(device)
    model = skeleton_of(reader, dtype).requires_grad_(False)
    if expert_stacks(model):
        raise TrainError(
            f"{type(model).__name__} has experts, which are not divided over processes; write train.sharding: false"
        )
    quantized = quantized_weights(reader.names())
    left = set(reader.names())
    for name, state_key in quantized.items():
        left -= {name, state_key, *part_names(name)}
        bias_name = name.removesuffix("weight") + "bias"
        bias = cast(reader.read(bias_name), dtype, bias_name).to(place) if bias_name in left else None
        left.discard(bias_name)
        layer = QuantLinear(from_tensors(name, state_key, _without_memory(reader, name)), bias)
        _put_quantized(model, name.removesuffix(".weight"), layer)
        layer.use_parameters()
    tied = set(model.all_tied_weights_keys)
    for name in sorted(left - tied):
        place_of(model, name, reader.info(name).shape)
    model.tie_weights()
    needed = {_stored_name(name, quantized) for name, _ in model.named_parameters()}
    refuse_missing(sorted(name for name in needed if name not in reader), model, folder)
    shard(model, kind=place.type)

    def read(name: str, start: int, stop: int) -> Tensor:
        stored = _stored_name(name, quantized)
        rows = reader.read_rows(stored, start, stop)
        if stored == name:
            return cast(rows, dtype, name).to(place)
        bits = rows.reshape(-1)
        if quantized.get(stored, "").endswith("__fp8"):
            refuse_nan(bits.view(torch.uint8), stored)
        return bits.view(torch.int32 if bits.dtype == torch.float32 else torch.uint8).to(place)

    read_shares(model, read)
    return model.eval()


def _without_memory(reader: ModelReader, weight: str) -> Callable[[str], Tensor]:
    """Reads a quantized weight's state and tables, and codes and constants as tensors without memory."""
    large = {weight, *(f"{weight}.{part}" for part in ("absmax", "nested_absmax"))}

    def read(name: str) -> Tensor:
        info = reader.info(name)
        return torch.empty(info.shape, dtype=info.dtype, device="meta") if name in large else reader.read(name)

    return read


def _stored_name(parameter: str, quantized: Mapping[str, str]) -> str:
    """Name in the files of a model's parameter, or of a quantized layer's codes or constants."""
    path, _, last = parameter.rpartition(".")
    weight = f"{path}.weight"
    if weight not in quantized or last == "bias":
        return parameter
    return weight if last == "packed" else f"{weight}.{last}"


def _put_quantized(model: nn.Module, path: str, layer: QuantLinear) -> None:
    """Replace a linear layer, or the matrix of an expert, by a quantized one."""
    if found := find_slot(model, f"{path}.weight", (layer.out_features, layer.in_features)):
        stack, slot = found
        stack.put_quantized(slot, layer)
        return
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
