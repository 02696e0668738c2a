"""One safetensors file that grows tensor by tensor.

The header is written last: its place is kept free at the start of the file and filled up with spaces, which the format
allows. So a shard needs no second pass and no memory beyond the tensor at hand.
"""

import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftline.digest import canonical_json
from graftline.weights.header import DTYPE_NAMES

# Room for more than 5,000 tensors; the writer opens the next shard before it is full.
_HEADER_BYTES = 1 << 20
_DATA_START = 8 + _HEADER_BYTES
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Entry:
    """A tensor in a shard. ``dtype`` as safetensors spells it, ``offset`` in bytes from the start of the data."""

    name: str
    dtype: str
    shape: list[int]
    shard: int
    offset: int
    num_bytes: int
    sha256: str


class Shard:
    """The file of shard number ``index``, made if it is not there."""

    def __init__(self, file: Path, index: int) -> None:
        self.file, self.index = file, index
        self.entries: list[Entry] = []
        self._header_bytes = 0
        file.touch()
        self._stream = file.open("r+b")

    @property
    def num_bytes(self) -> int:
        """Bytes of data so far."""
        return self.entries[-1].offset + self.entries[-1].num_bytes if self.entries else 0

    def has_room(self, name: str, num_bytes: int, max_bytes: int) -> bool:
        """Whether a tensor fits; the first one always does."""
        header_bytes = self._header_bytes + _header_cost(name)
        return not self.entries or (self.num_bytes + num_bytes <= max_bytes and header_bytes <= _HEADER_BYTES)

    def append(self, name: str, tensor: Tensor) -> Entry:
        """Write the bytes of a dense CPU tensor behind the others."""
        data = tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")
        offset = self.num_bytes
        self._stream.seek(_DATA_START + offset)
        self._stream.write(data)
        self._stream.flush()
        sha256 = hashlib.sha256(data).hexdigest()
        entry = Entry(name, DTYPE_NAMES[tensor.dtype], list(tensor.shape), self.index, offset, len(data), sha256)
        self.keep(entry)
        return entry

    def keep(self, entry: Entry) -> None:
        """Take note of a tensor whose bytes are in the file."""
        self.entries.append(entry)
        self._header_bytes += _header_cost(entry.name)

    def holds(self, entry: Entry) -> bool:
        """Whether the file has the bytes that an entry describes."""
        self._stream.seek(_DATA_START + entry.offset)
        state, left = hashlib.sha256(), entry.num_bytes
        while left and (chunk := self._stream.read(min(left, _CHUNK_BYTES))):
            state.update(chunk)
            left -= len(chunk)
        return state.hexdigest() == entry.sha256

    def seal(self) -> None:
        """Write the header, cut what lies behind the last tensor, flush to the disk, close."""
        header = canonical_json(
            {entry.name: _header_entry(entry) for entry in self.entries} | {"__metadata__": {"format": "pt"}}
        )
        self._stream.seek(0)
        self._stream.write(struct.pack("<Q", _HEADER_BYTES) + header.ljust(_HEADER_BYTES))
        self._stream.truncate(_DATA_START + self.num_bytes)
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.close()

    def close(self) -> None:
        """Close the file as it is."""
        self._stream.close()


def _header_entry(entry: Entry) -> dict[str, Any]:
    return {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [entry.offset, entry.offset + entry.num_bytes]}


def _header_cost(name: str) -> int:
    """An upper bound of a tensor's bytes in the header: its name, escaped, and up to 120 for numbers and keys."""
    return len(canonical_json(name)) + 120
