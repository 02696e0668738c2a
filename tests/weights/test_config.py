"""config.json is read through its class, and what it changes is part of a base's identity."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, normalizers

from graftline.adapters.peft_config import AdapterIdentity
from graftline.errors import BaseMismatchError, CheckpointError
from graftline.weights.identity import base_digest, read_identity, verify_identity, write_identity
from graftline.weights.importing import import_base
from graftline.weights.model_folder import computed_by, is_quantized, read_config
from graftline.weights.quant.linear import load_model
from tests.weights.families import FAMILIES, IDS, edit_config, edit_tensors, logits, make_family

LLAMA, GEMMA, GPT2 = "LlamaForCausalLM", "GemmaForCausalLM", "GPT2LMHeadModel"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("name", "remove", "values"),
    [
        (LLAMA, ("rms_norm_eps", "hidden_act", "attention_bias", "mlp_bias", "rope_parameters"), {}),
        (LLAMA, ("rope_parameters",), {"rope_theta": 10000.0, "rope_scaling": None}),  # the older spelling
        (LLAMA, ("head_dim",), {}),
        (LLAMA, ("dtype", "transformers_version"), {"torch_dtype": "bfloat16", "_name_or_path": "somebody/model"}),
        (LLAMA, ("architectures",), {}),
        (LLAMA, (), {"architectures": ["LlamaModel"]}),
        (LLAMA, (), {"use_cache": False, "attention_dropout": 0.3, "initializer_range": 0.5, "unsloth_fixed": True}),
        (LLAMA, (), {"eos_token_id": [2, 7, 9], "pad_token_id": None, "bos_token_id": None}),
        (LLAMA, (), {"quantization_config": None}),
        (LLAMA, (), {"attn_implementation": "flash_attention_2"}),
        (LLAMA, (), {"return_dict": False, "output_hidden_states": True}),
        (GEMMA, ("tie_word_embeddings",), {}),
        (GPT2, ("n_embd", "n_layer", "n_head"), {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
        (GPT2, ("layer_norm_epsilon", "activation_function", "n_inner"), {"resid_pdrop": 0.0, "n_ctx": 64}),
        ("Qwen2ForCausalLM", ("layer_types",), {"use_sliding_window": False}),
    ],
)
def test_two_spellings_of_a_configuration_are_one_base(
    tmp_path: Path, name: str, remove: tuple[str, ...], values: dict[str, object]
) -> None:
    folder = make_family(tmp_path / "m", name)
    before, expected = read_identity(folder), logits(folder)

    edit_config(folder, remove=remove, **values)

    assert read_identity(folder) == before
    with torch.no_grad():
        assert torch.equal(load_model(folder)(IDS).logits, expected)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"rope_theta": 500000}, {"rope_theta": 500000.0}),
        (
            {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_theta": 10000, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8, "low_freq_factor": 1,
                                 "high_freq_factor": 4, "original_max_position_embeddings": 16}},
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000, "factor": 8.0, "low_freq_factor": 1.0,
                                 "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
        ),
    ],
)  # fmt: skip
def test_rotary_settings_of_two_spellings_are_one_base(
    tmp_path: Path, one: dict[str, object], other: dict[str, object]
) -> None:
    found = []
    for number, values in enumerate((one, other)):
        folder = make_family(tmp_path / str(number), LLAMA)
        edit_config(folder, remove=("rope_parameters",), **values)
        found.append(read_identity(folder))
    assert found[0] == found[1]
    assert found[0].spelled != found[1].spelled
    for identity in found:
        assert identity.is_called(identity.spelled), "an adapter that was made before is not refused"


@pytest.mark.parametrize(
    ("name", "remove", "values"),
    [
        (LLAMA, (), {"rope_parameters": YARN}),
        (LLAMA, (), {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
        (LLAMA, ("rope_parameters",), {"rope_theta": 500000.0}),
        (LLAMA, ("rope_parameters",), {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        (LLAMA, (), {"rms_norm_eps": 0.5}),
        (LLAMA, (), {"hidden_act": "gelu"}),
        (LLAMA, (), {"max_position_embeddings": 32}),
        (GEMMA, (), {"hidden_act": "relu"}),
        ("Gemma2ForCausalLM", (), {"final_logit_softcapping": 1.0}),
        ("Gemma2ForCausalLM", (), {"final_logit_softcapping": None}),
        ("Gemma2ForCausalLM", (), {"query_pre_attn_scalar": 4}),
        ("Gemma2ForCausalLM", (), {"sliding_window": 4}),
        ("MistralForCausalLM", (), {"sliding_window": None}),
        ("MistralForCausalLM", (), {"sliding_window": 4}),
        (
            "Qwen3ForCausalLM",
            ("layer_types",),
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
        ),
        ("Phi3ForCausalLM", (), {"hidden_act": "gelu"}),
        (GPT2, (), {"layer_norm_epsilon": 0.5}),
        (GPT2, (), {"activation_function": "relu"}),
        (GPT2, (), {"scale_attn_by_inverse_layer_idx": True}),
        (GPT2, (), {"scale_attn_weights": False}),
    ],
)
def test_another_computation_on_the_same_weights_is_another_base(
    tmp_path: Path, name: str, remove: tuple[str, ...], values: dict[str, object]
) -> None:
    folder = make_family(tmp_path / "m", name)
    before = read_identity(folder)
    adapter = AdapterIdentity(base_digest=before.digest)

    edit_config(folder, remove=remove, **values)

    after = read_identity(folder)
    assert after.digest != before.digest
    assert after.weights == before.weights == base_digest(folder)
    with pytest.raises(BaseMismatchError, match=r"weights, config\.json and tokenizer as they were then"):
        adapter.check(after, None)


def test_a_head_that_is_no_longer_tied_is_another_base(tmp_path: Path) -> None:
    folder = make_family(tmp_path / "m", GEMMA)
    edit_tensors(folder, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    before = read_identity(folder)
    assert read_identity(edit_config(folder, tie_word_embeddings=False)).digest != before.digest


def test_a_record_of_the_weights_digest_stays_valid_for_them_alone(tmp_path: Path) -> None:
    """Adapters and releases from before the configuration counted."""
    folder = make_family(tmp_path / "m", LLAMA)
    old = AdapterIdentity(base_digest=base_digest(folder))
    old.check(read_identity(folder), None)
    edit_tensors(folder, lambda tensors: tensors | {"model.norm.weight": torch.ones(32)})
    with pytest.raises(BaseMismatchError):
        old.check(read_identity(folder), None)


def test_what_is_recorded_beside_weights_is_their_digest_and_config_is_read_anew(tmp_path: Path) -> None:
    folder = make_family(tmp_path / "m", LLAMA)
    identity = read_identity(folder)
    write_identity(folder, identity)
    assert json.loads((folder / "graftline-base.json").read_text(encoding="utf-8"))["digest"] == str(identity.weights)
    assert read_identity(folder) == verify_identity(folder) == identity
    edit_config(folder, rms_norm_eps=0.5)
    assert verify_identity(folder).digest != identity.digest


@pytest.mark.parametrize(
    "change",
    [
        lambda core: setattr(core, "normalizer", normalizers.Lowercase()),
        lambda core: core.add_tokens(["evening"]),
        lambda core: setattr(core, "pre_tokenizer", core.pre_tokenizer.__class__(add_prefix_space=True)),
    ],
    ids=["normalizer", "added token", "pre-tokenizer"],
)
def test_a_tokenizer_that_cuts_text_otherwise_is_another_base(
    tmp_path: Path, tiny_llama: Path, change: Callable[[Tokenizer], object]
) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "m"))
    before = read_identity(folder)
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    core.save(str(folder / "tokenizer.json"))
    assert read_identity(folder) == before
    change(core)
    core.save(str(folder / "tokenizer.json"))
    assert read_identity(folder).digest != before.digest


@pytest.mark.parametrize("name", FAMILIES)
def test_an_imported_folder_is_the_base_that_it_came_from(tmp_path: Path, name: str) -> None:
    folder = make_family(tmp_path / "m", name)
    digest = import_base(folder, tmp_path / "imported", dtype=torch.float32)
    assert digest == read_identity(tmp_path / "imported").digest == read_identity(folder).digest


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": "wide"}, {"vocab_size": None}, {"num_attention_heads": 0}, {"num_attention_heads": 5},
        {"rope_parameters": {"rope_type": "none such"}}, {"hidden_act": "none such"}, {"layer_types": 3},
        {"model_type": "gpt2"}, {"model_type": "none such"}, {"architectures": ["LlamaForSequenceClassification"]},
    ],
)  # fmt: skip
def test_a_configuration_that_no_model_can_be_made_of_is_refused_by_name(
    tmp_path: Path, values: dict[str, object]
) -> None:
    folder = edit_config(make_family(tmp_path / "m", LLAMA), **values)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model_type": "llama"}', "null"])
def test_a_damaged_configuration_is_refused(tmp_path: Path, text: str) -> None:
    folder = make_family(tmp_path / "m", LLAMA)
    (folder / "config.json").write_text(text, encoding="utf-8")
    if "model_type" in text:  # a configuration of defaults only: another model than the weights'
        with pytest.raises(CheckpointError, match=r"config\.json asks for"):
            load_model(folder)
        return
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(folder)


def test_a_padding_token_outside_the_vocabulary_is_told_as_such(tmp_path: Path) -> None:
    folder = edit_config(make_family(tmp_path / "m", LLAMA), pad_token_id=1000)
    with pytest.raises(CheckpointError, match=r"config\.json: LlamaForCausalLM cannot be built from it: Padding_idx"):
        load_model(folder)


def test_weights_in_eight_bits_are_told_from_a_damaged_file(tmp_path: Path) -> None:
    folder = make_family(tmp_path / "m", LLAMA)
    edit_tensors(folder, lambda tensors: {name: t.to(torch.float8_e4m3fn) for name, t in tensors.items()})
    with pytest.raises(CheckpointError, match="as F8_E4M3, the number type of a quantized model; take the model that"):
        load_model(folder)


@pytest.mark.parametrize(("value", "expected"), [(None, False), ({}, False), ({"quant_method": "gptq"}, True)])
def test_only_a_quantization_that_says_something_is_one(tmp_path: Path, value: object, expected: bool) -> None:
    folder = edit_config(make_family(tmp_path / "m", LLAMA), quantization_config=value)
    assert is_quantized(read_config(folder)) == expected


def test_a_folder_without_a_configuration_is_its_weights(tmp_path: Path) -> None:
    folder = make_family(tmp_path / "m", LLAMA)
    (folder / "config.json").unlink()
    assert computed_by(folder) is None
    assert read_identity(folder).digest == base_digest(folder)


def test_code_that_a_folder_names_is_never_run(tmp_path: Path) -> None:
    folder = make_family(tmp_path / "m", LLAMA)
    (folder / "config_own.py").write_text("raise SystemExit('ran')", encoding="utf-8")
    edit_config(folder, auto_map={"AutoConfig": "config_own.Own", "AutoModelForCausalLM": "config_own.Own"})
    with torch.no_grad():
        assert load_model(folder)(IDS).logits.shape == (1, 16, 96)
