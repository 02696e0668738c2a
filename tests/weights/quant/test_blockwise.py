import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from torch import Tensor

from graftline.weights.quant.blockwise import (
    NestedConstants,
    constants,
    dequantize,
    quantize,
    quantize_constants,
    unpack,
)
from graftline.weights.quant.scheme import Scheme, code_table

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Short last blocks, odd lengths, blocks across rows, one row, one element, more than one piece.
SHAPES = [(64, 64), (3, 5), (7, 33), (1, 1), (1, 200), (130, 77), (96, 129), (600, 512)]


def weight(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    if shape[0] > 50:
        w[1] = 0  # a block of zeros
        w[2, 0] = 7.0  # an outlier
    return w.to(dtype)


def reference_dequantize(packed: Tensor, absmax: Tensor, block_size: int, shape: tuple[int, ...]) -> Tensor:
    """bitsandbytes' generic kernel, uncompiled: its fast CPU kernel is wrong where a row is shorter than a block."""
    compute = getattr(_dequantize_4bit_compute, "__wrapped__", _dequantize_4bit_compute)
    out: Tensor = compute(packed.view(-1), absmax, code_table("nf4"), block_size, shape, torch.float32)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_size", [32, 64, 128, 4096])
def test_nf4_codes_and_constants_are_bit_equal_to_bitsandbytes(
    shape: tuple[int, ...], dtype: torch.dtype, block_size: int
) -> None:
    w = weight(shape, dtype)
    ours = quantize(w, Scheme("nf4", block_size, double_quant=False))
    packed, state = bnb.quantize_4bit(w, blocksize=block_size, quant_type="nf4", compress_statistics=False)
    assert torch.equal(ours.packed, packed.view(-1))
    assert isinstance(ours.absmax, Tensor)
    assert torch.equal(ours.absmax, state.absmax)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_double_quantization_is_bit_equal_to_bitsandbytes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    w = weight(shape, dtype)
    ours = quantize(w, Scheme("nf4", 64, double_quant=True))
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(ours.packed, packed.view(-1))
    assert isinstance(ours.absmax, NestedConstants)
    assert torch.equal(ours.absmax.codes, state.absmax.view(-1))
    assert torch.equal(ours.absmax.absmax, state.state2.absmax)
    assert torch.equal(ours.absmax.offset, state.offset)


@pytest.mark.parametrize("values", [torch.zeros(5), torch.full((300,), 3.0), torch.rand(70_000) ** 6, torch.rand(257)])
def test_constants_of_any_distribution_are_bit_equal_to_bitsandbytes(values: Tensor) -> None:
    nested = quantize_constants(values)
    codes, state = bnb.quantize_blockwise(values - values.mean(), blocksize=256)
    assert torch.equal(nested.codes, codes)
    assert torch.equal(nested.absmax, state.absmax)
    assert torch.equal(constants(nested), bnb.dequantize_blockwise(codes, state) + values.mean())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64), (96, 128), (600, 512)])
def test_dequantization_is_bit_equal_to_bitsandbytes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    w = weight(shape, dtype)
    packed, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    assert torch.equal(dequantize(quantize(w, Scheme("nf4", 64, True)), dtype), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("block_size", [64, 128, 4096])
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantization_of_any_shape_is_bit_equal_to_the_generic_kernel(
    shape: tuple[int, ...], block_size: int
) -> None:
    ours = quantize(weight(shape, torch.float32), Scheme("nf4", block_size, double_quant=False))
    assert isinstance(ours.absmax, Tensor)
    assert torch.equal(dequantize(ours), reference_dequantize(ours.packed, ours.absmax, block_size, shape))


@pytest.mark.parametrize("code", ["nf4", "nf3", "nf2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_code_is_the_nearest_value_of_its_table(code: str, shape: tuple[int, ...]) -> None:
    w = weight(shape, torch.float32)
    quantized = quantize(w, Scheme(code, 64, double_quant=False))
    assert isinstance(quantized.absmax, Tensor)
    blocks = torch.nn.functional.pad(w.reshape(-1), (0, -w.numel() % 64)).view(-1, 64)
    absmax = blocks.abs().amax(1, keepdim=True).clamp(min=1e-38)
    distance = (blocks / absmax).reshape(-1, 1).sub(code_table(code)).abs()[: w.numel()]
    codes = unpack(quantized.packed, quantized.scheme.bits, w.numel()).long()
    chosen = distance.gather(1, codes.unsqueeze(1)).squeeze(1)
    assert (chosen <= distance.amin(1) + 1e-6).all()
    assert torch.allclose(
        dequantize(quantized),
        (code_table(code)[codes].view(shape)) * absmax.expand(-1, 64).reshape(-1)[: w.numel()].view(shape),
    )


@pytest.mark.parametrize(("code", "error"), [("nf4", 0.0920), ("nf3", 0.202), ("nf2", 0.563)])
def test_error_on_normal_weights_is_the_known_one(code: str, error: float) -> None:
    w = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(1))
    restored = dequantize(quantize(w, Scheme(code, 64, True)))
    assert ((w - restored).norm() / w.norm()).item() == pytest.approx(error, rel=0.01)


def test_quantizing_dequantized_nf4_again_gives_the_same_codes() -> None:
    first = quantize(weight((130, 77), torch.float32), Scheme("nf4", 64, double_quant=False))
    again = quantize(dequantize(first), first.scheme)
    assert torch.equal(first.packed, again.packed)
