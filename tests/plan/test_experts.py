"""Bases with experts: what their settings cannot be, and what their adapters and their memory are planned as."""

from pathlib import Path
from typing import Any, get_args

import pytest
from transformers import MixtralConfig, PretrainedConfig

from graftline.errors import AdapterError, ConfigError
from graftline.export.targets import Target, check_planned
from graftline.plan.experts import check_experts
from graftline.plan.memory import Workload, plan_memory, what_would_fit
from graftline.plan.served import check_served, layer_names, own_server
from graftline.plan.stage_memory import stage_memory
from graftline.plan.trace import StepShape
from graftline.settings.model import Adapter
from graftline.weights.quant.folder import quantize_folder
from graftline.weights.quant.linear import load_model
from graftline.weights.quant.scheme import Scheme
from tests.adapters.stand_in import make_experts
from tests.plan.test_stage_memory import held_bytes, made
from tests.sections import quantize_section

LORA: dict[str, Any] = {"method": "lora", "rank": 4, "targets": ["q_proj", "experts.gate_up_proj", "experts.down_proj"]}


def config_of() -> PretrainedConfig:
    config: PretrainedConfig = make_experts("mixtral").config
    config.architectures = ["MixtralForCausalLM"]
    return config


def test_adapters_experts_and_states_are_counted_exactly() -> None:
    for scheme in (None, Scheme("nf4", 64, True)):
        work = Workload(
            adapter=Adapter(**LORA),
            shape=StepShape(rows=2, tokens=16, supervised_tokens=8),
            quantization=scheme,
            optimizer="adamw",
            device="cpu",
        )
        plan = plan_memory(config_of(), work)
        parts = {part.name: part.expected for part in plan.parts}
        # R·(I + O) for q_proj and for each of four experts, in each of two blocks
        assert plan.num_trained == 2 * 4 * ((32 + 32) + 4 * (32 + 96) + 4 * (48 + 32))
        assert parts["adapters"] == 4 * plan.num_trained
        assert parts["optimizer"] == 8 * plan.num_trained
        attention, experts = 2 * (2 * 32 * 32 + 2 * 16 * 32), 2 * 4 * 3 * 32 * 48
        dense = plan.num_parameters - (0 if scheme is None else attention + experts)
        assert parts["weights"] == 4 * dense + (0 if scheme is None else (attention + experts) / 2)


@pytest.mark.parametrize(("kind", "of_down"), [("shared_a", 48 + 4 * 32), ("shared_outer", 4 * 48 + 32)])
def test_shared_factors_are_counted_once(kind: str, of_down: int) -> None:
    shape = StepShape(rows=2, tokens=16, supervised_tokens=8)
    adapter = Adapter(**LORA | {"experts": kind})
    work = Workload(adapter=adapter, shape=shape, quantization=None, optimizer="adamw", device="cpu")
    plan = plan_memory(config_of(), work)
    parts = {part.name: part.expected for part in plan.parts}
    assert plan.num_trained == 2 * 4 * ((32 + 32) + (32 + 4 * 96) + of_down)
    assert (parts["adapters"], parts["optimizer"]) == (4 * plan.num_trained, 8 * plan.num_trained)


def test_sharding_is_not_advised() -> None:
    adapter, shape = Adapter(**LORA), StepShape(rows=1, tokens=16, supervised_tokens=8)
    work = Workload(
        adapter=adapter, shape=shape, quantization=None, optimizer="adamw", device="cpu", processes=2, may_shard=True
    )
    changes = what_would_fit(config_of(), work, limit_bytes=0)
    assert [change.what for change in changes] == ["train.gradient_checkpointing: true", "quantize.method: nf4"]


def test_a_quantized_base_holds_what_is_planned(tmp_path: Path) -> None:
    make_experts("mixtral").save_pretrained(tmp_path / "dense")
    quantize_folder(tmp_path / "dense", tmp_path / "nf4", quantize=quantize_section())
    pipeline = made(adapter=LORA, quantize={"method": "nf4"})
    stages = {one.stage: one for one in stage_memory(pipeline, config_of(), "cpu")}
    adapter = 4 * 2 * 4 * ((32 + 32) + 4 * (32 + 96) + 4 * (48 + 32))
    assert stages["package"].low - adapter == pytest.approx(held_bytes(load_model(tmp_path / "nf4")), rel=0.02)
    # The largest tensor of the folder is the embedding or an expert's matrix, not all experts' together.
    assert stages["init"].low == 2.0 * 96 * 32 * pipeline_bytes(pipeline)


def pipeline_bytes(pipeline: Any) -> int:
    return {"float32": 4, "bfloat16": 2, "float16": 2}[pipeline.base.dtype]


def test_servers_say_what_they_do_not_load() -> None:
    spec = Adapter(**LORA)
    layers = layer_names(config_of(), spec)
    (reason,) = check_planned(spec, layers, is_quantized=False, target="vllm").reasons
    assert "vLLM leaves out adapters on experts (model.layers.0.mlp.experts.gate_up_proj)" in reason
    for target in get_args(Target)[1:]:
        assert check_planned(spec, layers, is_quantized=False, target=target).loads
        (reason,) = check_planned(spec, layers, is_quantized=True, target=target).reasons
        assert "transformers does not load its base" in reason
    (own,) = own_server(config_of(), spec, layers).reasons
    assert "does not compute MixtralForCausalLM" in own
    attention = spec.replace(targets=("q_proj",))
    assert check_planned(attention, layer_names(config_of(), attention), is_quantized=False, target="vllm").loads


@pytest.mark.parametrize("server", ["vllm", "graftline"])
def test_a_server_that_cannot_take_the_base_is_refused_before_anything_is_spent(server: str) -> None:
    attention = LORA | {"targets": ["q_proj"]}
    pipeline = made(base={"served_by": server}, adapter=attention, quantize={"method": "nf4"})
    with pytest.raises(ConfigError, match=rf"base.served_by: {server} was given; .* cannot serve this"):
        check_served(pipeline, config_of())
    if server == "vllm":
        check_served(made(base={"served_by": server}, adapter=attention), config_of())
        with pytest.raises(ConfigError, match="leaves out adapters on experts"):
            check_served(made(base={"served_by": server}, adapter=LORA), config_of())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"sharding": True, "processes": 2}}, r"MixtralForCausalLM, .*train.sharding: true .*write false"),
        (
            {
                "quantize": {"method": "nf4", "init": {"kind": "loftq", "weighting": "full"}},
                "adapter": {"method": "loftq"},
            },
            r"each expert reads other rows.*weighting: none",
        ),
        ({"quantize": {"method": "nf4"}, "package": {"merged": True, "requantize": True}}, r"package.requantize: true"),
    ],
)
def test_settings_that_are_not_for_experts_are_refused_before_anything_is_spent(
    sections: dict[str, Any], message: str
) -> None:
    adapter = LORA | {"targets": ["q_proj"]} | sections.get("adapter", {})
    pipeline = made(**sections | {"adapter": adapter})
    with pytest.raises(ConfigError, match=message):
        check_experts(pipeline, config_of())


def test_targets_are_checked_too_and_other_bases_are_not_looked_at() -> None:
    with pytest.raises(AdapterError, match="has experts"):
        check_experts(made(adapter={"method": "lora", "rank": 4}), config_of())
    config = MixtralConfig()
    config.architectures = ["LlamaForCausalLM"]
    check_experts(made(train={"sharding": True, "processes": 2}), config)
    with pytest.raises(ConfigError, match="experts: shared_a was given, and the base, a LlamaForCausalLM, has no exp"):
        check_experts(made(adapter=LORA | {"experts": "shared_a"}), config)
