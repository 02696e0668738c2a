"""What every adapter method must do. A method joins by being in `METHODS`."""

import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from graftline.adapters.attach import adapter_layers, attach, attachment_of, trainable_parameters
from graftline.adapters.base import AttachContext, LayerPlan, Method, dense_weight, features_of
from graftline.adapters.methods import METHODS
from tests.adapters.stand_in import LINEAR_LAYERS, RoundedLinear, make_model, make_tokens, quantize
from tests.sections import adapter_section

RANK, ALPHA = 3, 6.0
IDENTITY_TOLERANCE = {"pissa": 2e-5, "dora": 2e-6}
"""PiSSA moves a part of the weight into the adapter, DoRA adds the bias after the product: both are the identity up to
rounding. All others are exactly the identity."""
NEEDS_INITIAL = [method.name for method in METHODS.values() if method.is_paired]
"""Methods that start from factors a quantized base was made with: only base and factors together are step 0
(tests/adapters/test_pissa.py)."""
ALONE = [method for method in METHODS.values() if method.name not in NEEDS_INITIAL]
WRAPPING = [method for method in METHODS.values() if method.layer is not None]


def make_layer(kind: str) -> nn.Module:
    torch.manual_seed(1)
    if kind == "conv1d":
        layer: nn.Module = Conv1D(10, 12)
        nn.init.normal_(layer.bias)
    elif kind == "quantized":
        layer = RoundedLinear(nn.Linear(12, 10))
    elif kind == "embedding":
        layer = nn.Embedding(12, 10)
    else:
        layer = nn.Linear(12, 10, bias=kind == "linear")
    return layer.requires_grad_(False)


def wrap(method: Method, kind: str, *, dropout: float = 0.0):
    """One wrapped layer whose trained tensors were moved away from their initial values, and an input of it."""
    layer = make_layer(kind)
    num_inputs, _ = features_of(layer)
    spec = adapter_section(method.name, rank=RANK, alpha=ALPHA)
    initial = {}
    if method.name in NEEDS_INITIAL:
        drawn = METHODS["lora"].layer(make_layer(kind), plan_of(method, dropout), context_of(spec, {}, {}))
        initial = {"layer": {name: t + 0.1 for name, t in drawn.state().items()}}
    context = context_of(spec, method.share({"layer": layer}, spec), initial)
    wrapped = method.layer(layer, plan_of(method, dropout), context)
    wrapped.take_over()
    x = torch.randint(0, num_inputs, (4, 5)) if kind == "embedding" else torch.randn(4, 5, num_inputs)
    return wrapped, x, context


def plan_of(method: Method, dropout: float) -> LayerPlan:
    return LayerPlan(name="layer", rank=RANK, scale=method.scale(ALPHA, RANK), dropout=dropout)


def context_of(spec, shared, initial) -> AttachContext:
    return AttachContext(spec=spec, generator=torch.Generator().manual_seed(0), shared=shared, initial=initial)


def disturb(wrapped: nn.Module, *, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def kinds_for(method: Method) -> list[str]:
    kinds = ["linear", "linear-no-bias", "conv1d", "quantized"]
    return kinds + (["embedding"] if method.embedding_disk_names else [])


CASES = [
    pytest.param(m, k, id=f"{m.name}-{k}")
    for m in WRAPPING
    for k in kinds_for(m)
    if not (m.on_quantized and k == "quantized")
]


def test_the_table_holds_every_method_of_the_project():
    assert list(METHODS) == EXPECTED_METHODS


EXPECTED_METHODS = [
    "full", "houlsby", "pfeiffer", "lora", "rslora", "dora", "pissa", "qpissa", "vera", "loftq"
]  # fmt: skip


@pytest.mark.parametrize(("method", "kind"), [c for c in CASES if c.values[0].name not in NEEDS_INITIAL])
def test_step_0_is_the_base(method, kind):
    wrapped, x, _ = wrap(method, kind)
    base = make_layer(kind)
    torch.testing.assert_close(wrapped(x), base(x), rtol=0, atol=IDENTITY_TOLERANCE.get(method.name, 0))


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_the_base_gets_no_gradient_and_every_trained_tensor_does(method, kind):
    wrapped, x, _ = wrap(method, kind)
    disturb(wrapped)
    wrapped(x).square().sum().backward()
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert trained == set(method.disk_names) == set(wrapped.trained)
    for name, parameter in wrapped.named_parameters():
        if name in trained:
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize(("method", "kind"), [c for c in CASES if c.values[0].fold is not None])
def test_folded_weight_computes_what_the_layer_computes(method, kind):
    wrapped, x, context = wrap(method, kind, dropout=0.5)
    disturb(wrapped)
    wrapped.eval()
    weight_OI = method.fold(
        dense_weight(wrapped.base).float(), {**wrapped.state(), **context.shared}, wrapped.plan.scale
    )
    if kind == "embedding":
        folded = nn.functional.embedding(x, weight_OI.T)
    else:
        folded = nn.functional.linear(x, weight_OI, wrapped.bias)
    torch.testing.assert_close(wrapped(x), folded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    # DoRA's norm is not differentiated, that of its fold is: tests/adapters/test_dora.py has its naive formula.
    ("method", "kind"),
    [c for c in CASES if c.values[0].fold is not None and c.values[0].name != "dora"],
)
def test_gradients_equal_those_of_the_folded_weight(method, kind):
    wrapped, x, context = wrap(method, kind)
    disturb(wrapped)
    trained = {name: getattr(wrapped, name) for name in wrapped.trained}
    weight_OI = method.fold(dense_weight(wrapped.base).float(), {**context.shared, **trained}, wrapped.plan.scale)
    table = kind == "embedding"
    y = nn.functional.embedding(x, weight_OI.T) if table else nn.functional.linear(x, weight_OI, wrapped.bias)
    expected = torch.autograd.grad(y.sin().sum(), list(trained.values()))
    found = torch.autograd.grad(wrapped(x).sin().sum(), list(trained.values()))
    for ours, naive in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "kind"), [c for c in CASES if c.values[1] != "embedding"])
def test_autocast_gives_the_same_within_its_precision_and_all_gradients(method, kind):
    wrapped, x, _ = wrap(method, kind, dropout=0.25)
    disturb(wrapped)
    wrapped.eval()
    expected = wrapped(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = wrapped(x)
        trained = wrapped.train()(x)
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.1)
    trained.float().square().sum().backward()
    assert all(torch.isfinite(getattr(wrapped, name).grad).all() for name in wrapped.trained)


@pytest.mark.parametrize(("method", "kind"), [c for c in CASES if c.values[0].factors is not None])
def test_serving_factors_compute_what_the_layer_computes(method, kind):
    wrapped, x, context = wrap(method, kind)
    disturb(wrapped)
    weight_OI = dense_weight(wrapped.base).float()
    A_IR, B_RO, gain_O = method.factors({**wrapped.state(), **context.shared}, wrapped.plan.scale, lambda: weight_OI)
    one_hot = nn.functional.one_hot(x, weight_OI.shape[1]).float() if kind == "embedding" else x
    y = (one_hot @ weight_OI.T + one_hot @ A_IR @ B_RO) * (1.0 if gain_O is None else gain_O)
    bias = wrapped.bias
    torch.testing.assert_close(wrapped(x), y if bias is None else y + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [m for m in WRAPPING if m.fold is None], ids=lambda m: m.name)
def test_a_method_without_fold_says_why(method):
    assert len(method.fold_refusal) > 20


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_state_survives_a_round_trip(method, kind):
    wrapped, x, _ = wrap(method, kind)
    disturb(wrapped)
    state = {name: tensor.clone() for name, tensor in wrapped.state().items()}
    other, _, _ = wrap(method, kind)
    disturb(other, seed=4)
    assert not torch.equal(other(x), wrapped(x))
    other.load_state(state)
    assert torch.equal(other(x), wrapped(x))


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_parameter_count_is_the_formula(method, kind):
    wrapped, _, _ = wrap(method, kind)
    counted = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert counted == method.count(*features_of(wrapped.base), RANK)


@pytest.mark.parametrize(("method", "kind"), [c for c in CASES if c.values[1] != "embedding"])
def test_dropout_acts_in_training_only_and_keeps_the_mean(method, kind):
    wrapped, x, _ = wrap(method, kind, dropout=0.5)
    disturb(wrapped)
    wrapped.eval()
    expected = wrapped(x)
    assert torch.equal(wrapped(x), expected)
    wrapped.train()
    torch.manual_seed(0)
    samples = wrapped(x.repeat(600, 1, 1, 1)).detach()  # each of the 600 copies has a mask of its own
    assert not torch.equal(samples[0], samples[1])
    if method.fold is not None:  # linear in its input, so the mean over masks is the undropped output
        standard_error = samples.std(0) / math.sqrt(len(samples))
        assert ((samples.mean(0) - expected).abs() <= 5 * standard_error + 1e-5).all()


@pytest.mark.parametrize(("method", "kind"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_has_the_precision_of_a_half_precision_base_and_the_adapter_stays_fp32(method, kind, dtype):
    wrapped, x, _ = wrap(method, kind)
    disturb(wrapped)
    expected = wrapped(x)
    halved = wrapped.base.to(dtype) and wrapped
    y = halved(x if kind == "embedding" else x.to(dtype))
    assert y.dtype == dtype
    assert {p.dtype for p in wrapped.parameters() if p.requires_grad} == {torch.float32}
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("architecture", LINEAR_LAYERS)
@pytest.mark.parametrize("method", ALONE, ids=lambda m: m.name)
def test_on_a_whole_model_step_0_is_the_base_and_only_the_adapter_learns(method, architecture):
    model, tokens = make_model(architecture), make_tokens()
    expected = model(tokens).logits
    coverage = attach(model, adapter_section(method.name, rank=RANK, alpha=ALPHA), seed=0)
    tolerance = 1e-3 if method.name in IDENTITY_TOLERANCE else 0
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=tolerance)
    assert coverage.num_trained == sum(p.numel() for p in trainable_parameters(model).values())
    if not method.sublayers and method.layer is not None:
        assert len(attachment_of(model).layer_names) == LINEAR_LAYERS[architecture]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(trainable_parameters(model))


@pytest.mark.parametrize("method", [m for m in ALONE if m.layer and not m.on_quantized], ids=lambda m: m.name)
def test_works_over_quantized_layers(method):
    model, tokens = quantize(make_model("llama")), make_tokens()
    expected = model(tokens).logits
    attach(model, adapter_section(method.name, rank=RANK, alpha=ALPHA), seed=0)
    assert torch.equal(model(tokens).logits, expected)
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in trainable_parameters(model).values())
    assert any(isinstance(layer.base, RoundedLinear) for layer in adapter_layers(model).values())
