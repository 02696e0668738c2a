"""Methods × quantizers: every method over every code, with plain and with doubly quantized constants, and over FP8."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from graftline.adapters.base import AdapterLayer, AttachContext, LayerPlan, Method, dense_weight
from graftline.adapters.methods import METHODS
from graftline.weights.quant.blockwise import quantize
from graftline.weights.quant.linear import QuantLinear
from graftline.weights.quant.scheme import CODE_BITS, FP8, Scheme
from tests.sections import adapter_section

NUM_INPUTS, NUM_OUTPUTS, RANK = 40, 24, 3  # 40 is no multiple of a block, so that blocks cross rows
METHODS_OVER_QUANTIZED = [m for m in METHODS.values() if m.layer is not None and not m.on_quantized]
SCHEMES = [*(Scheme(code, 64, double) for code, double in itertools.product(CODE_BITS, (False, True))), FP8]
MATRIX = [
    pytest.param(m, s, id=f"{m.name}-{s.code}{'-double' if s.double_quant else ''}")
    for m in METHODS_OVER_QUANTIZED
    for s in SCHEMES
]


def make_layers(method: Method, scheme: Scheme) -> tuple[AdapterLayer, AdapterLayer]:
    """The method over a quantized layer, and over a dense layer with the dequantized weight; equal adapters."""
    torch.manual_seed(0)
    source = nn.Linear(NUM_INPUTS, NUM_OUTPUTS)
    quantized = QuantLinear(quantize(source.weight.detach(), scheme), source.bias.detach())
    dense = nn.Linear(NUM_INPUTS, NUM_OUTPUTS)
    with torch.no_grad():
        dense.weight.copy_(quantized.dense_weight())
        dense.bias.copy_(source.bias)
    initial = {"A": torch.randn(RANK, NUM_INPUTS), "B": torch.randn(NUM_OUTPUTS, RANK)}
    spec = adapter_section(method.name, rank=RANK)
    wrapped = []
    for layer in (quantized, dense.requires_grad_(False)):
        context = AttachContext(
            spec=spec,
            generator=torch.Generator().manual_seed(0),
            shared=method.share({"layer": layer}, spec),
            initial={"layer": initial} if method.is_paired else {},
        )
        plan = LayerPlan(name="layer", rank=RANK, scale=method.scale(6.0, RANK), dropout=0.0)
        wrapped.append(method.layer(layer, plan, context))
    generator = torch.Generator().manual_seed(1)
    for name in wrapped[0].trained:
        noise = 0.3 * torch.randn(getattr(wrapped[0], name).shape, generator=generator)
        with torch.no_grad():
            for each in wrapped:
                getattr(each, name).add_(noise)
    return wrapped[0], wrapped[1]


def test_the_matrix_is_whole():
    assert len(MATRIX) == 8 * (3 * 2 + 1)


@pytest.mark.parametrize(("method", "scheme"), MATRIX)
def test_output_and_all_gradients_are_those_over_the_dequantized_weight(method, scheme):
    quantized, dense = make_layers(method, scheme)
    weights = torch.randn(2, 5, NUM_OUTPUTS)
    results = []
    for layer in (quantized, dense):
        x = torch.randn(2, 5, NUM_INPUTS, generator=torch.Generator().manual_seed(2)).requires_grad_()
        y = layer(x)
        (y * weights).sum().backward()
        results.append([y, x.grad, *(getattr(layer, name).grad for name in layer.trained)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert [name for name, p in quantized.named_parameters() if p.requires_grad] == list(quantized.trained)


@pytest.mark.parametrize(("method", "scheme"), MATRIX)
def test_no_dense_weight_is_kept_between_forward_and_backward(method, scheme):
    quantized, _ = make_layers(method, scheme)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        quantized(torch.randn(3, NUM_INPUTS, requires_grad=True))
    assert all(tensor.shape not in ((NUM_OUTPUTS, NUM_INPUTS), (NUM_INPUTS, NUM_OUTPUTS)) for tensor in kept)


@pytest.mark.parametrize(("method", "scheme"), [case for case in MATRIX if case.values[0].fold])
def test_folding_takes_the_dequantized_weight(method, scheme):
    quantized, _ = make_layers(method, scheme)
    shared = {name: getattr(quantized, name) for name in method.shared_disk_names}
    weight = method.fold(dense_weight(quantized.base), {**quantized.state(), **shared}, quantized.plan.scale)
    x = torch.randn(3, NUM_INPUTS)
    expected = quantized.eval()(x)
    torch.testing.assert_close(nn.functional.linear(x, weight, quantized.bias), expected, rtol=1e-5, atol=1e-5)
