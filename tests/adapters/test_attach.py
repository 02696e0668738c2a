import pytest
import torch
from torch import nn

from graftline.adapters.attach import adapter_layers, attach, attachment_of, plan_layers, trainable_parameters
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
