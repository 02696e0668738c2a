import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from graftline.errors import CheckpointError, QuantizeError
from graftline.weights.model_folder import load_tokenizer
from graftline.weights.quant.blockwise import dequantize
from graftline.weights.quant.folder import DequantizingReader, quantize_folder
from graftline.weights.quant.linear import QuantLinear, load_model
from graftline.weights.reader import CheckpointReader
from tests.sections import quantize_section
from tests.tiny import make_tiny_llama

IDS = torch.arange(4, 36).view(2, 16)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def dense_twin(source: Path, quantized: Path) -> PreTrainedModel:
    """The source's model by transformers, with the quantized folder's weights as dense ones."""
    model, reader = AutoModelForCausalLM.from_pretrained(source), DequantizingReader(quantized)
    for name, parameter in model.named_parameters():
        if reader.is_quantized(name):
            assert reader.info(name).shape == parameter.shape
            parameter.data = reader.read(name)
    return model


def quantized_by_transformers(source: Path, out: Path, *, double: bool) -> PreTrainedModel:
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype="float32"
    )
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, device_map="cpu")
    model.save_pretrained(out)
    return model


def save_small(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def make_gpt2(folder: Path) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=128, n_positions=64, n_embd=64, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    return save_small(GPT2LMHeadModel(config), folder)


def make_qwen2(folder: Path) -> Path:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)  # zeros by default: a lost bias would not be seen
    return save_small(model, folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_model_equals_that_of_transformers(tiny_llama: Path, dtype: torch.dtype) -> None:
    ours = load_model(tiny_llama, dtype=dtype)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=dtype)
    assert torch.equal(logits(ours), logits(theirs))
    assert ours.dtype == dtype
    assert not ours.training


def test_tied_weights_share_memory(tiny_llama: Path) -> None:
    model = load_model(tiny_llama)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("make", [make_gpt2, make_qwen2, make_tiny_llama])
@pytest.mark.parametrize("code", ["nf4", "nf2", "fp8"])
def test_quantized_model_equals_a_dense_one_with_the_dequantized_weights(
    tmp_path: Path, make: object, code: str
) -> None:
    source = make(tmp_path / "source")  # type: ignore[operator]
    quantize_folder(source, tmp_path / "q", quantize=quantize_section(code))
    model = load_model(tmp_path / "q")
    assert torch.allclose(logits(model), logits(dense_twin(source, tmp_path / "q")), atol=1e-5)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(layers) == (8 if make is make_gpt2 else 14)


@pytest.mark.parametrize("double", [True, False])
def test_our_nf4_folder_loads_in_transformers_with_equal_logits(tmp_path: Path, tiny_llama: Path, double: bool) -> None:
    quantize_folder(tiny_llama, tmp_path / "q", quantize=quantize_section("nf4", double_quant=double))
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "q", output_loading_info=True)
    theirs.train()  # in evaluation bitsandbytes repacks weights for AVX512-BF16 and computes in bf16
    assert not any(report.values())
    assert sum(type(module).__name__ == "Linear4bit" for module in theirs.modules()) == 14
    assert torch.allclose(logits(load_model(tmp_path / "q")), logits(theirs), atol=1e-5)


@pytest.mark.parametrize("double", [True, False])
def test_folder_quantized_by_transformers_loads_with_equal_logits_and_bytes(
    tmp_path: Path, tiny_llama: Path, double: bool
) -> None:
    theirs = quantized_by_transformers(tiny_llama, tmp_path / "theirs", double=double)
    theirs.train()
    assert torch.allclose(logits(load_model(tmp_path / "theirs")), logits(theirs), atol=1e-5)
    quantize_folder(tiny_llama, tmp_path / "ours", quantize=quantize_section("nf4", double_quant=double))
    ours, other = CheckpointReader(tmp_path / "ours"), CheckpointReader(tmp_path / "theirs")
    weights = [name for name in ours.names() if "quant_state" not in name]
    assert set(ours.names()) == set(other.names())
    assert all(torch.equal(ours.read(name), other.read(name).view(ours.info(name).shape)) for name in weights)


def test_folder_of_our_own_layout_is_refused_by_transformers(tmp_path: Path, tiny_llama: Path) -> None:
    quantize_folder(tiny_llama, tmp_path / "q", quantize=quantize_section("nf2"))
    with pytest.raises(RuntimeError, match="report"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "q")


def test_dequantizing_reader_shows_the_logical_tensors(tmp_path: Path, tiny_llama: Path) -> None:
    quantize_folder(tiny_llama, tmp_path / "q", quantize=quantize_section("nf3"))
    reader, model = DequantizingReader(tmp_path / "q"), load_model(tmp_path / "q")
    assert reader.names() == CheckpointReader(tiny_llama).names() == DequantizingReader(tiny_llama).names()
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(reader.read(name), dequantize(model.model.layers[0].mlp.up_proj.quantized))
    assert (reader.info(name).shape, reader.info(name).dtype) == ((128, 64), torch.float32)
    assert reader.info(name).num_bytes == 128 * 64 * 4
    assert torch.equal(DequantizingReader(tiny_llama).read(name), CheckpointReader(tiny_llama).read(name))


def test_training_a_dense_layer_below_quantized_ones_gets_gradients(tmp_path: Path, tiny_llama: Path) -> None:
    quantize_folder(tiny_llama, tmp_path / "q", quantize=quantize_section())
    model = load_model(tmp_path / "q")
    model(IDS, labels=IDS).loss.backward()
    assert model.model.embed_tokens.weight.grad is not None
    assert model.model.layers[0].input_layernorm.weight.grad is not None


def test_tokenizer_of_the_folder_is_loaded(tmp_path: Path, tiny_llama: Path) -> None:
    quantize_folder(tiny_llama, tmp_path / "q", quantize=quantize_section())
    text = "a small animal"
    assert load_tokenizer(tmp_path / "q")(text).input_ids == load_tokenizer(tiny_llama)(text).input_ids
    with pytest.raises(CheckpointError, match=r"has no tokenizer_config\.json"):
        load_tokenizer(tmp_path)


def damaged(folder: Path, source: Path, **changes: Tensor | None) -> Path:
    """A copy with tensors replaced, or removed where None; dots in names are written as two underscores."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    for key, tensor in changes.items():
        name = key.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__norm__weight": None}, r"lacks 1 tensors of LlamaForCausalLM, for example 'model\.norm\.weight'"),
        ({"model__norm__weight": torch.ones(63)}, r"has shape \(63,\), config.json asks for \(64,\)"),
        ({"model__layers__9__mlp__up_proj__weight": torch.ones(2)}, "has no place in LlamaForCausalLM"),
        ({"model__norm__bias": torch.ones(64)}, "is not a parameter of LlamaForCausalLM"),
    ],
)
def test_folder_that_does_not_fit_its_config_is_refused(
    tmp_path: Path, tiny_llama: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(damaged(tmp_path / "bad", tiny_llama, **changes))


def test_tied_weight_that_is_stored_twice_is_accepted(tmp_path: Path, tiny_llama: Path) -> None:
    embedding = CheckpointReader(tiny_llama).read("model.embed_tokens.weight")
    folder = damaged(tmp_path / "m", tiny_llama, lm_head__weight=embedding)
    assert torch.equal(logits(load_model(folder)), logits(load_model(tiny_llama)))


UP = "model__layers__0__mlp__up_proj__weight"


def state_bytes(**changes: object) -> Tensor:
    state = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "float32",
        "shape": [128, 64],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": 0.03,
    } | changes
    return torch.tensor(list(json.dumps({k: v for k, v in state.items() if v is not None}).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({UP: torch.zeros(7, 1, dtype=torch.uint8)}, "its packed codes and constants have"),
        ({f"{UP}__absmax": torch.zeros(5, dtype=torch.uint8)}, "its packed codes and constants have"),
        ({f"{UP}__absmax": None}, "has no tensor"),
        ({f"{UP}__quant_map": torch.zeros(16)}, "is not the table of nf4"),
        ({f"{UP}__nested_quant_map": torch.zeros(256)}, "is not the dynamic map"),
        ({f"{UP}__quant_state__bitsandbytes__nf4": torch.zeros(3, dtype=torch.uint8)}, "its quant_state is not"),
        ({f"{UP}__quant_state__bitsandbytes__nf4": state_bytes(shape=[64, 64])}, "packed codes and constants|asks for"),
        ({f"{UP}__quant_state__bitsandbytes__nf4": state_bytes(shape=[64, 128])}, "is quantized with shape"),
        ({f"{UP}__quant_state__bitsandbytes__nf4": state_bytes(blocksize=48)}, "block size 48"),
        ({f"{UP}__quant_state__bitsandbytes__nf4": state_bytes(nested_offset=None)}, "its quant_state is not"),
        ({f"{UP}__quant_state__bitsandbytes__nf4": state_bytes(extra=1)}, "its quant_state is not"),
        ({f"{UP}__quant_state__bitsandbytes__nf4": state_bytes(shape=[-128, -64])}, "its quant_state is not"),
    ],
)
def test_damaged_quantized_weight_is_refused_by_name(
    tmp_path: Path, tiny_llama: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    quantize_folder(tiny_llama, tmp_path / "q", quantize=quantize_section())
    renamed = {key.replace("bitsandbytes__nf4", "bitsandbytes@nf4"): tensor for key, tensor in changes.items()}
    folder = tmp_path / "bad"
    shutil.copytree(tmp_path / "q", folder)
    tensors = load_file(folder / "model.safetensors")
    for key, tensor in renamed.items():
        name = key.replace("__", ".").replace("@", "__")
        tensors.pop(name)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises((CheckpointError, QuantizeError), match=message):
        load_model(folder)


def test_fp4_folder_is_refused_with_what_is_supported(tmp_path: Path, tiny_llama: Path) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config, device_map="cpu").save_pretrained(
        tmp_path / "q"
    )
    with pytest.raises(QuantizeError, match="bitsandbytes__fp4; expected one of bitsandbytes__nf4"):
        load_model(tmp_path / "q")


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1}, {"suppress_tokens": list(range(250))},
        {"do_sample": True, "temperature": 9.0}, {"max_length": 3}, {"num_beams": 3}, {"eos_token_id": [2, 5, 7]},
    ],
)  # fmt: skip
def test_generation_settings_in_the_folder_do_not_change_what_is_judged_and_recorded(
    tmp_path: Path, tiny_llama: Path, settings: dict[str, object]
) -> None:
    """The server answers without them, and its answers are compared with these."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "m"))
    greedy = GenerationConfig(do_sample=False, max_new_tokens=8, eos_token_id=[2], pad_token_id=2)
    given = {"attention_mask": torch.ones_like(IDS), "generation_config": greedy}
    expected = load_model(tiny_llama).generate(IDS, **given)
    (folder / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert torch.equal(load_model(folder).generate(IDS, **given), expected)
