"""Blockwise absmax quantization, bit-equal to bitsandbytes on the CPU.

w: any shape, taken flat in row-major order. Blocks of ``block_size`` may cross rows; the last may be short.
Per block: absmax = max |w|, code = nearest table value of w / absmax, ties to the lower one (METHODS §1.4).
Work goes in pieces of a few MiB, so that its memory does not depend on the size of the weight.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from graftline.weights.quant.codebooks import CODE_BITS, code_table, dynamic_map, nearest_codes
from graftline.weights.quant.packing import decode, num_codes, pack, packed_bytes, word_table
from graftline.weights.quant.scheme import NESTED_BLOCK_SIZE, Scheme

# Weights in a piece: a multiple of every block size and group of packed codes, small enough to stay in the cache.
PIECE = 1 << 18
# Smallest absmax that is divided by: a block of zeros then gets the code of zero.
_TINY = 1e-38
# Steps of the table that the 8-bit constants are looked up in.
_CELLS = 1 << 16


@dataclass(frozen=True)
class Nested:
    """Constants in 8 bits: absmax ≈ map[codes] · absmax + offset.

    codes: (number of blocks,) uint8. absmax: (⌈blocks / 256⌉,) fp32. offset: their mean, () fp32.
    """

    codes: Tensor
    absmax: Tensor
    offset: Tensor


@dataclass(frozen=True)
class Quantized:
    """A quantized weight. packed: uint8 bytes of the codes. absmax: (number of blocks,) fp32, or `Nested`."""

    packed: Tensor
    absmax: Tensor | Nested
    shape: tuple[int, ...]
    scheme: Scheme

    @property
    def num_bytes(self) -> int:
        """Bytes of codes and constants, tables not counted."""
        if isinstance(self.absmax, Nested):
            return self.packed.numel() + self.absmax.codes.numel() + 4 * self.absmax.absmax.numel() + 4
        return self.packed.numel() + 4 * self.absmax.numel()


def quantize(weight: Tensor, scheme: Scheme) -> Quantized:
    """Quantize a floating-point weight of any shape. The caller has made sure that all values are finite."""
    flat = weight.reshape(-1)
    zero = int(nearest_codes(torch.zeros(1), scheme.code))
    packed = torch.empty(packed_bytes(flat.numel(), scheme.bits), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-flat.numel() // scheme.block_size), device=weight.device)
    num_packed = num_blocks = 0
    for piece in flat.split(PIECE):
        codes, piece_absmax = _quantize_piece(piece.float(), scheme)
        piece_packed = pack(codes, scheme.bits, fill=zero)
        packed[num_packed : num_packed + len(piece_packed)] = piece_packed
        absmax[num_blocks : num_blocks + len(piece_absmax)] = piece_absmax
        num_packed, num_blocks = num_packed + len(piece_packed), num_blocks + len(piece_absmax)
    constants = quantize_constants(absmax) if scheme.double_quant else absmax
    return Quantized(packed, constants, tuple(weight.shape), scheme)


def _quantize_piece(flat: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Codes (n,) uint8 and absmax of the blocks of flat (n,) fp32."""
    full = flat.numel() - flat.numel() % scheme.block_size
    blocks = flat[:full].view(-1, scheme.block_size)
    absmax = blocks.abs().amax(dim=1) if full else flat.new_empty(0)
    # Multiplied by the reciprocal, but divided in the short last block: so does bitsandbytes, and one unit in the last
    # place decides a code that lies on a midpoint.
    scaled = (blocks * (1.0 / absmax.clamp(min=_TINY)).unsqueeze(1)).reshape(-1)
    if full < flat.numel():
        last = flat[full:].abs().max().clamp(min=_TINY)
        absmax = torch.cat([absmax, last.unsqueeze(0)])
        scaled = torch.cat([scaled, flat[full:] / last])
    return nearest_codes(scaled, scheme.code), absmax


def quantize_constants(absmax: Tensor) -> Nested:
    """Double quantization (QLoRA §3): the mean taken off, then 8-bit blocks of 256 with the dynamic map."""
    offset = absmax.mean()
    centred = absmax - offset
    padded = torch.nn.functional.pad(centred, (0, -centred.numel() % NESTED_BLOCK_SIZE)).view(-1, NESTED_BLOCK_SIZE)
    outer = padded.abs().amax(dim=1)
    scaled = (padded * (1.0 / outer).unsqueeze(1)).nan_to_num(nan=-1.0)  # all equal: the first code, as bitsandbytes
    scaled = scaled.view(-1)[: centred.numel()]
    cells = ((scaled + 1) * 0.5 * (_CELLS - 1) + 0.5).int().clamp(0, _CELLS - 1)
    return Nested(_dynamic_codes().to(absmax.device)[cells], outer, offset)


@cache
def _dynamic_codes() -> Tensor:
    """Code of the dynamic map for each of 65,536 even steps from −1 to 1, uint8.

    bitsandbytes looks a scaled constant up in such a table, so that one within 1.5e-5 of a midpoint may get the other
    neighbour; being bit-equal to it means doing the same.
    """
    values = torch.linspace(-1, 1, _CELLS, dtype=torch.float64)
    table = dynamic_map().double()
    return torch.bucketize(values, (table[1:] + table[:-1]) / 2).to(torch.uint8)


def constants(absmax: Tensor | Nested) -> Tensor:
    """The constants as (number of blocks,) fp32."""
    if isinstance(absmax, Tensor):
        return absmax
    values = dynamic_map().to(absmax.codes.device).index_select(0, absmax.codes.int())
    outer = absmax.absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: values.numel()]
    return values * outer + absmax.offset


def dequantize(quantized: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """table[code] · absmax, computed in fp32 and rounded once to ``dtype``; shape of the source."""
    numel = math.prod(quantized.shape)
    if dtype == torch.float32:  # decoded in place: one pass over the memory less
        filled_up = torch.empty(num_codes(quantized.packed, quantized.scheme.bits), device=quantized.packed.device)
        for _ in dequantized_pieces(quantized, out=filled_up):
            pass
        return filled_up[:numel].view(quantized.shape)
    out = torch.empty(numel, dtype=dtype, device=quantized.packed.device)
    for piece, values in zip(out.split(PIECE), dequantized_pieces(quantized), strict=True):
        piece.copy_(values)
    return out.view(quantized.shape)


def dequantized_pieces(quantized: Quantized, *, out: Tensor | None = None) -> Iterator[Tensor]:
    """The dequantized weight in flat fp32 pieces of `PIECE` values; the last is shorter.

    ``out``: where they are to lie, fp32 with room for the filled-up last group of codes.
    """
    scheme, left = quantized.scheme, math.prod(quantized.shape)
    table = _word_table(scheme.code).to(quantized.packed.device)
    packed_pieces = quantized.packed.split(packed_bytes(PIECE, scheme.bits))
    scale_pieces = constants(quantized.absmax).split(PIECE // scheme.block_size)
    places = itertools.repeat(None) if out is None else out.split(PIECE)
    for packed, scale, place in zip(packed_pieces, scale_pieces, places, strict=False):
        values = decode(packed, scheme.bits, table, out=place)[:left]
        _scale_blocks(values, scale, scheme.block_size)
        yield values
        left -= values.numel()


def _scale_blocks(values: Tensor, absmax: Tensor, block_size: int) -> None:
    """Multiply each block of values (n,) by its constant, in place; the last block may be short."""
    full = values.numel() // block_size
    values[: full * block_size].view(-1, block_size).mul_(absmax[:full].unsqueeze(1))
    if full < len(absmax):
        values[full * block_size :].mul_(absmax[full])


@cache
def _word_table(code: str) -> Tensor:
    return word_table(code_table(code), CODE_BITS[code])
