import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from graftline.errors import CheckpointError
from graftline.weights.identity import read_identity, verify_identity
from graftline.weights.importing import convert_gguf
from graftline.weights.reader import CheckpointReader

HEADS, KV_HEADS, HIDDEN = 4, 2, 64


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries and keys as llama.cpp orders them."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    file: Path, tiny_llama: Path, *, pre: str = "smollm", leave_out: str = "", arch: str = "llama"
) -> dict[str, np.ndarray]:
    """The tiny Llama as a GGUF file with Q8_0 matrices; returns the weights that it stands for."""
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    writer = gguf.GGUFWriter(file, arch)
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(2)
    writer.add_feed_forward_length(128)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(512)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    tokens += [f"<unused{index}>" for index in range(512 - len(tokens))]
    writer.add_token_list(tokens)
    special = set(tokenizer.all_special_tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges(tokenizer)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    expected = {}
    for name, parameter in model.named_parameters():
        if name == leave_out:
            continue
        array = parameter.detach().numpy()
        target = names.get_name(name.removesuffix(".weight")) + ".weight"
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2], 0)
        stored = permute(array, heads) if heads else array
        kind = gguf.GGMLQuantizationType.Q8_0 if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        packed = gguf.quantize(np.ascontiguousarray(stored), kind)
        writer.add_tensor(target, packed, raw_dtype=kind)
        exact = gguf.quantize(array, kind)  # quantized by rows, so permuting rows does not change values
        expected[name] = gguf.dequantize(exact, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def merges(tokenizer: object) -> list[list[str]]:
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]  # type: ignore[attr-defined]


def test_converted_weights_are_the_dequantized_ones_in_the_order_of_transformers(
    tmp_path: Path, tiny_llama: Path
) -> None:
    expected = write_gguf(tmp_path / "tiny.gguf", tiny_llama)
    digest = convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out", dtype=torch.float32)
    reader = CheckpointReader(tmp_path / "out")
    assert reader.names() == sorted(expected)  # tied: no lm_head
    for name, array in expected.items():
        assert torch.equal(reader.read(name), torch.from_numpy(array)), name
    assert verify_identity(tmp_path / "out").digest == digest == read_identity(tmp_path / "out").digest


def test_converted_folder_is_complete_for_transformers_and_gives_the_same_logits(
    tmp_path: Path, tiny_llama: Path
) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out", dtype=torch.float32)
    ours, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    assert not any(report.values())
    ids = torch.arange(4, 20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert (tmp_path / "out" / "generation_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_llama).chat_template


def test_dtype_is_rounded_once_and_recorded(tmp_path: Path, tiny_llama: Path) -> None:
    expected = write_gguf(tmp_path / "tiny.gguf", tiny_llama)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out", dtype=torch.bfloat16)
    reader = CheckpointReader(tmp_path / "out")
    assert all(torch.equal(reader.read(n), torch.from_numpy(a).bfloat16()) for n, a in expected.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize(("pre", "expected"), [("smollm", ["a", "Ġ", "1", "2"]), ("gpt-2", ["a", "Ġ12"])])
def test_pre_tokenizer_that_splits_digits_is_restored(
    tmp_path: Path, tiny_llama: Path, pre: str, expected: list[str]
) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama, pre=pre)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out", dtype=torch.float32)
    pieces = AutoTokenizer.from_pretrained(tmp_path / "out").backend_tokenizer.pre_tokenizer.pre_tokenize_str("a 12")
    assert [piece for piece, _ in pieces] == expected


def test_missing_tensor_is_named_and_nothing_is_left(tmp_path: Path, tiny_llama: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama, leave_out="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors.*layers\.1\.mlp\.up_proj"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out", dtype=torch.float32)
    assert not (tmp_path / "out").exists()


def test_architecture_that_is_not_supported_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_llama, arch="nonsense")
    with pytest.raises(CheckpointError, match="nonsense"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out", dtype=torch.float32)


@pytest.mark.parametrize("data", [b"", b"GGUF", b"not a gguf file at all, but long enough to be read"])
def test_file_that_is_not_gguf_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match="cannot be read as GGUF"):
        convert_gguf(tmp_path / "x.gguf", tmp_path / "out", dtype=torch.float32)
