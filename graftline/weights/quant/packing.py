"""Codes of 2, 3 or 4 bits as bytes.

4 bits: bitsandbytes' layout, the even element in the high half of the byte. 2 and 3 bits follow the same rule, first
element in the highest bits: four codes a byte, and eight codes in three bytes. An incomplete last group is filled up
with the code that the caller names. The layout is documented in docs/decisions/0010-low-bit-layout.md.
"""

import sys

import torch
from torch import Tensor

# bits -> (codes, bytes) of a group.
_GROUPS = {2: (4, 1), 3: (8, 3), 4: (2, 1)}
# bits -> (bits of a word, codes in it): what is decoded in one step.
_WORDS = {2: (8, 4), 3: (12, 4), 4: (8, 2)}


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` codes take."""
    codes, num_bytes = _GROUPS[bits]
    return -(-count // codes) * num_bytes


def num_codes(packed: Tensor, bits: int) -> int:
    """Codes that packed bytes hold, those that fill up the last group included."""
    codes, num_bytes = _GROUPS[bits]
    return packed.numel() // num_bytes * codes


def pack(codes: Tensor, bits: int, *, fill: int = 0) -> Tensor:
    """Codes (n,) uint8, each below 2^bits, to bytes (`packed_bytes`(n, bits),) uint8."""
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
    """What each word of packed codes decodes to: values (2^bits,) -> (words, codes of a word).

    A word is a byte of two 4-bit or four 2-bit codes, or 12 bits of four 3-bit codes.
    """
    width, per_word = _WORDS[bits]
    shifts = torch.arange(bits * (per_word - 1), -1, -bits)
    codes = (torch.arange(2**width).unsqueeze(1) >> shifts) & (2**bits - 1)
    return values[codes.to(values.device)]


def decode(packed: Tensor, bits: int, table: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Look packed codes up in a `word_table` of 4-byte values: (`num_codes`,), in ``out`` if it is given.

    A row of the table is gathered as one 8- or 16-byte element, which is several times faster than code by code.
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
