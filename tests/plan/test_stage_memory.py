"""Memory of the stages besides training: planned from a configuration, and refused before anything is loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import GPT2Config, LlamaForCausalLM

from graftline.errors import GraftlineError
from graftline.plan import stage_memory as module
from graftline.plan.stage_memory import StageMemory, check_stage, stage_memory
from graftline.settings import Adapter, Pipeline, parse_config
from graftline.train.devices import DeviceKind
from graftline.weights.quant.folder import quantize_folder
from graftline.weights.quant.linear import load_model
from tests.sections import quantize_section
from tests.tiny import tiny_llama_config
from tests.workflow.tiny_project import tiny_settings

CONFIG = tiny_llama_config()
DEVICES: tuple[DeviceKind, ...] = ("cpu", "cuda")


def made(**sections: dict[str, Any]) -> Pipeline:
    document = tiny_settings()
    for name, values in sections.items():
        document[name] = document[name] | values
    text = yaml.safe_dump({"pipelines": {"pets": document}, "channels": {"production": {}}})
    return parse_config(text.encode(), Path("pipelines.yaml")).pipeline("pets")


def of(pipeline: Pipeline, device: Any = "cpu") -> dict[str, StageMemory]:
    return {one.stage: one for one in stage_memory(pipeline, CONFIG, device)}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftline.train.devices.has_bf16", lambda: True)


def held_bytes(model: torch.nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def test_weights_are_what_the_stages_load(tiny_llama: Path, tmp_path: Path, gpu: None) -> None:
    LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    quantize_folder(tmp_path / "bf16", tmp_path / "nf4", quantize=quantize_section())
    pipeline = made(base={"dtype": "bfloat16"}, quantize={"method": "nf4"}, package={"merged": True})
    on_cpu, on_gpu = of(pipeline), of(pipeline, "cuda")
    adapter = module._Sizes(pipeline, CONFIG, "cpu").adapter
    quantized = {"cpu": load_model(tmp_path / "nf4"), "cuda": load_model(tmp_path / "nf4", keep=True)}
    for device, planned in (("cpu", on_cpu), ("cuda", on_gpu)):
        assert planned["package"].low - adapter == pytest.approx(held_bytes(quantized[device]), rel=0.02)
    assert on_cpu["evaluate"].low == pytest.approx(held_bytes(load_model(tmp_path / "bf16")), rel=0.02)
    assert on_gpu["evaluate"].low == pytest.approx(held_bytes(load_model(tmp_path / "bf16", keep=True)), rel=0.02)
    assert on_gpu["evaluate"].what == "the base before quantization"
    assert list(on_cpu) == ["init", "evaluate", "merge", "package"]
    assert all(one.low < one.expected for one in (*on_cpu.values(), *on_gpu.values()))


def test_only_the_stages_that_compute_are_planned() -> None:
    assert list(of(made(package={"merged": False}))) == ["evaluate", "package"]


def test_weights_that_are_trained_are_held_in_fp32(gpu: None) -> None:
    part = of(made(base={"dtype": "bfloat16"}), "cuda")["package"].low
    whole = of(made(base={"dtype": "bfloat16"}, adapter={"modules_to_save": ["norm"]}), "cuda")["package"].low
    assert whole > 1.8 * part  # the adapter is fp32 in both


def test_full_fine_tuning_holds_its_weights_once() -> None:
    plain, full = of(made())["evaluate"], of(made().model_copy(update={"adapter": Adapter(method="full")}))
    assert full["evaluate"].low == full["package"].low == module._Sizes(made(), CONFIG, "cpu").total * 4
    assert plain.low > full["evaluate"].low  # which has no factors beside them


def test_longer_batches_and_more_processes_take_more() -> None:
    few, many = (of(made(evaluate={"batch_tokens": tokens}))["evaluate"].expected for tokens in (1024, 16384))
    assert few < many
    two = of(made(evaluate={"batch_tokens": 1024, "processes": 2}))["evaluate"].expected
    assert two == pytest.approx(2 * few)


def test_a_stage_that_cannot_fit_is_refused_and_one_that_might_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = made()
    low = of(pipeline)["evaluate"].low
    monkeypatch.setattr(module, "free_bytes", lambda _: int(low) - 1)
    with pytest.raises(GraftlineError, match=r"stage evaluate needs 0\.00 to .* GB of this machine.*`graftline plan`"):
        check_stage("evaluate", pipeline, CONFIG)
    monkeypatch.setattr(module, "free_bytes", lambda _: int(low) + 1)
    check_stage("evaluate", pipeline, CONFIG)
    check_stage("init", pipeline, CONFIG)  # nothing is quantized


def test_a_calibrated_start_takes_main_memory_and_that_of_its_rows(gpu: None) -> None:
    def init(start: Any, device: str) -> StageMemory:
        sections: dict[str, dict[str, Any]] = {
            "quantize": {"method": "nf2", "init": start},
            "adapter": {"method": "loftq"},
        }
        return of(made(**sections), device)["init"]

    weighted, plain = {"kind": "loftq", "weighting": "diagonal"}, init("loftq", "cpu")
    calibrated = init(weighted, "cuda")
    assert calibrated == init(weighted, "cpu")
    assert calibrated.in_main_memory
    assert not plain.in_main_memory
    tokens = 128 * made().data.max_tokens
    assert calibrated.expected > plain.expected + 2 * 4 * tokens * CONFIG.hidden_size
    assert init({"kind": "loftq", "weighting": "full"}, "cuda").expected > calibrated.expected


def test_a_merge_whose_rounding_is_compensated_is_planned_with_its_rows(gpu: None) -> None:
    package = {"merged": True, "requantize": True}
    pipeline = made(quantize={"method": "nf4"}, package=package)
    compared = StageMemory("merge", 1.0, 2.0, "the merged model")
    on_cpu, on_gpu = (module._requantizing(module._Sizes(pipeline, CONFIG, device), compared) for device in DEVICES)
    tokens = 128 * pipeline.data.max_tokens
    assert on_cpu.expected > 0.7e9 + 2 * 4 * tokens * CONFIG.hidden_size + 3 * 4 * CONFIG.intermediate_size**2
    assert on_cpu.low == compared.low
    assert "calibration rows" in on_cpu.what
    assert on_gpu == compared  # there the models are compared, and calibrating takes main memory
    larger = StageMemory("merge", 1.0, 1e12, "the merged model")
    assert module._requantizing(module._Sizes(pipeline, CONFIG, "cpu"), larger) == larger
    assert "merge" in of(pipeline)


def test_the_transposed_weights_of_gpt2_are_quantized_too(gpu: None) -> None:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=96, n_positions=64)
    quantized, dense = (stage_memory(made(quantize={"method": kind}), config, "cuda") for kind in ("nf4", "none"))
    init = next(one for one in quantized if one.stage == "init")
    assert init.low == 2 * 4 * 32 * 128  # the feed-forward's weight in fp32
    low = {
        kind: next(one.low for one in found if one.stage == "package")
        for kind, found in (("nf4", quantized), ("none", dense))
    }
    blocks = 2 * (32 * 96 + 32 * 32 + 2 * 32 * 128)
    assert low["none"] - low["nf4"] == pytest.approx(blocks * (4 - 4 / 8), rel=0.05)
