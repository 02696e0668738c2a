import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from graftline.errors import CheckpointError
from graftline.weights.reader import read_header


def write_raw(file: Path, header: Any, data: bytes = b"", *, claimed: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw) if claimed is None else claimed) + raw + data)
    return file


def entry(begin: int, end: int, dtype: str = "U8", shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def test_header_of_a_file_by_the_safetensors_library_is_read(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(2, 3, dtype=torch.bfloat16), "a": torch.zeros(4), "scalar": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = {t.name: t for t in read_header(tmp_path / "x.safetensors")}
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()
    }


DAMAGED: dict[str, tuple[Any, bytes, int | None, str]] = {
    "empty header length": (b"", b"", 0, "not JSON"),
    "length beyond the file": ({}, b"", 10**6, "claims 1000000 bytes"),
    "length of 2^64 - 1": ({}, b"", 2**64 - 1, "claims"),
    "not JSON": (b"{nonsense", b"", None, "not JSON"),
    "not UTF-8": (b"\xff\xfe{}", b"", None, "not JSON"),
    "a list": ([], b"", None, "not a JSON object"),
    "deeply nested": (b"[" * 100_000, b"", None, "not JSON"),
    "name twice": (b'{"a": 1, "a": 2}', b"", None, "occurs twice"),
    "entry is a number": ({"a": 1}, b"", None, "exactly dtype, shape and data_offsets"),
    "key missing": ({"a": {"dtype": "U8", "shape": [0]}}, b"", None, "exactly dtype"),
    "unknown dtype": ({"a": entry(0, 1, dtype="Q4")}, b"x", None, "dtype 'Q4'"),
    "dtype is a list": ({"a": entry(0, 1) | {"dtype": []}}, b"x", None, "has dtype"),
    "negative size": ({"a": entry(0, 1, shape=[-1])}, b"x", None, "whole numbers"),
    "size is true": ({"a": entry(0, 1, shape=[True])}, b"x", None, "whole numbers"),
    "offsets backwards": ({"a": {"dtype": "U8", "shape": [0], "data_offsets": [2, 1]}}, b"xx", None, "has -1 bytes"),
    "three offsets": ({"a": entry(0, 1) | {"data_offsets": [0, 1, 2]}}, b"x", None, "whole numbers"),
    "shape larger than bytes": ({"a": entry(0, 4, "F32", [2])}, b"xxxx", None, "has 4 bytes"),
    "huge shape": ({"a": entry(0, 4, "F32", [2**60, 2**60])}, b"xxxx", None, "has 4 bytes"),
    "overlap": ({"a": entry(0, 2), "b": entry(1, 3)}, b"xxx", None, "overlaps"),
    "hole": ({"a": entry(0, 1), "b": entry(2, 3)}, b"xxx", None, "hole"),
    "data cut short": ({"a": entry(0, 4)}, b"xx", None, "describes 4 bytes of data, the file holds 2"),
    "data left over": ({"a": entry(0, 1)}, b"xx", None, "describes 1 bytes of data, the file holds 2"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_header_is_refused_with_the_file_named(tmp_path: Path, case: str) -> None:
    header, data, claimed, message = DAMAGED[case]
    file = write_raw(tmp_path / "broken.safetensors", header, data, claimed=claimed)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(file)
    assert "broken.safetensors" in str(caught.value)


@pytest.mark.parametrize("size", [0, 3, 7])
def test_file_shorter_than_its_length_field_is_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\0" * size)
    with pytest.raises(CheckpointError, match=f"it holds {size} bytes"):
        read_header(tmp_path / "x.safetensors")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_header(tmp_path / "x.safetensors")


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(min_value=0, max_value=300), flip=st.integers(min_value=0, max_value=300))
def test_any_cut_or_flipped_byte_is_read_right_or_refused(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    save_file({"a": torch.arange(8, dtype=torch.float32), "b": torch.ones(3, dtype=torch.uint8)}, file)
    data = bytearray(file.read_bytes())
    data[flip % len(data)] ^= 0xFF
    data = data[: len(data) - cut % len(data)]
    file.write_bytes(data)
    try:
        tensors = read_header(file)
    except CheckpointError:
        return
    assert all(t.offset + t.num_bytes <= len(data) for t in tensors)
