from pathlib import Path

import pytest
import torch

from graftline.adapters.attach import attach
from graftline.adapters.convert import to_lora
from graftline.adapters.peft_format import AdapterIdentity, AdapterWeights, load_adapter, save_adapter, write_weights
from graftline.digest import of_bytes
from graftline.errors import AdapterError
from graftline.settings.model import Adapter
from graftline.weights.identity import BaseIdentity
from tests.adapters.stand_in import disturb, make_model, make_tokens

BASE = BaseIdentity(of_bytes(b"base"))
PATTERNS = {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"down_proj": 2.0, "c_fc": 3.0}}
CASES = [
    ("llama", {"method": "lora", "rank": 3, **PATTERNS}),
    ("llama", {"method": "rslora", "rank": 3, **PATTERNS}),
    ("llama", {"method": "lora", "rank": 3, "targets": ("embed_tokens", "q_proj")}),
    ("llama", {"method": "pissa", "rank": 3, **PATTERNS}),
    ("llama", {"method": "pissa", "rank": 12}),  # 2R = 24 is above the 16 outputs of k_proj and v_proj
    ("llama", {"method": "vera", "rank": 40}),  # above every width
    ("gpt2", {"method": "vera", "rank": 4}),
    ("gpt2", {"method": "pissa", "rank": 3}),
]


def make_adapter(architecture: str, folder: Path, settings: dict) -> torch.Tensor:
    model = make_model(architecture)
    attach(model, Adapter(**settings), seed=0)
    disturb(model)
    save_adapter(model, folder, identity=AdapterIdentity(base_digest=BASE.digest))
    with torch.no_grad():
        return model(make_tokens()).logits


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("architecture", "settings"), CASES)
def test_as_lora_on_the_original_base_the_outputs_are_equal(architecture, settings, tmp_path: Path):
    expected = make_adapter(architecture, tmp_path / "ours", settings)
    model = make_model(architecture)

    def shape_of(name):
        weight = model.get_submodule(name).weight
        return tuple(weight.shape) if isinstance(model.get_submodule(name), torch.nn.Linear) else tuple(weight.T.shape)

    converted = to_lora(AdapterWeights.open(tmp_path / "ours"), shape_of=shape_of)
    write_weights(converted, tmp_path / "lora")
    again = AdapterWeights.open(tmp_path / "lora")
    assert again.method.name == "lora"
    assert {again.scale(name) for name in again.modules()} == {1.0}
    load_adapter(model, tmp_path / "lora", base=BASE)
    close(model(make_tokens()).logits, expected)


MERGEABLE = [*CASES, ("llama", {"method": "dora", "rank": 3, **PATTERNS}), ("gpt2", {"method": "dora", "rank": 3})]


@pytest.mark.parametrize(("architecture", "settings"), MERGEABLE)
def test_folded_into_the_weights_the_outputs_are_equal(architecture, settings, tmp_path: Path):
    expected = make_adapter(architecture, tmp_path, settings)
    weights, model = AdapterWeights.open(tmp_path), make_model(architecture)
    for name in weights.modules():
        layer = model.get_submodule(name)
        # A new parameter: the tied head keeps the base's weight, as it did in training.
        layer.weight = torch.nn.Parameter(weights.fold_weight(name, layer.weight.detach()))
    close(model(make_tokens()).logits, expected)


def test_whole_tensors_of_full_fine_tuning_and_saved_modules_are_replacements(tmp_path: Path):
    expected = make_adapter("llama", tmp_path / "full", {"method": "full"})
    weights, model = AdapterWeights.open(tmp_path / "full"), make_model("llama")
    assert weights.keeps_ties
    missing = model.load_state_dict(weights.replacements(), strict=False)
    assert missing.missing_keys == ["lm_head.weight"]  # tied: one tensor, stored once
    close(model(make_tokens()).logits, expected)
    again = make_model("llama")
    load_adapter(again, tmp_path / "full", base=BASE)
    close(again(make_tokens()).logits, expected)
    settings = {"method": "lora", "targets": ("q_proj",), "modules_to_save": ("lm_head",)}
    make_adapter("llama", tmp_path / "lora", settings)
    assert list(AdapterWeights.open(tmp_path / "lora").replacements()) == ["lm_head.weight"]


@pytest.mark.parametrize(
    ("method", "reason"),
    [("dora", "scales whole rows"), ("houlsby", "no linear map"), ("pfeiffer", "no linear map")],
)
def test_what_has_no_low_rank_form_is_refused_with_the_reason(method, reason, tmp_path: Path):
    make_adapter("llama", tmp_path, {"method": method, "rank": 3})
    with pytest.raises(AdapterError, match=reason):
        to_lora(AdapterWeights.open(tmp_path), shape_of=lambda name: (1, 1))


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer"])
def test_bottlenecks_survive_the_file_and_refuse_to_be_folded(method, tmp_path: Path):
    expected = make_adapter("llama", tmp_path, {"method": method, "rank": 3})
    model = make_model("llama")
    load_adapter(model, tmp_path, base=BASE)
    assert torch.equal(model(make_tokens()).logits, expected)
    weights = AdapterWeights.open(tmp_path)
    blocks = weights.bottlenecks()
    assert set(blocks) == {
        f"model.layers.{i}.{part}"
        for i in (0, 1)
        for part in (("mlp", "self_attn") if method == "houlsby" else ("mlp",))
    }
    with pytest.raises(AdapterError, match=f"{method} cannot be folded, because its activation"):
        weights.fold_weight("model.layers.0.mlp.down_proj", torch.zeros(32, 48))
