"""bitsandbytes' CUDA kernels for NF4 weights, used where they exist.

They take the same bytes as `blockwise`: codes, constants and tables are bit-equal.
"""

from typing import Any

import torch
from torch import Tensor

from graftline.weights.quant.blockwise import Nested, Quantized
from graftline.weights.quant.codebooks import code_table, dynamic_map
from graftline.weights.quant.scheme import NESTED_BLOCK_SIZE

# bitsandbytes loads CUDA libraries on import, which takes seconds: it is imported where a CUDA weight is used.


def has_kernel(weight: Quantized) -> bool:
    """Whether the weight lies on a CUDA device, is NF4, and bitsandbytes was built for CUDA."""
    if weight.packed.device.type != "cuda" or weight.scheme.code != "nf4":
        return False
    import bitsandbytes.cextension as extension

    return bool(extension.lib.compiled_with_cuda)


def dequantize(weight: Quantized, dtype: torch.dtype) -> Tensor:
    """As `blockwise.dequantize`, by one kernel."""
    import bitsandbytes.functional as kernels

    dense: Tensor = kernels.dequantize_4bit(weight.packed.view(-1, 1), _state(weight, dtype))
    return dense


def linear(x: Tensor, weight: Quantized, bias: Tensor | None) -> Tensor:
    """X Wᵀ + bias without a dense W: the fused kernel of decoding. Not for training: it saves nothing for backward."""
    from bitsandbytes.autograd._functions import matmul_4bit

    bias = None if bias is None else bias.to(x.dtype)
    y: Tensor = matmul_4bit(x, weight.packed.view(1, -1), _state(weight, x.dtype), bias=bias)
    return y


def _state(weight: Quantized, dtype: torch.dtype) -> Any:
    """The constants as bitsandbytes wants them."""
    from bitsandbytes.functional import QuantState

    device = weight.packed.device
    common = {
        "shape": torch.Size(weight.shape),
        "code": code_table("nf4").to(device),
        "quant_type": "nf4",
        "dtype": dtype,
    }
    if not isinstance(weight.absmax, Nested):
        return QuantState(absmax=weight.absmax, blocksize=weight.scheme.block_size, **common)
    outer = QuantState(
        absmax=weight.absmax.absmax, blocksize=NESTED_BLOCK_SIZE, code=dynamic_map().to(device), dtype=torch.float32
    )
    offset = weight.absmax.offset
    return QuantState(
        absmax=weight.absmax.codes, blocksize=weight.scheme.block_size, offset=offset, state2=outer, **common
    )
