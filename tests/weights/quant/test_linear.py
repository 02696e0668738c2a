from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

from graftline.weights.quant import kernels, linear
from graftline.weights.quant.blockwise import dequantize, quantize
from graftline.weights.quant.linear import QuantLinear
from graftline.weights.quant.scheme import FP8, Scheme

SCHEMES = [FP8, *(Scheme(code, 64, double) for code in ("nf4", "nf3", "nf2") for double in (True, False))]


def make(
    scheme: Scheme = Scheme("nf4", 64, True), *, bias: bool = True, seed: int = 0
) -> tuple[QuantLinear, nn.Linear]:
    """A quantized layer, and nn.Linear with the dequantized weight."""
    torch.manual_seed(seed)
    dense = nn.Linear(96, 64, bias=bias)
    quantized = quantize(dense.weight.detach(), scheme)
    dense.weight.data = dequantize(quantized)
    return QuantLinear(quantized, dense.bias.detach().clone() if bias else None), dense


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradient_equal_a_dense_layer_with_the_dequantized_weight(scheme: Scheme, bias: bool) -> None:
    layer, dense = make(scheme, bias=bias)
    x = torch.randn(2, 5, 96, requires_grad=True)
    y, expected = layer(x), dense(x)
    assert torch.allclose(y, expected, atol=1e-6)
    grad = torch.randn_like(y)
    (ours,) = torch.autograd.grad(y, x, grad)
    (theirs,) = torch.autograd.grad(expected, x, grad)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_gradient_check_passes_in_double_precision() -> None:
    layer, _ = make()
    assert torch.autograd.gradcheck(layer, (torch.randn(3, 96, dtype=torch.float64, requires_grad=True),))


def test_nothing_of_the_size_of_the_dense_weight_is_saved_for_backward() -> None:
    saved: list[Tensor] = []
    layer, _ = make()
    x = torch.randn(2, 96, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert all(t.numel() < 96 * 64 for t in saved)


def test_forward_and_backward_see_the_same_weight_in_half_precision() -> None:
    layer, _ = make(bias=False)
    x = torch.eye(96, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    (grad,) = torch.autograd.grad(y, x, torch.eye(96, 64, dtype=torch.bfloat16))
    assert torch.equal(y.detach().T, layer.dense_weight(torch.bfloat16))
    assert torch.equal(grad[:64], layer.dense_weight(torch.bfloat16))


def test_output_and_gradient_equal_those_of_bitsandbytes() -> None:
    torch.manual_seed(0)
    w = torch.randn(64, 128)
    theirs = Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    theirs.weight = Params4bit(w.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True).to("cpu")
    ours = QuantLinear(quantize(w, Scheme("nf4", 64, True)))
    x = torch.randn(3, 128, requires_grad=True)
    y, expected = ours(x), theirs(x)
    assert torch.allclose(y, expected, atol=1e-5)
    (a,), (b,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x)
    assert torch.allclose(a, b, atol=1e-5)


def test_kernels_of_bitsandbytes_give_the_same_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU twin of the CUDA path: the same calls reach bitsandbytes' CPU kernels."""
    for double in (True, False):
        torch.manual_seed(0)
        bias = torch.randn(64)
        layer = QuantLinear(quantize(torch.randn(64, 128), Scheme("nf4", 64, double)), bias)
        x = torch.randn(3, 128, requires_grad=True)
        expected, weight = layer(x), layer.dense_weight()
        with monkeypatch.context() as patch:
            patch.setattr(linear, "has_cuda_kernel", lambda _: True)
            patch.setattr(kernels, "has_cuda_kernel", lambda _: True)
            assert torch.equal(layer.dense_weight(), weight)
            assert torch.allclose(layer(x), expected, atol=1e-5)
            assert torch.allclose(layer(x.detach()), expected, atol=1e-5)
            assert not layer(x.detach()).requires_grad


def test_the_kernel_for_a_few_tokens_is_used_for_a_few_tokens_without_a_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, asked = QuantLinear(quantize(torch.randn(64, 128), Scheme("nf4", 64, True))), list[int]()
    x, limit = torch.randn(3, 128), linear._DECODED_TOKENS
    many = torch.randn(limit + 1, 128)
    learned = x.clone().requires_grad_()
    expected = torch.autograd.grad(layer(learned).sum(), learned)[0]
    real = linear.cuda_linear

    def counted(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        asked.append(len(x))
        return real(x, *rest)

    monkeypatch.setattr(linear, "cuda_linear", counted)
    monkeypatch.setattr(linear, "has_cuda_kernel", lambda _: True)
    monkeypatch.setattr(kernels, "has_cuda_kernel", lambda _: True)
    for given in (x, many[:limit], many):
        layer(given)
    assert asked == [3, limit]
    assert torch.allclose(torch.autograd.grad(layer(learned).sum(), learned)[0], expected, atol=1e-5)
    with torch.no_grad():
        layer(learned)
    assert asked == [3, limit, 3]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_layer_on_cuda_equals_the_layer_on_the_cpu() -> None:
    layer, _ = make()
    x = torch.randn(3, 96, requires_grad=True)
    expected = layer(x)
    layer = layer.cuda()
    assert torch.equal(layer.dense_weight().cpu(), dequantize(make()[0].quantized))
    assert torch.allclose(layer(x.cuda()).cpu(), expected, atol=1e-4)
    assert torch.allclose(layer(x.detach().cuda()).cpu(), expected, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_casting_the_module_does_not_round_the_constants(scheme: Scheme) -> None:
    layer, _ = make(scheme)
    before = layer.dense_weight()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.dense_weight(), before)
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16


def test_state_dict_round_trip_keeps_the_weight() -> None:
    layer, other = make(seed=0)[0], make(seed=1)[0]
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.dense_weight(), layer.dense_weight())


def test_autocast_decides_the_dtype() -> None:
    layer, _ = make()
    x = torch.randn(3, 96, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_nothing_is_trainable() -> None:
    assert not list(make()[0].parameters())
