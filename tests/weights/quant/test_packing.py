import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftline.weights.quant.blockwise import pack, packed_bytes, unpack


@given(bits=st.sampled_from([2, 3, 4]), count=st.integers(0, 100), seed=st.integers(0, 10))
@settings(max_examples=60, deadline=None)
def test_unpack_inverts_pack_for_any_length(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(2**bits, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (packed_bytes(count, bits),)
    assert torch.equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (4, [0x1, 0x2, 0xF], [0x12, 0xF7]),
        (2, [3, 0, 1, 2, 3], [0b11000110, 0b11010101]),
        (3, [7, 0, 1, 2, 3, 4, 5, 6], [0b11100000, 0b10100111, 0b00101110]),
    ],
)
def test_bytes_are_the_documented_layout(bits: int, codes: list[int], packed: list[int]) -> None:
    fill = {4: 7, 2: 1, 3: 0}[bits]
    assert pack(torch.tensor(codes, dtype=torch.uint8), bits, fill=fill).tolist() == packed


@pytest.mark.parametrize(
    ("bits", "count", "expected"), [(4, 5, 3), (3, 8, 3), (3, 9, 6), (2, 4, 1), (2, 5, 2), (2, 0, 0)]
)
def test_packed_size(bits: int, count: int, expected: int) -> None:
    assert packed_bytes(count, bits) == expected
