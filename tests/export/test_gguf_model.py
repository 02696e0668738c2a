"""Whole models as GGUF: read back by transformers, and by the importer that the line uses for bases."""

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from graftline.errors import ExportError
from graftline.export.gguf_model import GgufKind, export_model, pre_tokenizer
from graftline.weights.importing import convert_gguf
from graftline.weights.quant.folder import quantize_folder
from graftline.weights.quant.linear import load_model
from tests.sections import quantize_section
from tests.tiny import make_tiny_llama, make_tokenizer
from tests.weights.families import edit_config, make_family

IDS = torch.arange(5, 45)[None]


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return load_model(folder)(IDS).logits


def round_trip(folder: Path, place: Path, kind: GgufKind) -> Path:
    place.mkdir()
    export_model(folder, place / "model.gguf", kind)
    convert_gguf(place / "model.gguf", place / "back", dtype=torch.float32)
    return place / "back"


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_a_family_in_sixteen_bits_computes_what_it_did(tmp_path: Path, name: str) -> None:
    # transformers reads no head size of Qwen 3 from GGUF: it takes that of all published ones.
    changes = {"MistralForCausalLM": {"sliding_window": None}, "Qwen3ForCausalLM": {"head_dim": 128}}.get(name, {})
    folder = make_family(tmp_path / "model", name, vocab_size=512, rope_theta=5000.0, rms_norm_eps=1e-5, **changes)
    make_tokenizer(folder)
    back = round_trip(folder, tmp_path / "gguf", "f16")
    torch.testing.assert_close(logits(back), logits(folder), rtol=2e-2, atol=5e-2)
    before, after = (json.loads((each / "config.json").read_text(encoding="utf-8")) for each in (folder, back))
    assert after["rms_norm_eps"] == pytest.approx(before["rms_norm_eps"])
    theta = "rope_parameters"
    assert after[theta]["rope_theta"] == before[theta]["rope_theta"]


def test_transformers_own_reader_gives_the_same_logits(tiny_llama: Path, tmp_path: Path) -> None:
    back = round_trip(tiny_llama, tmp_path / "gguf", "q8_0")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf")
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, logits(back), rtol=1e-4, atol=1e-5)


def test_eight_bits_are_those_of_the_gguf_package(tiny_llama: Path, tmp_path: Path) -> None:
    round_trip(tiny_llama, tmp_path / "gguf", "q8_0")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").tensors}
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert {kind for name, kind in kinds.items() if name.endswith("norm.weight")} == {"F32"}
    assert {kind for name, kind in kinds.items() if not name.endswith("norm.weight")} == {"Q8_0"}


def test_the_tokenizer_is_in_the_file_with_its_special_tokens_and_template(tiny_llama: Path, tmp_path: Path) -> None:
    export_model(tiny_llama, tmp_path / "model.gguf", "f16")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert len(tokens) == 512
    types = fields["tokenizer.ggml.token_type"].contents()
    assert {index for index, kind in enumerate(types) if kind == gguf.TokenType.CONTROL} == set(
        tokenizer.all_special_ids
    )
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert theirs("a cat and a dog").input_ids == tokenizer("a cat and a dog").input_ids


DIGITS = {"type": "Digits", "individual_digits": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def split(pattern: str) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        ([BYTES], "gpt-2"),
        ([DIGITS, BYTES], "smollm"),
        ([split(LLAMA_3), BYTES | {"use_regex": False}], "llama-bpe"),
        ([split(LLAMA_3.replace("{1,3}", "")), BYTES | {"use_regex": False}], "qwen2"),
        ([split(r"\d"), BYTES | {"use_regex": False}], None),
        ([DIGITS | {"individual_digits": False}, BYTES], None),
        ([BYTES | {"add_prefix_space": True}], None),
        ([{"type": "Whitespace"}], None),
    ],
)
def test_how_words_are_split_is_named_or_refused(
    tiny_llama: Path, tmp_path: Path, parts: list[dict[str, object]], name: str | None
) -> None:
    described = json.loads((tiny_llama / "tokenizer.json").read_text(encoding="utf-8"))
    described["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    (tmp_path / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    if name:
        assert pre_tokenizer(tokenizer) == name
    else:
        with pytest.raises(ExportError, match="no name for how this tokenizer splits words"):
            pre_tokenizer(tokenizer)


def test_what_llama_cpp_would_compute_otherwise_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    def refused(folder: Path, message: str, kind: GgufKind = "f16") -> None:
        with pytest.raises(ExportError, match=message):
            export_model(folder, tmp_path / "model.gguf", kind)

    refused(make_family(tmp_path / "gpt2", "GPT2LMHeadModel"), "GPT2LMHeadModel is not written as GGUF")
    quantize_folder(tiny_llama, tmp_path / "nf4", quantize=quantize_section())
    refused(tmp_path / "nf4", "quantized already")
    scaled = make_tiny_llama(tmp_path / "scaled")
    yarn = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    refused(edit_config(scaled, rope_parameters=yarn), r"its positions are scaled \(linear\)")
    refused(edit_config(make_tiny_llama(tmp_path / "gelu"), hidden_act="gelu"), "its activation is gelu")
    window = make_family(tmp_path / "window", "MistralForCausalLM", vocab_size=512, sliding_window=16)
    make_tokenizer(window)
    refused(window, "sliding window")


def test_four_bits_are_made_by_llama_cpp_s_tool_or_refused_with_the_way(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(ExportError, match=r"llama-quantize, which is not on the PATH; install llama.cpp"):
        export_model(tiny_llama, tmp_path / "model.gguf", "q4_k_m")
    # A stand-in for the tool, which keeps the 16 bits; then one that fails.
    tool = tmp_path / "bin" / "llama-quantize"
    tool.parent.mkdir()
    for line, code in ((f'{shutil.which("cp", path="/bin:/usr/bin")} "$1" "$2"', 0), ("echo no room >&2; exit 3", 3)):
        tool.write_text(f'#!/bin/sh\n[ "$3" = Q4_K_M ] || exit 9\n{line}\n', encoding="utf-8")
        tool.chmod(0o755)
        out = tmp_path / f"{code}.gguf"
        if code:
            with pytest.raises(ExportError, match="ended with exit code 3: no room"):
                export_model(tiny_llama, out, "q4_k_m")
        else:
            export_model(tiny_llama, out, "q4_k_m")
            assert gguf.GGUFReader(out).tensors
    assert sorted(path.name for path in tmp_path.glob("*.gguf")) == ["0.gguf"]
