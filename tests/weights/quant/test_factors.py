import pytest
import torch
from torch import Tensor

from graftline.errors import QuantizeError
from graftline.weights.quant.blockwise import dequantize, quantize
from graftline.weights.quant.low_rank import FactorSettings, Method, QuantizedPair, make_pair
from graftline.weights.quant.scheme import Scheme

CODES = ["nf4", "nf3", "nf2"]


def make(
    W: Tensor, code: str = "nf4", *, method: Method = "loftq", rank: int = 8, scale: float = 1.0, steps: int = 5
) -> QuantizedPair:
    scheme, generator = Scheme(code, 64, double_quant=False), torch.Generator().manual_seed(0)
    return make_pair(W, scheme, FactorSettings(rank, scale), method=method, steps=steps, generator=generator)


def weight(shape: tuple[int, int] = (192, 128)) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(shape, generator=generator) * 0.02 + torch.randn(shape[0], 1, generator=generator) * 0.01


def relative(difference: Tensor, W: Tensor) -> float:
    return (difference.norm() / W.norm()).item()


def reference_loftq(W: Tensor, code: str, rank: int, steps: int) -> list[float]:
    """The published procedure with an exact SVD: the error after each step."""
    low, errors = torch.zeros_like(W), []
    for _ in range(steps):
        q = dequantize(quantize(W - low, Scheme(code, 64, double_quant=False)))
        U, S, V = torch.linalg.svd(W - q, full_matrices=False)
        low = (U[:, :rank] * S[:rank]) @ V[:rank]
        errors.append(relative(W - q - low, W))
    return errors


@pytest.mark.parametrize("code", CODES)
def test_loftq_is_within_one_percent_of_the_procedure_with_exact_svd(code: str) -> None:
    pair, expected = make(weight(), code), reference_loftq(weight(), code, 8, 5)
    assert all(found <= 1.01 * exact for found, exact in zip(pair.step_errors, expected, strict=True))
    assert pair.error == min(pair.step_errors)


@pytest.mark.parametrize("method", ["loftq", "qpissa"])
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("scale", [1.0, 2.0, 0.25])
def test_reported_errors_are_those_of_the_pair_for_every_scale(code: str, method: Method, scale: float) -> None:
    W = weight()
    pair = make(W, code, method=method, scale=scale)
    q = dequantize(pair.quantized)
    assert pair.error == pytest.approx(relative(W - q - scale * pair.B_OR @ pair.A_RI, W), rel=1e-3)
    assert pair.error_alone == pytest.approx(relative(W - q, W), rel=1e-4)
    plain = dequantize(quantize(W, Scheme(code, 64, double_quant=False)))
    assert pair.error < relative(W - plain, W)


def test_scale_divides_the_factors_evenly() -> None:
    one, four = make(weight(), scale=1.0), make(weight(), scale=4.0)
    assert torch.allclose(one.A_RI, 2 * four.A_RI, atol=1e-4)
    assert torch.allclose(one.B_OR, 2 * four.B_OR, atol=1e-4)


def test_qpissa_factors_after_one_step_are_the_principal_part() -> None:
    W = weight()
    pair = make(W, method="qpissa", steps=1)
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    best = (U[:, :8] * S[:8]) @ V[:8]
    assert relative(W - pair.B_OR @ pair.A_RI, W) <= 1.01 * relative(W - best, W)
    residual = quantize(W - pair.B_OR @ pair.A_RI, pair.quantized.scheme)
    assert torch.equal(residual.packed, pair.quantized.packed)


def test_best_step_is_kept_when_a_later_one_is_worse() -> None:
    for seed in range(30):
        W = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
        pair = make(W, "nf2", rank=32, steps=8)
        if pair.step_errors[-1] > min(pair.step_errors):
            q = dequantize(pair.quantized)
            assert relative(W - q - pair.B_OR @ pair.A_RI, W) == pytest.approx(min(pair.step_errors), rel=1e-3)
            return
    pytest.fail("no seed had an error that rises: the test shows nothing")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_taken_as_they_are(dtype: torch.dtype) -> None:
    W = weight().to(dtype)
    pair, exact = make(W), make(W.float())
    assert torch.equal(pair.quantized.packed, exact.quantized.packed)
    assert pair.A_RI.dtype == torch.float32


@pytest.mark.parametrize("method", ["loftq", "qpissa"])
def test_weight_of_zeros_gives_no_error(method: Method) -> None:
    pair = make(torch.zeros(128, 64), method=method)
    assert pair.error == pair.error_alone == 0
    assert torch.equal(pair.B_OR @ pair.A_RI, torch.zeros(128, 64))


@pytest.mark.parametrize(
    ("rank", "steps", "message"), [(0, 1, "rank 0"), (65, 1, "expected 1 to 64"), (8, 0, "0 steps")]
)
def test_rank_and_steps_out_of_range_are_refused(rank: int, steps: int, message: str) -> None:
    with pytest.raises(QuantizeError, match=message):
        make(weight((128, 64)), rank=rank, steps=steps)
