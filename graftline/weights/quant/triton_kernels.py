"""Codes of 2, 3 or 4 bits to weights by one kernel; imported only where Triton is installed (torch's CUDA wheels).

With ``TRITON_INTERPRET=1`` set before Triton is imported the kernel runs on a CPU: its test.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from graftline.weights.quant.scheme import Scheme

_BLOCK = tl.constexpr(1024)
"""Weights that one program decodes."""


@triton.jit
def _decode(packed, table, absmax, out, count, block_size, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * _BLOCK + tl.arange(0, _BLOCK)
    inside = at < count
    if BITS == 3:  # eight codes in three bytes, the first in the highest bits
        byte = at // 8 * 3
        first = tl.load(packed + byte, mask=inside, other=0).to(tl.int32)
        second = tl.load(packed + byte + 1, mask=inside, other=0).to(tl.int32)
        third = tl.load(packed + byte + 2, mask=inside, other=0).to(tl.int32)
        word, shift = (first << 16) | (second << 8) | third, 21 - 3 * (at % 8).to(tl.int32)
    else:  # four or two codes in a byte
        word = tl.load(packed + at // (8 // BITS), mask=inside, other=0).to(tl.int32)
        shift = 8 - BITS - BITS * (at % (8 // BITS)).to(tl.int32)
    code = (word >> shift) & ((1 << BITS) - 1)
    scale = tl.load(absmax + at // block_size, mask=inside, other=0.0)
    value = tl.load(table + code, mask=inside, other=0.0) * scale
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def decode_blocks(
    packed: Tensor, table: Tensor, absmax: Tensor, *, shape: Sequence[int], scheme: Scheme, dtype: torch.dtype
) -> Tensor:
    """table[code] · absmax, computed in fp32 and rounded once to ``dtype``.

    Args:
        packed: bytes of the codes, as `graftline.weights.quant.blockwise.pack` lays them.
        table: (2^bits,) fp32.
        absmax: (number of blocks,) fp32.
        shape: of the weight.
        scheme: says bits and block size.
        dtype: of the result.
    """
    out = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    grid = (triton.cdiv(out.numel(), _BLOCK.value),)
    _decode[grid](packed, table, absmax, out, out.numel(), scheme.block_size, BITS=scheme.bits)
    return out
