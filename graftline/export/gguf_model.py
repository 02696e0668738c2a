"""A merged model as one GGUF file for llama.cpp and what is built on it: weights, settings, tokenizer, chat template.

    f16      every matrix in fp16
    q8_0     every matrix in 8-bit integers, 32 to a scale
    q4_k_m   mixed 4 and 6 bits, by llama.cpp's own llama-quantize, if it is installed

Norms and biases are fp32. Names, keys and the order of query and key rows are those of llama.cpp's
convert_hf_to_gguf.py; the `gguf` package writes the file. What llama.cpp would compute otherwise than transformers is
refused, not written.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal, get_args

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from graftline.errors import ExportError
from graftline.export.gguf_adapter import ARCHITECTURES, rows_as_in_llama_cpp
from graftline.logs import OnProgress, silent
from graftline.weights.model_folder import ModelReader, is_quantized, load_tokenizer

GgufKind = Literal["f16", "q8_0", "q4_k_m"]
GGUF_KINDS: tuple[GgufKind, ...] = get_args(GgufKind)
_TYPES = {"f16": gguf.GGMLQuantizationType.F16, "q8_0": gguf.GGMLQuantizationType.Q8_0}
_FILE_TYPES = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
_FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_Q8_GROUP = 32
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_WORDS % r"\p{N}{1,3}": "llama-bpe", _WORDS % r"\p{N}": "qwen2"}
"""llama.cpp's name for how words are split, by the regular expression in tokenizer.json."""
_QUANTIZER = "llama-quantize"


def export_model(merged: Path, out: Path, kind: GgufKind, *, on_progress: OnProgress = silent) -> None:
    """Write a dense model folder as the GGUF file ``out``, which must not exist.

    Raises:
        ExportError: llama.cpp cannot compute this model, a weight does not fit fp16, or llama-quantize is missing or
            fails.
    """
    if kind == "q4_k_m":
        _quantize(merged, out, on_progress)
        return
    reader = ModelReader(merged)
    refuse_model(reader.config)
    tokenizer = load_tokenizer(merged)
    pre = pre_tokenizer(tokenizer)
    config, architecture = reader.config, ARCHITECTURES[reader.architecture.name]
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[architecture], use_temp_file=True)
    try:
        _add_settings(writer, config, kind)
        _add_tokenizer(writer, tokenizer, pre, config.vocab_size)
        names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
        for done, name in enumerate(reader.names(), start=1):
            target = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if target is None:
                raise ExportError(f"llama.cpp has no name for the tensor {name}; ship the merged folder instead")
            _add_tensor(writer, target, name, reader.read(name), config, kind)
            on_progress(done, len(reader.names()))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def refuse_model(config: PreTrainedConfig) -> None:
    """Raise ExportError for what llama.cpp cannot compute, or would compute otherwise."""
    name = (config.architectures or [""])[0]
    rope = getattr(config, "rope_parameters", None) or {}
    windows = getattr(config, "layer_types", None) or []
    reasons = []
    if name not in _FAMILIES:
        reasons.append(f"{name} is not written as GGUF, only {', '.join(_FAMILIES)}")
    if is_quantized(config):
        reasons.append("it is quantized already; give a merged model in 16 or 32 bits")
    if rope.get("rope_type", "default") != "default":
        reasons.append(f"its positions are scaled ({rope['rope_type']})")
    if "sliding_attention" in windows or (name == "MistralForCausalLM" and config.sliding_window):
        reasons.append("its attention has a sliding window")
    if getattr(config, "mlp_bias", False) or (getattr(config, "attention_bias", False) and name not in _FAMILIES[2:]):
        reasons.append("its linear layers have biases that this family does not have in llama.cpp")
    if getattr(config, "hidden_act", "silu") != "silu":
        reasons.append(f"its activation is {config.hidden_act}, not silu")
    if reasons:
        raise ExportError(
            f"no GGUF file can be made of this model: {'; '.join(reasons)}; ship the merged folder instead"
        )


def pre_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name for how a tokenizer splits words; ExportError if it is not a byte-level BPE that it knows."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    parts, normalizer = described["pre_tokenizer"] or {}, described["normalizer"] or {}
    parts = parts.get("pretokenizers", [parts])
    last = parts[-1] if parts else {}
    is_byte_level = (
        described["model"]["type"] == "BPE"
        and last.get("type") == "ByteLevel"
        and not last.get("add_prefix_space")
        and normalizer.get("type", "NFC") == "NFC"
    )
    kinds = [part["type"] for part in parts[:-1]] if is_byte_level else [""]
    if kinds == [] and last.get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits"] and parts[0]["individual_digits"] and last.get("use_regex", True):
        return "smollm"
    if kinds == ["Split"] and (name := _SPLITS.get(parts[0]["pattern"].get("Regex", ""))):
        return name
    raise ExportError(
        "llama.cpp has no name for how this tokenizer splits words; expected a byte-level BPE as that of GPT-2, "
        "SmolLM2, Llama 3 or Qwen 2"
    )


def _add_settings(writer: gguf.GGUFWriter, config: PreTrainedConfig, kind: GgufKind) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, pre: str, num_tokens: int) -> None:
    described: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for index in range(num_tokens):
        tokens.append(names.get(index, f"[PAD{index}]"))
        if index not in names:
            types.append(gguf.TokenType.UNUSED)
        elif index in added:
            types.append(gguf.TokenType.CONTROL if added[index].special else gguf.TokenType.USER_DEFINED)
        else:
            types.append(gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = described["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    special = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "pad": writer.add_pad_token_id,
        "unk": writer.add_unk_token_id,
    }
    for name, add in special.items():
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            add(index)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(len(ids) > 0 and ids[0] == tokenizer.bos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _add_tensor(
    writer: gguf.GGUFWriter, target: str, name: str, tensor: Tensor, config: PreTrainedConfig, kind: GgufKind
) -> None:
    tensor = rows_as_in_llama_cpp(tensor.float(), name.rpartition(".")[0], config)
    as_type = _TYPES[kind]
    if tensor.ndim == 1:
        as_type = gguf.GGMLQuantizationType.F32
    elif tensor.shape[-1] % _Q8_GROUP:
        as_type = gguf.GGMLQuantizationType.F16
    if as_type == gguf.GGMLQuantizationType.F16 and float(tensor.abs().max()) > torch.finfo(torch.float16).max:
        raise ExportError(f"{name} has a weight beyond fp16's range; take fp8 or w4a16, whose scales hold it")
    packed = gguf.quantize(tensor.contiguous().numpy(), as_type)
    writer.add_tensor(target, packed, raw_dtype=as_type)


def _quantize(merged: Path, out: Path, on_progress: OnProgress) -> None:
    """Q4_K_M through llama.cpp's own tool, from an F16 file that is removed again."""
    tool = shutil.which(_QUANTIZER)
    if tool is None:
        raise ExportError(
            f"q4_k_m is made by llama.cpp's {_QUANTIZER}, which is not on the PATH; install llama.cpp "
            "(https://github.com/ggml-org/llama.cpp), or take q8_0"
        )
    half = out.with_name(f"{out.stem}-f16.gguf")
    try:
        export_model(merged, half, "f16", on_progress=on_progress)
        done = subprocess.run(
            [tool, str(half), str(out), "Q4_K_M"], capture_output=True, encoding="utf-8", errors="replace"
        )
        if done.returncode:
            said = " ".join((done.stderr or done.stdout).split())[-300:]
            raise ExportError(f"{tool} ended with exit code {done.returncode}: {said}; try another layout")
    finally:
        half.unlink(missing_ok=True)
