import pytest
import torch

from graftline.weights.cast import is_finite
from graftline.weights.quant.blockwise import dequantize, quantize
from graftline.weights.quant.report import bits_per_weight, measure, share_of_zeros
from graftline.weights.quant.scheme import Scheme


@pytest.mark.parametrize("shape", [(3, 5), (600, 512)])
def test_error_and_zeros_are_those_of_the_dequantized_weight(shape: tuple[int, int]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    quantized = quantize(w, Scheme("nf3", 64, True))
    dense = dequantize(quantized)
    found = measure(w, quantized)
    assert found.error == pytest.approx(((w - dense).norm() / w.norm()).item(), rel=1e-5)
    assert found.zeros == pytest.approx((dense == 0).float().mean().item())
    assert found.zeros == share_of_zeros(quantized)
    assert bits_per_weight(quantized) == 8 * quantized.num_bytes / w.numel()


def test_weight_of_zeros_has_no_error() -> None:
    zeros = torch.zeros(4, 64)
    assert measure(zeros, quantize(zeros, Scheme("nf4", 64, True))).error == 0
    assert measure(zeros, quantize(zeros, Scheme("nf4", 64, True))).zeros == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_found(value: float, dtype: torch.dtype) -> None:
    w = torch.randn(1000).to(dtype)
    assert is_finite(w)
    w[777] = value
    assert not is_finite(w)


def test_integers_and_empty_tensors_are_finite() -> None:
    assert is_finite(torch.arange(3))
    assert is_finite(torch.empty(0))
