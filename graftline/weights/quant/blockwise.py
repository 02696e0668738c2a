"""Blockwise absmax quantization, bit-equal to bitsandbytes on the CPU; and FP8 with a scale for each row.

Weights of any shape are flattened in row-major order. Blocks of ``block_size`` may cross rows; the last may be short.
Per block: absmax = max |w|, code = nearest table value of w / absmax, ties to the lower one (METHODS §1.4). Weights are
processed in pieces of a few MiB, so that the working memory does not depend on their size.
"""

import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from graftline.weights.quant.scheme import CODE_BITS, NESTED_BLOCK_SIZE, Scheme, code_table, dynamic_map, nearest_codes

# Packing. 4 bits: bitsandbytes' layout, the even element in the high half of the byte. 2 and 3 bits likewise, the first
# element in the highest bits: four codes a byte, eight codes in three bytes (docs/decisions/0010-low-bit-layout.md).

# bits -> (codes, bytes) of a group.
_GROUPS = {2: (4, 1), 3: (8, 3), 4: (2, 1)}
# bits -> (bits of a word, codes in it): what is decoded in one step.
_WORDS = {2: (8, 4), 3: (12, 4), 4: (8, 2)}


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` codes take."""
    codes, num_bytes = _GROUPS[bits]
    return -(-count // codes) * num_bytes


def num_codes(packed: Tensor, bits: int) -> int:
    """Codes in packed bytes, including those that pad the last group."""
    codes, num_bytes = _GROUPS[bits]
    return packed.numel() // num_bytes * codes


def pack(codes: Tensor, bits: int, *, fill: int = 0) -> Tensor:
    """Codes (n,) uint8 below 2^bits to bytes (`packed_bytes`(n, bits),) uint8, padded with ``fill``."""
    group, num_bytes = _GROUPS[bits]
    if codes.numel() % group:
        codes = torch.nn.functional.pad(codes, (0, group - codes.numel() % group), value=fill)
    if bits == 2 and sys.byteorder == "little":  # a group is one number: shifted as such, twice as fast as by columns
        four = codes.clone(memory_format=torch.contiguous_format).view(torch.int32)
        word = (four << 6 & 0xC0) | (four >> 4 & 0x30) | (four >> 14 & 0x0C) | (four >> 24 & 0x03)
        return word.to(torch.uint8)
    columns = codes.reshape(-1, group)
    if bits == 4:
        return (columns[:, 0] << 4) | columns[:, 1]
    word = torch.zeros(len(columns), dtype=torch.int32, device=codes.device)
    for index in range(group):
        word = (word << bits) | columns[:, index]
    if num_bytes == 1:
        return word.to(torch.uint8)
    return torch.stack([(word >> shift) & 0xFF for shift in (16, 8, 0)], dim=1).reshape(-1).to(torch.uint8)


def word_table(values: Tensor, bits: int) -> Tensor:
    """What each word decodes to: values (2^bits,) -> (words, codes of a word).

    A word is a byte with two 4-bit or four 2-bit codes, or 12 bits with four 3-bit codes.
    """
    width, per_word = _WORDS[bits]
    shifts = torch.arange(bits * (per_word - 1), -1, -bits)
    codes = (torch.arange(2**width).unsqueeze(1) >> shifts) & (2**bits - 1)
    return values[codes.to(values.device)]


def decode(packed: Tensor, bits: int, table: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Look packed codes up in a `word_table` of 4-byte values: (`num_codes`,), written to ``out`` if given.

    Rows of the table are gathered as single 8- or 16-byte elements, several times faster than code by code.
    """
    as_one = torch.float64 if table.shape[1] == 2 else torch.complex128
    place = None if out is None else out.view(as_one)
    return torch.index_select(table.view(as_one).view(-1), 0, _words(packed, bits), out=place).view(table.dtype)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: codes (count,) uint8."""
    codes = torch.arange(2**bits, dtype=torch.int32, device=packed.device)
    return decode(packed, bits, word_table(codes, bits))[:count].to(torch.uint8)


def _words(packed: Tensor, bits: int) -> Tensor:
    if bits != 3:
        return packed.to(torch.int32)
    byte = packed.to(torch.int32).view(-1, 3)
    first, second = (byte[:, 0] << 4) | (byte[:, 1] >> 4), ((byte[:, 1] & 0xF) << 8) | byte[:, 2]
    return torch.stack([first, second], dim=1).view(-1)


# Weights in a piece: a multiple of every block size and group of packed codes, small enough for a processor's cache. On
# a GPU each piece costs a few kernels and, where a number is read, a wait of the host.
PIECE = 1 << 18
_DEVICE_PIECE = 1 << 25


def piece_size(tensor: Tensor) -> int:
    """Weights that are worked on at once where a tensor lies."""
    return PIECE if tensor.device.type == "cpu" else _DEVICE_PIECE


# Smallest absmax that is divided by: a block of zeros then gets the code of zero.
_TINY = 1e-38
# Largest value of e4m3, four exponent and three mantissa bits; a row's largest weight is stored as it.
FP8_MAX = 448.0
# Smallest scale of a row of FP8, a normal number: a row of zeros is then stored as zeros.
_SMALLEST_SCALE = 1e-37
# Steps of the look-up table for the 8-bit constants.
_CELLS = 1 << 16


@dataclass(frozen=True)
class NestedConstants:
    """Constants in 8 bits: absmax ≈ map[codes] · absmax + offset.

    codes: (number of blocks,) uint8. absmax: (⌈blocks / 256⌉,) fp32. offset: their mean, () fp32.
    """

    codes: Tensor
    absmax: Tensor
    offset: Tensor


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized weight. packed: the codes' bytes, uint8. absmax: (number of blocks,) fp32, or `NestedConstants`.

    Of FP8 ``packed`` has the bits of torch.float8_e4m3fn, and ``absmax`` (O,) what each row is multiplied by.
    """

    packed: Tensor
    absmax: Tensor | NestedConstants
    shape: tuple[int, ...]
    scheme: Scheme

    @property
    def num_bytes(self) -> int:
        """Bytes of codes and constants, without tables."""
        if isinstance(self.absmax, NestedConstants):
            return self.packed.numel() + self.absmax.codes.numel() + 4 * self.absmax.absmax.numel() + 4
        return self.packed.numel() + 4 * self.absmax.numel()


def quantize(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Quantize a floating-point weight of any shape, whose values must be finite; with FP8 it is a matrix (O, I)."""
    if scheme.code == "fp8":
        return _quantize_rows(weight, scheme)
    flat = weight.reshape(-1)
    zero = int(nearest_codes(torch.zeros(1), scheme.code))
    packed = torch.empty(packed_bytes(flat.numel(), scheme.bits), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-flat.numel() // scheme.block_size), device=weight.device)
    num_packed = num_blocks = 0
    for piece in flat.split(piece_size(flat)):
        codes, piece_absmax = _quantize_piece(piece.float(), scheme)
        piece_packed = pack(codes, scheme.bits, fill=zero)
        packed[num_packed : num_packed + len(piece_packed)] = piece_packed
        absmax[num_blocks : num_blocks + len(piece_absmax)] = piece_absmax
        num_packed, num_blocks = num_packed + len(piece_packed), num_blocks + len(piece_absmax)
    constants = quantize_constants(absmax) if scheme.double_quant else absmax
    return QuantizedWeight(packed, constants, tuple(weight.shape), scheme)


def _quantize_rows(W_OI: Tensor, scheme: Scheme) -> QuantizedWeight:
    """FP8: each row divided by its scale, so that its largest value is e4m3's, and rounded to the nearest."""
    scale_O = torch.empty(len(W_OI), device=W_OI.device)
    packed = torch.empty(W_OI.shape, dtype=torch.uint8, device=W_OI.device)
    for rows, scale, out in zip(*(_rows(tensor, W_OI.shape[1]) for tensor in (W_OI, scale_O, packed)), strict=True):
        exact = rows.float()
        scale.copy_(exact.abs().amax(dim=1).div_(FP8_MAX).clamp_(min=_SMALLEST_SCALE))
        # Rounding may take the largest a little above what e4m3 holds.
        rounded = exact.div(scale.unsqueeze(1)).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        out.copy_(rounded.view(torch.uint8))
    return QuantizedWeight(packed.view(-1), scale_O, tuple(W_OI.shape), scheme)


def _rows(tensor: Tensor, width: int) -> tuple[Tensor, ...]:
    """A tensor by rows of a matrix of this width, in pieces of at most `piece_size` values and at least a row."""
    return tensor.split(max(1, piece_size(tensor) // width))


def _quantize_piece(flat: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Codes (n,) uint8 and absmax of the blocks of flat (n,) fp32."""
    full = flat.numel() - flat.numel() % scheme.block_size
    blocks = flat[:full].view(-1, scheme.block_size)
    absmax = blocks.abs().amax(dim=1) if full else flat.new_empty(0)
    # As in bitsandbytes, multiplied by the reciprocal but divided in the short last block: a difference in the last bit
    # decides a code at a midpoint.
    scaled = (blocks * (1.0 / absmax.clamp(min=_TINY)).unsqueeze(1)).reshape(-1)
    if full < flat.numel():
        last = flat[full:].abs().max().clamp(min=_TINY)
        absmax = torch.cat([absmax, last.unsqueeze(0)])
        scaled = torch.cat([scaled, flat[full:] / last])
    return nearest_codes(scaled, scheme.code), absmax


def quantize_constants(absmax: Tensor) -> NestedConstants:
    """Double quantization (QLoRA §3): the mean subtracted, then 8-bit blocks of 256 with the dynamic map.

    Computed on the CPU, wherever the constants are: a mean that is summed in another order has other last bits, and
    some codes would differ.
    """
    device, absmax = absmax.device, absmax.cpu()
    offset = absmax.mean()
    centred = absmax - offset
    padded = torch.nn.functional.pad(centred, (0, -centred.numel() % NESTED_BLOCK_SIZE)).view(-1, NESTED_BLOCK_SIZE)
    outer = padded.abs().amax(dim=1)
    scaled = (padded * (1.0 / outer).unsqueeze(1)).nan_to_num(nan=-1.0)  # all equal: the first code, as bitsandbytes
    scaled = scaled.view(-1)[: centred.numel()]
    cells = ((scaled + 1) * 0.5 * (_CELLS - 1) + 0.5).int().clamp(0, _CELLS - 1)
    return NestedConstants(_dynamic_codes()[cells].to(device), outer.to(device), offset.to(device))


@cache
def _dynamic_codes() -> Tensor:
    """Code of the dynamic map for each of 65,536 even steps from −1 to 1, uint8.

    bitsandbytes uses such a table, in which a value within 1.5e-5 of a midpoint may get the other neighbour; being
    bit-equal means doing the same.
    """
    values = torch.linspace(-1, 1, _CELLS, dtype=torch.float64)
    table = dynamic_map().double()
    return torch.bucketize(values, (table[1:] + table[:-1]) / 2).to(torch.uint8)


def constants(absmax: Tensor | NestedConstants) -> Tensor:
    """The constants as (number of blocks,) fp32."""
    if isinstance(absmax, Tensor):
        return absmax
    values = dynamic_map().to(absmax.codes.device).index_select(0, absmax.codes.int())
    outer = absmax.absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: values.numel()]
    return values * outer + absmax.offset


def dequantize(quantized: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """table[code] · absmax, computed in fp32 and rounded once to ``dtype``; in the weight's shape."""
    if quantized.scheme.code == "fp8":
        return _dequantize_rows(quantized, dtype)
    numel = math.prod(quantized.shape)
    if dtype == torch.float32:  # decoded in place, which saves a pass over memory
        filled_up = torch.empty(num_codes(quantized.packed, quantized.scheme.bits), device=quantized.packed.device)
        for _ in dequantized_pieces(quantized, out=filled_up):
            pass
        return filled_up[:numel].view(quantized.shape)
    out = torch.empty(numel, dtype=dtype, device=quantized.packed.device)
    for piece, values in zip(out.split(piece_size(out)), dequantized_pieces(quantized), strict=True):
        piece.copy_(values)
    return out.view(quantized.shape)


def dequantized_pieces(quantized: QuantizedWeight, *, out: Tensor | None = None) -> Iterator[Tensor]:
    """The dequantized weight in flat fp32 pieces of `piece_size` values; the last is shorter.

    They are written to ``out`` if given: fp32, with room for the padding of the last group of codes. Not for FP8.
    """
    if quantized.scheme.code == "fp8":
        yield from _dequantized_rows_in_pieces(quantized)
        return
    scheme, left = quantized.scheme, math.prod(quantized.shape)
    table = _word_table(scheme.code).to(quantized.packed.device)
    size = piece_size(quantized.packed)
    packed_pieces = quantized.packed.split(packed_bytes(size, scheme.bits))
    scale_pieces = constants(quantized.absmax).split(size // scheme.block_size)
    places = itertools.repeat(None) if out is None else out.split(size)
    for packed, scale, place in zip(packed_pieces, scale_pieces, places, strict=False):
        values = decode(packed, scheme.bits, table, out=place)[:left]
        _scale_blocks(values, scale, scheme.block_size)
        yield values
        left -= values.numel()


def _dequantize_rows(quantized: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Rows of FP8 times their scales. e4m3 fits every type that is computed in, so that only the product is rounded."""
    packed_OI, scale_O1 = quantized.packed.view(quantized.shape), constants(quantized.absmax).unsqueeze(1)
    if packed_OI.is_cuda:  # one kernel, which rounds as it writes
        return packed_OI.view(torch.float8_e4m3fn).to(dtype).mul_(scale_O1)
    out_OI = torch.empty(quantized.shape, dtype=dtype, device=packed_OI.device)
    width = quantized.shape[1]
    for packed, scale, out in zip(*(_rows(each, width) for each in (packed_OI, scale_O1, out_OI)), strict=True):
        out.copy_(packed.view(torch.float8_e4m3fn).float().mul_(scale))
    return out_OI


def _dequantized_rows_in_pieces(quantized: QuantizedWeight) -> Iterator[Tensor]:
    scale_O, width, start = constants(quantized.absmax), quantized.shape[1], 0
    for packed in quantized.packed.split(piece_size(quantized.packed)):
        row = torch.arange(start, start + len(packed), device=packed.device) // width
        yield packed.view(torch.float8_e4m3fn).float().mul_(scale_O[row])
        start += len(packed)


def _scale_blocks(values: Tensor, absmax: Tensor, block_size: int) -> None:
    """Multiply each block of values (n,) by its constant, in place; the last block may be short."""
    full = values.numel() // block_size
    values[: full * block_size].view(-1, block_size).mul_(absmax[:full].unsqueeze(1))
    if full < len(absmax):
        values[full * block_size :].mul_(absmax[full])


@cache
def _word_table(code: str) -> Tensor:
    return word_table(code_table(code), CODE_BITS[code])
