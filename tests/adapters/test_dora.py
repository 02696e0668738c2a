import pytest
import torch
from torch import nn

from graftline.adapters import dora
from graftline.adapters.base import AttachContext, LayerPlan, dense_weight
from graftline.adapters.dora import METHOD, DoraLayer, row_norms, row_squares
from graftline.settings.model import Adapter
from tests.adapters.stand_in import RoundedLinear

NUM_INPUTS, NUM_OUTPUTS, RANK = 7, 5, 2


def make_layer(*, dropout: float = 0.0, quantized: bool = False, dtype: torch.dtype = torch.float64) -> DoraLayer:
    torch.manual_seed(0)
    base: nn.Module = nn.Linear(NUM_INPUTS, NUM_OUTPUTS)
    if quantized:
        base = RoundedLinear(base)
    context = AttachContext(spec=Adapter(method="dora", rank=RANK), generator=torch.Generator().manual_seed(0))
    plan = LayerPlan(name="layer", rank=RANK, scale=1.5, dropout=dropout)
    layer = DoraLayer(base.requires_grad_(False), plan, context)
    nn.init.normal_(layer.B)
    nn.init.uniform_(layer.m, 0.5, 2.0)
    return layer.to(dtype)


def naive(layer: DoraLayer, x: torch.Tensor, dropped: torch.Tensor, *, detach: bool = True) -> torch.Tensor:
    """The formula with the norm of the materialized W + s·B·A."""
    weight = dense_weight(layer.base).to(x.dtype)
    norm = torch.linalg.norm(weight + layer.plan.scale * layer.B @ layer.A, dim=1)
    gain = layer.m / (norm.detach() if detach else norm)
    undropped = x @ weight.T
    update = layer.plan.scale * (dropped @ layer.A.T @ layer.B.T)
    return undropped + layer.bias + (gain - 1) * (dropped @ weight.T) + gain * update


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_output_and_gradients_equal_autograd_of_the_formula(dropout, quantized):
    layer = make_layer(dropout=dropout, quantized=quantized).train()
    x = torch.randn(6, NUM_INPUTS, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(6, NUM_OUTPUTS, dtype=torch.float64)

    def run_naive(x):
        return naive(layer, x, nn.functional.dropout(x, dropout) if dropout else x)

    results = []
    for run in (layer, run_naive):
        torch.manual_seed(5)
        y = run(x)
        results.append([y, *torch.autograd.grad((y * weights).sum(), (x, layer.A, layer.B, layer.m))])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_the_norm_is_detached_in_full():
    layer = make_layer()
    x = torch.randn(6, NUM_INPUTS, dtype=torch.float64)
    ours = torch.autograd.grad(layer(x).square().sum(), layer.B)[0]
    undetached = torch.autograd.grad(naive(layer, x, x, detach=False).square().sum(), layer.B)[0]
    assert not torch.allclose(ours, undetached, rtol=0.05)


def test_a_trained_bias_gets_its_gradient():
    layer = make_layer()
    layer.base.bias.requires_grad_(True)
    layer(torch.randn(4, NUM_INPUTS, dtype=torch.float64)).sum().backward()
    torch.testing.assert_close(layer.base.bias.grad, torch.full((NUM_OUTPUTS,), 4.0, dtype=torch.float64))


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-4)])
def test_row_norms_equal_those_of_the_materialized_sum(dtype, within):
    torch.manual_seed(0)
    weight, A, B = torch.randn(300, 200).to(dtype), torch.randn(4, 200), 0.2 * torch.randn(300, 4)
    expected = torch.linalg.norm((weight.double() + 0.7 * B.double() @ A.double()), dim=1)
    found = row_norms(weight, row_squares(weight), A, B, 0.7)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=within, atol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("quantized", [False, True])
def test_autocast_gives_the_same_within_its_precision(dropout, quantized):
    layer = make_layer(dropout=dropout, quantized=quantized, dtype=torch.float32).train()
    x = torch.randn(6, NUM_INPUTS)
    torch.manual_seed(5)
    expected = layer(x)
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.1)
    y.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in (layer.A, layer.B, layer.m))


def test_row_squares_of_half_precision_weights_are_cast_in_pieces(monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(33, 20).bfloat16()
    whole = row_squares(weight)
    monkeypatch.setattr(dora, "_MAX_CAST_ELEMENTS", 100)
    torch.testing.assert_close(row_squares(weight), whole)


def test_the_norm_never_materializes_a_second_weight():
    layer = make_layer(dtype=torch.float32)
    big = nn.Linear(512, 768, bias=False).requires_grad_(False)
    context = AttachContext(spec=Adapter(method="dora", rank=RANK), generator=torch.Generator().manual_seed(0))
    layer = DoraLayer(big, LayerPlan(name="layer", rank=RANK, scale=1.0, dropout=0.0), context).train()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        layer(torch.randn(4, 512, requires_grad=True)).sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 512 * 768 * 4 / 8


def test_in_evaluation_the_norm_is_worked_out_once_and_anew_after_training(monkeypatch):
    layer = make_layer().eval()
    calls = []
    monkeypatch.setattr(dora, "row_norms", lambda *args: calls.append(1) or row_norms(*args))
    x = torch.randn(3, NUM_INPUTS, dtype=torch.float64)
    before = layer(x)
    layer(x)
    assert len(calls) == 1
    layer.train()
    with torch.no_grad():
        layer.B.mul_(2)
    layer.eval()
    assert not torch.equal(layer(x), before)
    torch.testing.assert_close(layer(x), naive(layer, x, x))
    assert len(calls) == 2


def test_a_zero_row_of_the_weight_gives_finite_values():
    layer = make_layer(dtype=torch.float32)
    with torch.no_grad():
        layer.base.weight[1].zero_()
    fresh = DoraLayer(
        layer.base,
        layer.plan,
        AttachContext(spec=Adapter(method="dora", rank=RANK), generator=torch.Generator().manual_seed(0)),
    )
    y = fresh(torch.randn(3, NUM_INPUTS))
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(p.grad).all() for p in (fresh.A, fresh.B, fresh.m))


def test_its_share_of_a_7_billion_model_is_a_fiftieth_of_a_percent():
    # Llama-2-7B, all linear layers: 32 × (4 of 4096 → 4096, 2 of 4096 → 11008, 1 of 11008 → 4096), METHODS §0.
    shapes = [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]
    lora = sum(16 * (i + o) for i, o in shapes) * 32
    with_magnitudes = sum(METHOD.count(i, o, 16) for i, o in shapes) * 32
    assert lora == 39_976_960
    assert with_magnitudes - lora == 1_359_872
    assert 100 * (with_magnitudes - lora) / 6.738e9 == pytest.approx(0.020, abs=0.0005)


def load_state_of_the_layer(layer: DoraLayer, other: DoraLayer) -> None:
    layer.load_state({name: tensor.clone() for name, tensor in other.state().items()})


def load_state_dict(layer: DoraLayer, other: DoraLayer) -> None:
    layer.load_state_dict(other.state_dict())


def load_state_dict_by_assignment(layer: DoraLayer, other: DoraLayer) -> None:
    layer.load_state_dict({name: tensor.clone() for name, tensor in other.state_dict().items()}, assign=True)


def load_through_a_parent(layer: DoraLayer, other: DoraLayer) -> None:
    nn.Sequential(layer).load_state_dict(nn.Sequential(other).state_dict())


def copy_in_place(layer: DoraLayer, other: DoraLayer) -> None:
    with torch.no_grad():
        for mine, theirs in zip(layer.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)


def replace_parameters(layer: DoraLayer, other: DoraLayer) -> None:
    layer.A, layer.B, layer.m = (nn.Parameter(p.detach().clone()) for p in (other.A, other.B, other.m))


@pytest.mark.parametrize(
    "change",
    [load_state_of_the_layer, load_state_dict, load_state_dict_by_assignment, load_through_a_parent, copy_in_place,
     replace_parameters],
)  # fmt: skip
def test_in_evaluation_the_kept_norm_goes_with_the_values_that_it_was_made_of(change):
    layer, other = make_layer().eval(), make_layer().eval()
    with torch.no_grad():
        other.A.mul_(3.0)
        other.B.add_(1.0)
    x = torch.randn(6, NUM_INPUTS, dtype=torch.float64)
    before = layer(x)  # keeps the norm
    change(layer, other)
    torch.testing.assert_close(layer(x), other(x))
    assert not torch.allclose(layer(x), before)


def test_another_base_weight_gets_its_own_norm():
    layer = make_layer().eval()
    x = torch.randn(6, NUM_INPUTS, dtype=torch.float64)
    layer(x)
    with torch.no_grad():
        layer.base.weight.mul_(5.0)
    torch.testing.assert_close(layer(x), naive(layer, x, x))
    layer.train()
    with torch.no_grad():
        layer.base.weight.add_(1.0)
    torch.testing.assert_close(layer(x), naive(layer, x, x))


def test_an_optimizer_step_in_evaluation_mode_is_seen():
    layer = make_layer().eval()
    x = torch.randn(6, NUM_INPUTS, dtype=torch.float64)
    layer(x).square().sum().backward()
    torch.optim.SGD([layer.A, layer.B], lr=0.1).step()
    torch.testing.assert_close(layer(x), naive(layer, x, x))


def test_the_norm_is_computed_once_in_evaluation_and_anew_in_inference_mode(monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr(dora, "row_norms", lambda *given: calls.append(1) or row_norms(*given))
    layer = make_layer().eval()
    x = torch.randn(6, NUM_INPUTS, dtype=torch.float64)
    for _ in range(3):
        layer(x)
    assert len(calls) == 1
    with torch.inference_mode():
        made_there = make_layer().eval()
        torch.testing.assert_close(made_there(x), layer(x))
        made_there.A.mul_(2.0)
        torch.testing.assert_close(made_there(x), naive(made_there, x, x))
