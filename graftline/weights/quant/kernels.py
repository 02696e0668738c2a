"""Dequantization on a GPU and in front of a compiler: kernels of bitsandbytes and Triton behind one operator of torch.

They take the same bytes as `blockwise`: codes, constants and tables are bit-equal. bitsandbytes has a kernel for NF4
only; NF3 and NF2 are decoded by one of ours in Triton, or by `blockwise` where Triton is missing; FP8 needs none, and
its product with a rounded x is torch's. All are reached through operators registered with torch, never ctypes: a
compiler that meets a pointer gives up silently.

bitsandbytes loads CUDA libraries on import, which takes seconds: it is imported where a CUDA weight is used.
"""

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from graftline.weights.quant.blockwise import (
    NestedConstants,
    QuantizedWeight,
    constants,
    dequantize,
    quantize,
    quantize_constants,
)
from graftline.weights.quant.scheme import NESTED_BLOCK_SIZE, Scheme, code_table, dynamic_map


@cache
def table_on(device: torch.device, code: str) -> Tensor:
    """A code's table, or the dynamic map of the constants (``dynamic``), on a device, copied there once.

    A copy from pageable memory makes the host wait for the device; there were two in each dequantization.
    """
    return (dynamic_map() if code == "dynamic" else code_table(code)).to(device)


def has_cuda_kernel(weight: QuantizedWeight) -> bool:
    """Whether the weight lies on a CUDA device, is NF4, and bitsandbytes was built for CUDA."""
    return weight.packed.device.type == "cuda" and weight.scheme.code == "nf4" and _bitsandbytes_has_cuda()


@cache
def _bitsandbytes_has_cuda() -> bool:
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    import bitsandbytes.cextension as extension

    return bool(extension.lib.compiled_with_cuda)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def dequantize_here(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """As `blockwise.dequantize`, by the fastest kernel that the weight's device has."""
    if has_cuda_kernel(weight):
        return bitsandbytes_dequantize(weight, dtype)
    if weight.packed.device.type == "cuda" and weight.scheme.code != "fp8" and _has_triton():
        from graftline.weights.quant.triton_kernels import decode_blocks

        table = table_on(weight.packed.device, weight.scheme.code)
        absmax = nested_constants(weight.absmax)
        return decode_blocks(weight.packed, table, absmax, shape=weight.shape, scheme=weight.scheme, dtype=dtype)
    return dequantize(weight, dtype)


def quantize_here(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """As `blockwise.quantize`, by bitsandbytes' kernel where that gives the same bytes: NF4 in whole blocks on CUDA."""
    fits = weight.device.type == "cuda" and scheme.code == "nf4" and weight.numel() % scheme.block_size == 0
    if not (fits and _bitsandbytes_has_cuda()):
        return quantize(weight, scheme)
    import bitsandbytes  # noqa: F401 # registers the operators

    encode: Callable[..., tuple[Tensor, Tensor]] = torch.ops.bitsandbytes.quantize_4bit.default
    packed, absmax = encode(weight.float().contiguous(), scheme.block_size, "nf4", torch.uint8)
    if not bool((absmax > 0).all()):  # a block of zeros, which the kernel divides by
        return quantize(weight, scheme)
    held = quantize_constants(absmax) if scheme.double_quant else absmax
    return QuantizedWeight(packed.view(-1), held, tuple(weight.shape), scheme)


def nested_constants(absmax: Tensor | NestedConstants) -> Tensor:
    """`blockwise.constants` without a copy of the map from the host."""
    if isinstance(absmax, Tensor) or absmax.codes.device.type == "cpu":
        return constants(absmax)
    values = table_on(absmax.codes.device, "dynamic").index_select(0, absmax.codes.int())
    outer = absmax.absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: values.numel()]
    return values * outer + absmax.offset


def bitsandbytes_dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """As `blockwise.dequantize`, by bitsandbytes' kernel."""
    import bitsandbytes  # noqa: F401 # registers the operators

    scheme, device = weight.scheme, weight.packed.device
    absmax = weight.absmax
    if isinstance(absmax, NestedConstants):
        table = table_on(device, "dynamic")
        unnest: Callable[..., Tensor] = torch.ops.bitsandbytes.dequantize_blockwise.default
        absmax = unnest(absmax.codes, absmax.absmax, table, NESTED_BLOCK_SIZE, torch.float32) + absmax.offset
    decode: Callable[..., Tensor] = torch.ops.bitsandbytes.dequantize_4bit.default
    return decode(weight.packed.view(-1, 1), absmax, scheme.block_size, "nf4", weight.shape, dtype)


def cuda_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """X Wᵀ + bias without a dense W: the fused kernel of decoding. Not for training: it saves nothing for backward."""
    from bitsandbytes.autograd._functions import matmul_4bit

    bias = None if bias is None else bias.to(x.dtype)
    y: Tensor = matmul_4bit(x, weight.packed.view(1, -1), _state(weight, x.dtype), bias=bias)
    return y


def fp8_linear(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """X Wᵀ with x (..., I) rounded to FP8 as well, each row by a scale that takes its largest value to e4m3's.

    ``weight`` is FP8. On CUDA in bf16 from compute capability 8.9 on, with I and O multiples of 16.
    """
    x_TI = x.reshape(-1, x.shape[-1])
    # Numbers of the module would be inputs of the graph to torch's compiler, which cannot share one between two layers
    # (torch 2.11 to 2.13: "lift_tracked_freevar_to_input").
    largest, smallest = torch.finfo(torch.float8_e4m3fn).max, 1e-30
    # The inverse in x's own type, so that no fp32 copy of x is made; the scale is what was really multiplied by.
    inverse_T1 = (largest / x_TI.abs().amax(dim=1, keepdim=True).float().clamp(min=smallest)).to(x.dtype)
    rounded_TI = (x_TI * inverse_T1).to(torch.float8_e4m3fn)
    W_OI = weight.packed.view(weight.shape).view(torch.float8_e4m3fn)
    scale_T1, scale_1O = inverse_T1.float().reciprocal(), constants(weight.absmax).unsqueeze(0)
    y: Tensor = torch._scaled_mm(rounded_TI, W_OI.t(), scale_a=scale_T1, scale_b=scale_1O, out_dtype=x.dtype)
    return y.view(*x.shape[:-1], weight.shape[0])


def _state(weight: QuantizedWeight, dtype: torch.dtype) -> Any:
    """The constants as bitsandbytes wants them."""
    from bitsandbytes.functional import QuantState

    device = weight.packed.device
    common = {
        "shape": torch.Size(weight.shape),
        "code": table_on(device, "nf4"),
        "quant_type": "nf4",
        "dtype": dtype,
    }
    if not isinstance(weight.absmax, NestedConstants):
        return QuantState(absmax=weight.absmax, blocksize=weight.scheme.block_size, **common)
    outer = QuantState(
        absmax=weight.absmax.absmax, blocksize=NESTED_BLOCK_SIZE, code=table_on(device, "dynamic"), dtype=torch.float32
    )
    offset = weight.absmax.offset
    return QuantState(
        absmax=weight.absmax.codes, blocksize=weight.scheme.block_size, offset=offset, state2=outer, **common
    )


# What torch.compile sees of a quantized layer: one operator, told by ``backward`` which of a step's two it is. Two
# equal ones would be computed once, and the dense weight kept from the forward to the backward pass, in every layer.

_LIBRARY = torch.library.Library("graftline", "DEF")
_LIBRARY.define(
    "dequantize(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, int[] shape, str code, "
    "int block_size, ScalarType dtype, bool backward) -> Tensor"
)


def dequantize_compiled(weight: QuantizedWeight, dtype: torch.dtype, *, backward: bool) -> Tensor:
    """`dequantize_here` as an operator that a compiler leaves as it is."""
    held, scheme = weight.absmax, weight.scheme
    flat = (held.codes, held.absmax, held.offset) if isinstance(held, NestedConstants) else (held, None, None)
    operator: Callable[..., Tensor] = torch.ops.graftline.dequantize.default
    return operator(weight.packed, *flat, weight.shape, scheme.code, scheme.block_size, dtype, backward)


def _run_dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    *given: Any,
) -> Tensor:
    shape, code, block_size, dtype, _ = given
    is_nested = nested_absmax is not None and nested_offset is not None
    held = NestedConstants(absmax, nested_absmax, nested_offset) if is_nested else absmax  # type: ignore[arg-type]
    return dequantize_here(QuantizedWeight(packed, held, tuple(shape), Scheme(code, block_size, is_nested)), dtype)


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("dequantize", _run_dequantize, _device)


@torch.library.register_fake("graftline::dequantize")
def _shape_of_dequantized(packed: Tensor, *given: Any) -> Tensor:
    shape, dtype = given[3], given[6]
    return packed.new_empty(shape, dtype=dtype)
