import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from graftline.adapters.attach import attach, plan_layers
from graftline.adapters.base import features_of
from graftline.adapters.peft_format import AdapterIdentity, AdapterWeights, load_adapter, save_adapter
from graftline.digest import of_bytes
from graftline.errors import ExportError, PromotionError
from graftline.export.targets import check_planned, check_target, export_adapter, require_vllm
from graftline.settings.model import Adapter, Quantize
from graftline.weights.identity import BaseIdentity
from graftline.weights.quant.folder import quantizer_record
from tests.adapters.stand_in import disturb, make_model, make_tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")
BASE = BaseIdentity(of_bytes(b"base"))
PATTERNS = {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"down_proj": 2.0}}
LOW_RANK = [
    {"method": "lora", "rank": 3, **PATTERNS},
    {"method": "rslora", "rank": 3, **PATTERNS},
    {"method": "pissa", "rank": 3},
    {"method": "vera", "rank": 40},  # above every layer's width: the conversion must shrink it
]


def make_adapter(folder: Path, **settings) -> torch.Tensor:
    """Save a disturbed adapter on the untied tiny Llama; returns its logits."""
    model = make_model("llama-untied")
    attach(model, Adapter(**settings), seed=0)
    disturb(model)
    save_adapter(model, folder, identity=AdapterIdentity(base_digest=BASE.digest))
    with torch.no_grad():
        return model(make_tokens()).logits


def shape_of(name: str) -> tuple[int, int]:
    num_inputs, num_outputs = features_of(make_model("llama-untied").get_submodule(name))
    return num_outputs, num_inputs


def method_id(settings: dict) -> str:
    return settings["method"]


@pytest.mark.parametrize("settings", LOW_RANK, ids=method_id)
def test_what_vllm_reads_computes_the_same(settings, tmp_path: Path):
    # vLLM's rule: B·(lora_alpha / r) for every layer, all other settings ignored (METHODS §2.3).
    if settings["method"] == "vera":
        settings = settings | {"rank": 16}
    expected = make_adapter(tmp_path / "ours", **settings)
    export_adapter(tmp_path / "ours", tmp_path / "out", target="vllm", shape_of=shape_of)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert config["modules_to_save"] is None
    assert config["bias"] == "none"
    assert not config["use_dora"]
    assert not config["use_rslora"]
    scale = config["lora_alpha"] / config["r"]
    model = make_model("llama-untied")
    with torch.no_grad():
        for name in {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in tensors}:
            A, B = (tensors[f"base_model.model.{name}.lora_{f}.weight"] for f in "AB")
            assert A.shape[0] <= config["r"]
            model.get_submodule(name).weight += scale * B @ A
    torch.testing.assert_close(model(make_tokens()).logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("settings", LOW_RANK, ids=method_id)
def test_the_exported_adapter_still_loads_here_and_belongs_to_the_same_base(settings, tmp_path: Path):
    expected = make_adapter(tmp_path / "ours", **settings)
    compatibility = export_adapter(tmp_path / "ours", tmp_path / "out", target="vllm", shape_of=shape_of)
    assert compatibility.loads
    model = make_model("llama-untied")
    load_adapter(model, tmp_path / "out", base=BASE)
    torch.testing.assert_close(model(make_tokens()).logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("rank", "flag"), [(3, 8), (16, 16), (20, 32)])
def test_the_command_for_vllm_names_the_smallest_rank_class(rank, flag, tmp_path: Path):
    make_adapter(tmp_path / "ours", method="lora", rank=rank, targets=("q_proj",))
    command = check_target(AdapterWeights.open(tmp_path / "ours"), "vllm").command
    assert f"--max-lora-rank {flag} " in command
    assert "--enable-lora" in command


def test_a_quantized_base_adds_its_flag_for_vllm(tmp_path: Path):
    model = make_model("llama-untied")
    attach(model, Adapter(method="lora"), seed=0)
    identity = AdapterIdentity(base_digest=BASE.digest, quantizer={"method": "nf4"})
    save_adapter(model, tmp_path / "ours", identity=identity)
    assert "--quantization bitsandbytes" in check_target(AdapterWeights.open(tmp_path / "ours"), "vllm").command


REFUSED = [
    ("vllm", {"method": "dora"}, "vLLM has no DoRA; merge it"),
    ("vllm", {"method": "lora", "targets": ("q_proj",), "modules_to_save": ("lm_head",)}, "no modules_to_save"),
    ("vllm", {"method": "lora", "targets": ("q_proj",), "bias": "adapter_only"}, "no trained biases"),
    ("vllm", {"method": "lora", "targets": ("q_proj", "lm_head")}, "no adapter on lm_head"),
    ("vllm", {"method": "houlsby"}, "no houlsby bottlenecks"),
    ("vllm", {"method": "full", "targets": ("q_proj",)}, "full fine-tuning is not an adapter"),
    ("peft", {"method": "pfeiffer"}, "no pfeiffer bottlenecks"),
    ("transformers", {"method": "houlsby"}, "no houlsby bottlenecks"),
    ("transformers", {"method": "dora"}, "ignores DoRA's magnitudes"),
]


@pytest.mark.parametrize(("target", "settings", "reason"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_what_a_target_cannot_load_is_refused_with_the_reason_and_nothing_is_written(
    target, settings, reason, tmp_path: Path
):
    make_adapter(tmp_path / "ours", rank=3, **settings)
    with pytest.raises(ExportError, match=reason):
        export_adapter(tmp_path / "ours", tmp_path / "out", target=target, shape_of=shape_of)
    assert not (tmp_path / "out").exists()


def test_a_rank_above_every_class_of_vllm_is_refused(tmp_path: Path):
    make_adapter(tmp_path / "ours", method="vera", rank=520, targets=("q_proj",))
    assert "above vLLM's largest" in check_target(AdapterWeights.open(tmp_path / "ours"), "vllm").reasons[0]


@pytest.mark.parametrize("settings", [each for at, each, _ in REFUSED if at == "vllm"], ids=str)
def test_a_release_that_vllm_cannot_load_is_refused_with_the_merged_model_as_the_way_out(settings, tmp_path: Path):
    make_adapter(tmp_path / "adapter", **settings)
    with pytest.raises(PromotionError, match=r"channels\.live\.served_by is vllm.*release with package\.merged: true"):
        require_vllm(tmp_path, "live")
    (tmp_path / "merged").mkdir()
    with pytest.raises(PromotionError, match=r"serve the release's merged/ folder as a model"):
        require_vllm(tmp_path, "live")


@pytest.mark.parametrize("settings", LOW_RANK, ids=method_id)
def test_a_release_that_vllm_can_load_is_not_refused(settings, tmp_path: Path):
    make_adapter(tmp_path / "adapter", **settings | {"rank": 16})
    require_vllm(tmp_path, "live")


@pytest.mark.parametrize("code", ["nf4", "nf3", "mixed"])
def test_the_base_s_code_book_counts_too(code, tmp_path: Path):
    model = make_model("llama-untied")
    attach(model, Adapter(method="lora"), seed=0)
    bits = {"bits": {"0-1": 4}} if code == "mixed" else {}
    record = quantizer_record(Quantize(method=code, **bits), 0)
    save_adapter(model, tmp_path / "adapter", identity=AdapterIdentity(base_digest=BASE.digest, quantizer=record))
    if code == "nf4":
        require_vllm(tmp_path, "live")
        return
    with pytest.raises(PromotionError, match=f"no code for its base's {code} weights"):
        require_vllm(tmp_path, "live")


@pytest.mark.parametrize("settings", LOW_RANK, ids=method_id)
def test_transformers_loads_what_is_written_for_it(settings, tmp_path: Path):
    expected = make_adapter(tmp_path / "ours", **settings)
    export_adapter(tmp_path / "ours", tmp_path / "out", target="transformers", shape_of=shape_of)
    model = make_model("llama-untied")
    model.load_adapter(str(tmp_path / "out"))
    logits = model.eval()(make_tokens()).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_transformers_still_ignores_the_magnitudes_of_dora(tmp_path: Path):
    expected = make_adapter(tmp_path, method="dora", rank=3)
    model = make_model("llama-untied")
    model.load_adapter(str(tmp_path))
    # The day this fails, the refusal in graftline/export/targets.py can go.
    assert (model.eval()(make_tokens()).logits - expected).abs().max() > 0.05


def test_peft_loads_what_is_written_for_it(tmp_path: Path):
    expected = make_adapter(tmp_path / "ours", method="dora", rank=3, **PATTERNS)
    export_adapter(tmp_path / "ours", tmp_path / "out", target="peft", shape_of=shape_of)
    theirs = peft.PeftModel.from_pretrained(make_model("llama-untied"), tmp_path / "out").eval()
    torch.testing.assert_close(theirs(make_tokens()).logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_an_unknown_target_and_an_existing_folder_are_refused(tmp_path: Path):
    make_adapter(tmp_path / "ours", method="lora", rank=3)
    with pytest.raises(ExportError, match="no target 'tgi'; known: vllm, peft, transformers"):
        check_target(AdapterWeights.open(tmp_path / "ours"), "tgi")
    with pytest.raises(ExportError, match="exists; name a new folder"):
        export_adapter(tmp_path / "ours", tmp_path / "ours", target="peft", shape_of=shape_of)


@pytest.mark.parametrize(
    "settings", [*LOW_RANK, {"method": "dora"}, {"method": "houlsby"}, {"method": "full"}], ids=method_id
)
@pytest.mark.parametrize("target", ["vllm", "peft", "transformers"])
def test_before_training_the_answer_is_what_it_will_be_after(target, settings, tmp_path: Path):
    make_adapter(tmp_path, **settings)
    plans = plan_layers(make_model("llama-untied"), Adapter(**settings))
    planned = check_planned(Adapter(**settings), plans, is_quantized=False, target=target)
    found = check_target(AdapterWeights.open(tmp_path), target)
    assert planned.loads == found.loads
    assert planned.command == found.command
    assert planned.changes == found.changes
