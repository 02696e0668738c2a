"""An adapter for llama.cpp: a GGUF file of low-rank factors, which ``llama-server --lora FILE`` applies to a GGUF base.

    <tensor>.lora_a  (R, I)      <tensor>.lora_b  (O, R)      y = x Wᵀ + (alpha / R) · (x Aᵀ) Bᵀ

The layout and the order of query and key rows are those of llama.cpp's convert_lora_to_gguf.py and llama-adapter.cpp;
the `gguf` package writes the file and names the tensors. Scales are folded into B and smaller ranks are padded with
zeros to the largest, so that alpha = R holds for every layer, rsLoRA and rank patterns included.

Dimensions: O = output features, I = input features, R = rank.
"""

from pathlib import Path

import gguf
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedConfig

from graftline.adapters.convert import to_lora
from graftline.adapters.weights import AdapterWeights
from graftline.errors import ExportError
from graftline.weights.identity import read_identity
from graftline.weights.quant.folder import DequantizingReader

_ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "MistralForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
    "GemmaForCausalLM": gguf.MODEL_ARCH.GEMMA,
    "Gemma2ForCausalLM": gguf.MODEL_ARCH.GEMMA2,
    "Phi3ForCausalLM": gguf.MODEL_ARCH.PHI3,
}
"""transformers' class to llama.cpp's architecture."""


def export_adapter(adapter: Path, out: Path, *, base: Path) -> int:
    """Write the adapter in a folder as the GGUF file ``out`` in fp32; returns the number of layers written.

    ``base`` is the model folder that the adapter was trained on.

    Raises:
        ExportError: llama.cpp cannot load it (all reasons are given), or ``out`` exists.
        BaseMismatchError: the adapter was trained on another base.
        AdapterError: the adapter is damaged.
    """
    reader, weights = DequantizingReader(base), AdapterWeights.open(adapter)
    weights.check_base(read_identity(base))
    weights, config = weights.without_copies(reader.find), reader.config
    if reasons := _refusals(weights, config):
        raise ExportError(f"llama.cpp cannot load this {weights.method.name} adapter: {'; '.join(reasons)}")
    if out.exists():
        raise ExportError(f"{out} exists; name a new file")
    lora = to_lora(weights, shape_of=reader.linear_shape)
    partial = out.with_name(f".{out.name}.part")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write(partial, lora, config)
        partial.rename(out)
    finally:
        partial.unlink(missing_ok=True)
    return len(lora.modules())


def _refusals(weights: AdapterWeights, config: PreTrainedConfig) -> list[str]:
    """Why llama.cpp cannot load it, each with what to do."""
    reasons = []
    name = (config.architectures or [""])[0]
    if name not in _ARCHITECTURES:
        reasons.append(f"adapters of {name} are not written as GGUF, only of {', '.join(_ARCHITECTURES)}; merge it")
    if weights.method.factors is None or weights.method.name == "dora":
        reasons.append(f"it knows low-rank factors only, not {weights.method.name}; merge it (graftline merge)")
    if weights.extra:
        reasons.append("it takes no modules_to_save and no trained biases; merge it, or train without them")
    if weights.identity and weights.identity.initial_digest:
        reasons.append("it belongs to the quantized base that it was made with, which GGUF cannot hold; merge it")
    if weights.embeddings:
        reasons.append("its embedding is adapted, which has another layout; merge it, or leave it out of targets")
    return reasons


def _write(path: Path, lora: AdapterWeights, config: PreTrainedConfig) -> None:
    architecture = _ARCHITECTURES[(config.architectures or [""])[0]]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(lora.spec.rank))
    for module in lora.modules():
        name = names.get_name(module)
        if name is None:
            raise ExportError(f"llama.cpp has no name for {module}; leave it out of targets, or merge the adapter")
        A_RI, B_OR = (lora.tensors(module)[key].float() for key in ("A", "B"))
        missing = lora.spec.rank - A_RI.shape[0]
        A_RI, B_OR = pad(A_RI, (0, 0, 0, missing)), pad(B_OR, (0, missing))
        if architecture == gguf.MODEL_ARCH.LLAMA:
            B_OR = _rows_as_in_llama_cpp(B_OR, module, config)
        writer.add_tensor(f"{name}.weight.lora_a", A_RI.contiguous().numpy())
        writer.add_tensor(f"{name}.weight.lora_b", B_OR.contiguous().numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _rows_as_in_llama_cpp(B_OR: Tensor, module: str, config: PreTrainedConfig) -> Tensor:
    """Query and key rows in llama.cpp's order: it rotates neighbouring rows, transformers the two halves of a head."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    num_heads = heads.get(module.rpartition(".")[2]) or 0
    if not num_heads:
        return B_OR
    rows_PHR = B_OR.reshape(num_heads, 2, -1, B_OR.shape[1]).transpose(1, 2)
    return torch.reshape(rows_PHR, B_OR.shape)
