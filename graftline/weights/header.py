"""The header of a safetensors file, parsed and checked before any byte of it is used.

Format (https://github.com/huggingface/safetensors#format): 8 bytes N (little-endian), N bytes of JSON that map each
tensor's name to ``{"dtype", "shape", "data_offsets": [begin, end]}``, then the data. The offsets count from the end of
the header; together they cover the data without holes or overlaps. Files come from outside, so nothing here is assumed.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graftline.errors import CheckpointError

# As the reference implementation: a longer header is an attack or damage, not a model.
_MAX_HEADER_BYTES = 100_000_000

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is. ``offset`` is in bytes from the start of ``file``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    num_bytes: int

    @property
    def dtype_name(self) -> str:
        """The dtype as safetensors spells it, for example ``BF16``."""
        return DTYPE_NAMES[self.dtype]


def read_header(file: Path) -> list[TensorInfo]:
    """Tensors of a safetensors file in the order of their bytes.

    Raises:
        CheckpointError: the file is missing, truncated, too long, or its header lies; the file is named.
    """
    header, data_offset, num_data_bytes = _read_json(file)
    header.pop("__metadata__", None)
    tensors = sorted(
        (_tensor(file, name, entry, data_offset) for name, entry in header.items()),
        key=lambda t: (t.offset, t.num_bytes),
    )
    position = data_offset
    for tensor in tensors:
        if tensor.offset != position:
            kind = "overlaps the tensor before it" if tensor.offset < position else "leaves a hole before it"
            raise _bad(file, f"tensor {tensor.name!r} {kind} (starts at byte {tensor.offset}, expected {position})")
        position += tensor.num_bytes
    if position - data_offset != num_data_bytes:
        raise _bad(
            file, f"its header describes {position - data_offset} bytes of data, the file holds {num_data_bytes}"
        )
    return tensors


def _read_json(file: Path) -> tuple[dict[str, Any], int, int]:
    """The header as a JSON object, the offset of the data, the number of bytes of data."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise _bad(file, f"it holds {size} bytes, a safetensors file has at least 8")
            (num_header_bytes,) = struct.unpack("<Q", prefix)
            if num_header_bytes > min(size - 8, _MAX_HEADER_BYTES):
                raise _bad(file, f"its header claims {num_header_bytes} bytes, {size - 8} are there")
            raw = stream.read(num_header_bytes)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {file}: {error.strerror or error}; a safetensors file was expected there"
        ) from error
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _bad(file, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _bad(file, "its header is not a JSON object")
    return header, 8 + num_header_bytes, size - 8 - num_header_bytes


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, refusing a name that occurs twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _tensor(file: Path, name: str, entry: Any, data_offset: int) -> TensorInfo:
    """One entry of the header, every field checked."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _bad(file, f"the entry of tensor {name!r} does not have exactly dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise _bad(file, f"tensor {name!r} has dtype {entry['dtype']!r}; known are {', '.join(DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise _bad(
            file,
            f"tensor {name!r} has shape {shape!r} and data_offsets {offsets!r}; whole numbers from 0 up were expected",
        )
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise _bad(file, f"tensor {name!r} of shape {shape} and dtype {entry['dtype']} has {end - begin} bytes")
    return TensorInfo(name, dtype, tuple(shape), file, data_offset + begin, end - begin)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _bad(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{file} is not a valid safetensors file: {reason}; fetch or write it again")
