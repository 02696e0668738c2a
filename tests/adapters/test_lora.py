import math

import pytest
import torch
from torch import nn

from graftline.adapters.base import AttachContext, LayerPlan
from graftline.adapters.lora import LORA, LoraLayer
from graftline.adapters.methods import METHODS
from graftline.settings.model import Adapter


def make_layer(
    *,
    num_inputs: int = 6,
    num_outputs: int = 5,
    rank: int = 2,
    scale: float = 1.5,
    dropout: float = 0.0,
    dtype=torch.float64,
):
    torch.manual_seed(0)
    base = nn.Linear(num_inputs, num_outputs).requires_grad_(False)
    context = AttachContext(spec=Adapter(method="lora", rank=rank), generator=torch.Generator().manual_seed(0))
    layer = LoraLayer(base, LayerPlan(name="layer", rank=rank, scale=scale, dropout=dropout), context).to(dtype)
    nn.init.normal_(layer.B)
    return layer


def test_gradients_pass_the_finite_difference_check():
    layer = make_layer()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def run(x, A, B):
        layer.A, layer.B = nn.Parameter(A), nn.Parameter(B)
        return torch.func.functional_call(layer, {"A": A, "B": B}, (x,))

    assert torch.autograd.gradcheck(
        run, (x, layer.A.detach().clone().requires_grad_(), layer.B.detach().clone().requires_grad_())
    )


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_equal_autograd_of_the_formula(dropout):
    layer = make_layer(dropout=dropout).train()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, 5, dtype=torch.float64)

    def naive(x):
        dropped = nn.functional.dropout(x.reshape(-1, 6), dropout).view_as(x) if dropout else x
        return layer.base(x) + layer.plan.scale * (dropped @ layer.A.T @ layer.B.T)

    results = []
    for run in (layer, naive):
        torch.manual_seed(5)
        y = run(x)
        results.append([y, *torch.autograd.grad((y * weights).sum(), (x, layer.A, layer.B))])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_trained_bias_of_the_base_gets_its_gradient():
    layer = make_layer()
    layer.base.bias.requires_grad_(True)
    layer(torch.randn(4, 6, dtype=torch.float64)).sum().backward()
    torch.testing.assert_close(layer.base.bias.grad, torch.full((5,), 4.0, dtype=torch.float64))


def test_frozen_input_costs_no_gradient_and_changes_nothing_else():
    layer = make_layer()
    x = torch.randn(4, 6, dtype=torch.float64)
    grads = [torch.autograd.grad(layer(v).square().sum(), (layer.A, layer.B)) for v in (x, x.clone().requires_grad_())]
    for without, with_input in zip(*grads, strict=True):
        assert torch.equal(without, with_input)


def test_backward_keeps_nothing_of_full_size_but_the_input():
    layer = make_layer(num_inputs=64, num_outputs=48, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x = torch.randn(100, 64, requires_grad=True)
        layer(x)
    own = {layer.A.data_ptr(), layer.B.data_ptr(), x.data_ptr()}
    assert sum(t.numel() for t in kept if t.data_ptr() not in own) == 100 * 2  # x Aᵀ, (T, R)


def test_non_contiguous_and_empty_inputs():
    layer = make_layer()
    x = torch.randn(6, 4, dtype=torch.float64).T
    torch.testing.assert_close(layer(x), layer(x.contiguous()))
    assert layer(torch.zeros(0, 6, dtype=torch.float64)).shape == (0, 5)


def test_autocast_gives_the_same_within_its_precision():
    layer = make_layer(dtype=torch.float32)
    x = torch.randn(3, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


def test_survives_gradient_checkpointing():
    layer = make_layer()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    plain = torch.autograd.grad(layer(x).square().sum(), (x, layer.A, layer.B))
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    for ours, expected in zip(torch.autograd.grad(y.square().sum(), (x, layer.A, layer.B)), plain, strict=True):
        assert torch.equal(ours, expected)


def test_ten_thousand_square_at_rank_8_trains_160_000_parameters():
    assert LORA.count(10_000, 10_000, 8) == 160_000
    assert round(100 * (1 - 160_000 / 10_000**2), 2) == 99.84


def test_initial_a_is_uniform_within_its_bound():
    layer = make_layer(num_inputs=400, num_outputs=5, rank=5, dtype=torch.float32)
    bound = 1 / math.sqrt(400)
    assert layer.A.abs().max() <= bound
    assert layer.A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize(("method", "exponent"), [("lora", -0.5), ("rslora", 0.0)])
def test_gradient_of_b_at_step_0_falls_with_rank_for_lora_and_not_for_rslora(method, exponent):
    # ‖∂L/∂B‖ ∝ s ‖A x‖ ∝ s √R (METHODS §1.3): 1/√R for s = alpha/R, constant for s = alpha/√R.
    ranks, norms = (4, 16, 64, 256), []
    for rank in ranks:
        scale = METHODS[method].scale(16.0, rank)
        layer = make_layer(num_inputs=512, num_outputs=256, rank=rank, scale=scale, dtype=torch.float32)
        nn.init.zeros_(layer.B)
        x, weights = torch.randn(4096, 512), torch.randn(4096, 256)
        norms.append(torch.autograd.grad((layer(x) * weights).sum(), layer.B)[0].norm().item())
    slope = (math.log(norms[-1]) - math.log(norms[0])) / (math.log(ranks[-1]) - math.log(ranks[0]))
    assert slope == pytest.approx(exponent, abs=0.03)


def test_lora_and_rslora_coincide_at_rank_1():
    assert METHODS["lora"].scale(16.0, 1) == METHODS["rslora"].scale(16.0, 1) == 16.0


def test_dropout_acts_under_autocast_in_training_and_only_there():
    """Autocast takes another way through the layer than fp32 does."""
    layer = make_layer(dropout=0.5, dtype=torch.float32)
    x = torch.ones(64, 6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        trained = layer.train()(x)
        again = layer(x)
        evaluated = layer.eval()(x)
    assert not torch.equal(trained, again)
    assert (evaluated == evaluated[0]).all()
    # Of 6 inputs each is dropped half of the time: 64 equal rows give many different ones.
    assert len(trained.unique(dim=0)) > 20
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        dropped = torch.nn.functional.dropout(x, 0.5)
        expected = layer.base(x) + layer.plan.scale * (dropped @ layer.A.T @ layer.B.T)
    torch.testing.assert_close(trained.float(), expected.float(), rtol=0.02, atol=0.05)
