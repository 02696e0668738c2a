import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

import graftline.adapters.attach as attach_module
from graftline.adapters import lora
from graftline.adapters.attach import adapter_layers, attach, attachment_of, plan_layers, trainable_parameters
from graftline.adapters.methods import METHODS
from graftline.errors import AdapterError
from graftline.settings.model import Adapter
from tests.adapters.stand_in import make_model, make_tokens, quantize
from tests.sections import adapter_section


def names(model: nn.Module) -> set[str]:
    return set(adapter_layers(model))


def spec(**values) -> Adapter:
    return adapter_section(**{"method": "lora", "rank": 3} | values)


def test_suffixes_a_regular_expression_and_all_linear_choose_layers():
    model = make_model("llama")
    attach(model, spec(targets=("q_proj", "mlp.up_proj")), seed=0)
    expected = {f"model.layers.{i}.{leaf}" for i in (0, 1) for leaf in ("self_attn.q_proj", "mlp.up_proj")}
    assert names(model) == expected
    model = make_model("llama")
    attach(model, spec(targets=r".*layers\.1\..*_proj"), seed=0)
    assert len(names(model)) == 7
    model = make_model("llama-untied")
    attach(model, spec(), seed=0)
    assert "lm_head" not in names(model)


def test_coverage_counts_modules_and_trained_parameters_of_each_target():
    coverage = attach(make_model("llama"), spec(targets=("q_proj", "k_proj")), seed=0)
    assert [(row.target, len(row.modules), row.num_parameters) for row in coverage.rows] == [
        ("q_proj", 2, 2 * 3 * (32 + 32)),
        ("k_proj", 2, 2 * 3 * (32 + 16)),  # grouped-query attention: 2 of 4 heads
    ]
    assert coverage.num_trained == 384 + 288
    assert coverage.table().splitlines()[-1].startswith("total         4")
    assert "672 (3.61 % of 18,592)" in coverage.table()


def test_a_quantized_base_counts_as_its_dense_weights():
    dense, quantized = make_model("llama"), quantize(make_model("llama"))
    assert attach(dense, spec(), seed=0).num_base == attach(quantized, spec(), seed=0).num_base


def test_a_layer_that_two_targets_name_is_adapted_and_counted_once():
    coverage = attach(make_model("llama"), spec(targets=("q_proj", "layers.0.self_attn.q_proj")), seed=0)
    assert [len(row.modules) for row in coverage.rows] == [2, 0]


NOTHING = [
    (
        {"targets": ("q_pro",)},
        r"targets 'q_pro' match no layer of LlamaForCausalLM. Did you mean q_proj .*q_proj \(2\)",
    ),
    ({"targets": ("q_proj", "c_attn")}, "targets 'c_attn' match no layer"),
    ({"targets": r"layers\.9\..*"}, "match no layer"),
    ({"targets": ("mlp",)}, "target model.layers.0.mlp is a LlamaMLP, no linear layer.*gate_proj, up_proj, down_proj"),
    ({"targets": ("input_layernorm",)}, "is a LlamaRMSNorm, no linear layer"),
    ({"targets": ("embed_tokens",), "method": "vera"}, "embed_tokens is an embedding; vera takes linear layers only"),
    ({"rank": 17}, r"k_proj: rank 17 is above min\(input features 32, output features 16\)"),
    ({"rank_pattern": {"k_proj": 20}}, "k_proj: rank 20 is above"),
    ({"modules_to_save": ("score",)}, "no module of LlamaForCausalLM is called 'score'"),
    ({"modules_to_save": ("q_proj",)}, "q_proj is also a target"),
    ({"modules_to_save": ("mlp",)}, "mlp is also a target"),
    ({"method": "lorra"}, "no adapter method 'lorra'; did you mean lora"),
    ({"method": "vera", "rank_pattern": {"q_proj": 2}}, "share one projection"),
]


@pytest.mark.parametrize(("values", "message"), NOTHING)
def test_what_cannot_be_attached_is_refused_and_the_model_stays_as_it_was(values, message):
    model = make_model("llama")
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(AdapterError, match=message):
        attach(model, spec(**values), seed=0)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "method", [method.name for method in METHODS.values() if method.layer and not method.is_paired]
)
def test_a_layer_that_cannot_be_wrapped_leaves_all_others_as_they_were(method: str, monkeypatch: pytest.MonkeyPatch):
    """The last of several layers is at fault; the first ones were made by then."""
    model = make_model("llama")
    before, types = weights_of(model), [type(module) for module in model.modules()]
    plan = attach_module._plan

    def plan_with_a_rank_that_the_last_layer_lacks(name, layer, spec, method):
        made = plan(name, layer, spec, method)
        return dataclasses.replace(made, rank=-1) if name == "model.layers.1.mlp.down_proj" else made

    monkeypatch.setattr(attach_module, "_plan", plan_with_a_rank_that_the_last_layer_lacks)
    with pytest.raises((RuntimeError, AdapterError)):
        attach(model, spec(method=method), seed=0)
    assert [type(module) for module in model.modules()] == types
    assert all(parameter.requires_grad for parameter in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    monkeypatch.undo()
    attach(model, spec(method=method), seed=0)


def test_initial_factors_that_are_not_finite_leave_the_base_of_pissa_as_it_was():
    model = make_model("llama")
    layers = plan_layers(model, spec(method="pissa"))
    initial = {}
    for name in layers:
        num_outputs, num_inputs = model.get_submodule(name).weight.shape
        initial[name] = {"A": torch.ones(3, num_inputs), "B": torch.ones(num_outputs, 3)}
    initial["model.layers.1.mlp.down_proj"]["B"][0, 0] = torch.nan
    before = weights_of(model)
    with pytest.raises(AdapterError, match="NaN or infinite"):
        attach(model, spec(method="pissa"), seed=0, initial=initial)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Normed(nn.Embedding):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(super().forward(x), dim=-1)


class OwnInit(nn.Linear):
    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__(num_inputs, num_outputs, bias=False)


class OwnConv1D(Conv1D):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


def patched() -> nn.Module:
    layer = nn.Linear(32, 32)
    layer.forward = lambda x: 3 * x  # as hooks of other libraries do
    return layer


OTHERS = [
    (lambda: Doubled(32, 32), "is a Doubled, which does not compute what Linear computes"),
    (lambda: OwnConv1D(32, 32), "is a OwnConv1D, which does not compute what Conv1D computes"),
    (patched, "is a Linear, which does not compute what Linear computes"),
    (
        lambda: parametrizations.weight_norm(nn.Linear(32, 32)),
        "is a ParametrizedLinear, whose weight is computed from other tensors",
    ),
    (
        lambda: parametrizations.spectral_norm(nn.Linear(32, 32)),
        "is a ParametrizedLinear, whose weight is computed from other tensors",
    ),
]


@pytest.mark.parametrize(("make", "message"), OTHERS)
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj",)])
def test_a_layer_that_only_looks_like_a_linear_one_is_refused_by_name(make, message, targets):
    model = make_model("llama")
    model.model.layers[1].self_attn.q_proj = make()
    with pytest.raises(AdapterError, match=rf"target model\.layers\.1\.self_attn\.q_proj {message}"):
        attach(model, spec(targets=targets), seed=0)


def test_an_embedding_that_does_more_than_look_up_is_refused_and_its_parent_with_another_constructor_is_not():
    model = make_model("llama")
    model.model.embed_tokens = Normed(96, 32)
    with pytest.raises(AdapterError, match="embed_tokens is a Normed, which does not compute what Embedding computes"):
        attach(model, spec(targets=("embed_tokens",)), seed=0)
    model.model.layers[0].self_attn.q_proj = OwnInit(32, 32)
    attach(model, spec(targets=("q_proj",), modules_to_save=("embed_tokens",)), seed=0)


def test_dora_on_an_embedding_that_scales_is_refused_and_lora_is_not():
    with pytest.raises(AdapterError, match=r"embed_tokens is a GemmaTextScaledWordEmbedding.*defined in two ways"):
        attach(make_model("gemma"), spec(method="dora", targets=("embed_tokens",)), seed=0)
    attach(make_model("gemma"), spec(targets=("embed_tokens",)), seed=0)


@pytest.mark.parametrize("architecture", ["gemma", "gemma2", "llama", "gpt2"])
def test_an_adapted_embedding_computes_what_the_folded_table_computes(architecture):
    target = {"gpt2": "wte"}.get(architecture, "embed_tokens")
    model, tokens = make_model(architecture), make_tokens()
    attach(model, spec(targets=(target,)), seed=0)
    (layer,) = adapter_layers(model).values()
    torch.nn.init.normal_(layer.A, std=0.3)
    adapted = model(tokens).logits
    folded = make_model(architecture)
    table = folded.get_input_embeddings()
    head = folded.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    with torch.no_grad():
        table.weight.copy_(lora.fold(table.weight.T, layer.state(), layer.plan.scale).T)
    torch.testing.assert_close(adapted, folded(tokens).logits, rtol=1e-4, atol=1e-4)


def test_quantized_weights_and_biases_cannot_be_trained_themselves():
    with pytest.raises(AdapterError, match="is quantized and cannot be trained in full"):
        attach(quantize(make_model("llama")), spec(method="full"), seed=0)
    model = quantize(make_model("llama-untied"))
    for module in model.modules():
        bias = getattr(module, "bias", None)
        if type(module).__name__ == "RoundedLinear" and bias is not None:
            del module.bias
            module.register_buffer("bias", bias.detach())
    with pytest.raises(AdapterError, match="the bias of a quantized layer cannot be trained"):
        attach(model, spec(bias="adapter_only"), seed=0)


class Experts(nn.Module):
    """A mixture of experts as transformers keeps it: all experts in one 3-D weight."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.zeros(4, 8, 16))


def test_experts_kept_as_a_3d_weight_are_refused_by_name():
    with pytest.raises(AdapterError, match=r"experts.gate_up_proj keeps its experts as one 3-D weight \(4, 8, 16\)"):
        attach(Experts(), spec(), seed=0)
    with pytest.raises(
        AdapterError, match=r"'gate_up_proj' is the 3-D expert weight experts.gate_up_proj \(4, 8, 16\)"
    ):
        attach(Experts(), spec(targets=("gate_up_proj",)), seed=0)
    attach(Experts(), spec(targets=("q_proj",)), seed=0)


def test_one_adapter_a_model():
    model = make_model("llama")
    with pytest.raises(AdapterError, match="has no adapter"):
        attachment_of(model)
    attach(model, spec(), seed=0)
    with pytest.raises(AdapterError, match="already has an adapter"):
        attach(model, spec(), seed=0)


def test_the_seed_decides_the_initial_values_and_nothing_else_does():
    states = []
    for seed, noise in ((5, 0), (5, 1), (6, 0)):
        model = make_model("llama")
        torch.manual_seed(noise)
        attach(model, spec(), seed=seed)
        states.append(adapter_layers(model)["model.layers.0.self_attn.q_proj"].A)
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize(("bias", "expected"), [("none", 0), ("adapter_only", 2), ("all", 8)])
def test_biases_of_the_base_are_trained_as_asked(bias, expected):
    model = make_model("llama-untied")  # q, k, v and o have biases in two layers
    coverage = attach(model, spec(targets=("q_proj",), bias=bias), seed=0)
    trained = [name for name in trainable_parameters(model) if name.endswith("bias")]
    assert len(trained) == expected
    if bias == "all":
        assert coverage.rows[-1].target == "biases of other layers"
    model(make_tokens(), labels=make_tokens()).loss.backward()
    assert all(parameter.grad is not None for parameter in trainable_parameters(model).values())


@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_a_saved_module_that_shares_its_weight_is_trained_without_the_other(saved):
    model = make_model("llama")
    other = "embed_tokens" if saved == "lm_head" else "lm_head"
    attach(model, spec(targets=("q_proj",), modules_to_save=(saved,)), seed=0)
    trained = [name for name in trainable_parameters(model) if saved in name]
    assert len(trained) == 1
    assert not any(other in name for name in trainable_parameters(model))


def test_an_embedding_that_shares_its_weight_is_adapted_without_the_head():
    model, tokens = make_model("llama"), make_tokens()
    attach(model, spec(targets=("embed_tokens",)), seed=0)
    hidden = torch.randn(2, 32)
    before = model.lm_head(hidden)
    with torch.no_grad():
        adapter_layers(model)["model.embed_tokens"].A.normal_()
    assert torch.equal(model.lm_head(hidden), before)
    assert model.get_input_embeddings().weight is model.lm_head.weight
    model(tokens, labels=tokens).loss.backward()


def test_the_adapter_is_fp32_on_a_half_precision_base():
    model = make_model("llama", dtype=torch.bfloat16)
    attach(model, spec(), seed=0)
    assert {parameter.dtype for parameter in trainable_parameters(model).values()} == {torch.float32}
    assert model(make_tokens()).logits.dtype == torch.bfloat16


def test_layers_can_be_planned_without_weights_as_they_will_be_attached():
    settings = {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 2.0}}
    with torch.device("meta"):
        skeleton = make_model("llama")
    plans = plan_layers(skeleton, spec(**settings))
    model = make_model("llama")
    attach(model, spec(**settings), seed=0)
    assert plans == {name: layer.plan for name, layer in adapter_layers(model).items()}
    assert plans["model.layers.0.self_attn.q_proj"].rank == 5
    assert plans["model.layers.0.self_attn.v_proj"].scale == pytest.approx(2 / 3)
    with pytest.raises(AdapterError, match="rank 17 is above"):
        plan_layers(skeleton, spec(rank=17))
