"""Our files load in peft 0.21 and peft's files load here, with equal logits (fp32, ≤ 1e-5 of the largest logit)."""

import copy
from pathlib import Path

import peft
import pytest
import torch

from graftline.adapters.attach import adapter_layers, attach, attachment_of, trainable_parameters
from graftline.adapters.peft_format import AdapterIdentity, load_adapter, save_adapter
from graftline.digest import of_bytes
from graftline.settings.model import Adapter
from graftline.weights.identity import BaseIdentity
from tests.adapters.stand_in import CONFIGS, disturb, make_model, make_tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")
BASE = BaseIdentity(of_bytes(b"base"))
IDENTITY = AdapterIdentity(base_digest=BASE.digest)
PATTERNS = {"rank_pattern": {r"layers\.1\..*q_proj": 5, "down_proj": 2}, "alpha_pattern": {"q_proj": 7.0}}

CASES = {  # our spec, and PEFT's configuration of the same adapter
    "lora": (
        {"method": "lora", "rank": 3, "alpha": 6.0, **PATTERNS},
        peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", **PATTERNS),
    ),
    "rslora": (
        {"method": "rslora", "rank": 3, "alpha": 6.0, **PATTERNS},
        peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", use_rslora=True, **PATTERNS),
    ),
    "dora": (
        {"method": "dora", "rank": 3, "alpha": 6.0, **PATTERNS},
        peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", use_dora=True, **PATTERNS),
    ),
    "dora-embedding": (
        {"method": "dora", "rank": 3, "targets": ("embed_tokens", "v_proj", "lm_head")},
        peft.LoraConfig(r=3, lora_alpha=16, target_modules=["embed_tokens", "v_proj", "lm_head"], use_dora=True),
    ),
    "vera": (
        {"method": "vera", "rank": 4, "projection_seed": 5},
        peft.VeraConfig(r=4, target_modules="all-linear", projection_prng_key=5),
    ),
    "vera-own-biases": (
        {"method": "vera", "rank": 4, "targets": ("q_proj", "k_proj"), "bias": "adapter_only"},
        peft.VeraConfig(r=4, target_modules=["q_proj", "k_proj"], bias="vera_only"),
    ),
    "pissa": (
        {"method": "pissa", "rank": 3, "alpha": 6.0, "svd": "exact"},
        peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", init_lora_weights="pissa"),
    ),
    "lora-embedding": (
        {"method": "lora", "rank": 3, "targets": ("embed_tokens", "v_proj", "lm_head")},
        peft.LoraConfig(r=3, lora_alpha=16, target_modules=["embed_tokens", "v_proj", "lm_head"]),
    ),
    "lora-saved-head": (
        {"method": "lora", "rank": 3, "targets": ("q_proj",), "modules_to_save": ("lm_head",)},
        peft.LoraConfig(r=3, lora_alpha=16, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ),
    "lora-saved-embedding": (
        {"method": "lora", "rank": 3, "targets": ("q_proj",), "modules_to_save": ("embed_tokens", "norm")},
        peft.LoraConfig(r=3, lora_alpha=16, target_modules=["q_proj"], modules_to_save=["embed_tokens", "norm"]),
    ),
    "lora-own-biases": (
        {"method": "lora", "rank": 3, "targets": ("q_proj", "o_proj"), "bias": "adapter_only"},
        peft.LoraConfig(r=3, lora_alpha=16, target_modules=["q_proj", "o_proj"], bias="lora_only"),
    ),
    "lora-all-biases": (
        {"method": "lora", "rank": 3, "targets": ("q_proj", "o_proj"), "bias": "all"},
        peft.LoraConfig(r=3, lora_alpha=16, target_modules=["q_proj", "o_proj"], bias="all"),
    ),
}  # fmt: skip


def assert_equal_logits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def cases_for(architecture: str) -> list[str]:
    if architecture == "llama":  # tied: a head or an embedding that is trained must not change the other
        return [name for name in CASES if "bias" not in name]
    if architecture == "llama-untied":
        return [name for name in CASES if "bias" in name or name == "lora-saved-head"]
    if architecture == "gemma":  # its embedding scales what it looks up
        return ["lora", "dora", "lora-embedding", "lora-saved-embedding", "lora-saved-head"]
    return ["lora", "dora", "vera", "pissa"]


ALL = [pytest.param(a, c, id=f"{a}-{c}") for a in CONFIGS if a != "mistral" for c in cases_for(a)]


@pytest.mark.parametrize(("architecture", "case"), ALL)
def test_our_file_loads_in_peft(architecture: str, case: str, tmp_path: Path):
    model, tokens = make_model(architecture), make_tokens()
    base_logits = model(tokens).logits
    attach(model, Adapter(**CASES[case][0]), seed=0)
    disturb(model, seed=7)
    expected = model(tokens).logits
    assert (expected - base_logits).abs().max() > 0.05
    save_adapter(model, tmp_path, identity=IDENTITY)
    theirs = peft.PeftModel.from_pretrained(make_model(architecture), tmp_path).eval()
    assert_equal_logits(expected, theirs(tokens).logits)


@pytest.mark.parametrize(("architecture", "case"), ALL)
def test_a_file_of_peft_loads_here(architecture: str, case: str, tmp_path: Path):
    tokens = make_tokens()
    theirs = peft.get_peft_model(make_model(architecture), copy.deepcopy(CASES[case][1])).eval()
    convert = {}
    if case == "pissa":
        theirs.peft_config["default"].init_lora_weights = True
        theirs.save_pretrained(tmp_path / "initial")
        convert = {"path_initial_model_for_weight_conversion": str(tmp_path / "initial")}
    disturb(theirs, seed=7)
    theirs.save_pretrained(tmp_path, **convert)
    model = make_model(architecture)
    load_adapter(model, tmp_path, base=BASE)
    assert_equal_logits(model(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("case", ["lora", "dora", "vera"])
def test_both_train_the_same_parameters(case: str):
    ours, theirs = make_model("llama"), peft.get_peft_model(make_model("llama"), copy.deepcopy(CASES[case][1]))
    coverage = attach(ours, Adapter(**CASES[case][0]), seed=0)
    assert coverage.num_trained == theirs.get_nb_trainable_parameters()[0]


def test_projections_of_vera_are_drawn_as_peft_draws_them():
    ours, theirs = make_model("llama"), peft.get_peft_model(make_model("llama"), copy.deepcopy(CASES["vera"][1]))
    attach(ours, Adapter(**CASES["vera"][0]), seed=0)
    shared = attachment_of(ours).shared
    assert torch.equal(shared["A"], theirs.base_model.vera_A["default"])
    assert torch.equal(shared["B"], theirs.base_model.vera_B["default"])


@pytest.mark.parametrize("case", ["lora", "dora", "vera"])
def test_one_training_step_gives_the_gradients_of_peft(case: str, tmp_path: Path):
    theirs = peft.get_peft_model(make_model("llama"), copy.deepcopy(CASES[case][1])).train()
    disturb(theirs, seed=7)
    theirs.save_pretrained(tmp_path)
    model, tokens = make_model("llama"), make_tokens()
    load_adapter(model, tmp_path, base=BASE, trainable=True)
    model.train()
    for each in (model, theirs):
        each(tokens, labels=tokens).loss.backward()
    expected = {}
    for name, parameter in trainable_parameters(theirs).items():
        name = name.removeprefix("base_model.model.").replace(".default", "")
        expected[name.replace("lora_magnitude_vector.weight", "m")] = parameter.grad
    found = {}
    for layer_name, layer in adapter_layers(model).items():
        for key in layer.trained:
            disk = {"m": "m"}.get(key, attachment_of(model).method.disk_names[key])
            found[f"{layer_name}.{disk}"] = getattr(layer, key).grad
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
