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
from graftline.digest import rename_synced
from graftline.errors import ExportError
from graftline.weights.identity import read_identity
from graftline.weights.quant.folder import DequantizingReader

ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "MistralForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
    "GemmaForCausalLM": gguf.MODEL_ARCH.GEMMA,
    "Gemma2ForCausalLM": gguf.MODEL_ARCH.GEMMA2,
    "Gemma3ForCausalLM": gguf.MODEL_ARCH.GEMMA3,
    "Phi3ForCausalLM": gguf.MODEL_ARCH.PHI3,
    "SmolLM3ForCausalLM": gguf.MODEL_ARCH.SMOLLM3,
    "Olmo2ForCausalLM": gguf.MODEL_ARCH.OLMO2,
    "GraniteForCausalLM": gguf.MODEL_ARCH.GRANITE,
    "GPTNeoXForCausalLM": gguf.MODEL_ARCH.GPTNEOX,
    "GPT2LMHeadModel": gguf.MODEL_ARCH.GPT2,
}
"""transformers' class to llama.cpp's architecture."""
_ROTATES_NEIGHBOURS = (gguf.MODEL_ARCH.LLAMA, gguf.MODEL_ARCH.SMOLLM3, gguf.MODEL_ARCH.GRANITE)
"""llama.cpp rotates neighbouring rows of these models' queries and keys; transformers the two halves of a head."""


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
        rename_synced(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return len(lora.modules())


def _refusals(weights: AdapterWeights, config: PreTrainedConfig) -> list[str]:
    """Why llama.cpp cannot load it, each with what to do."""
    reasons = []
    name = (config.architectures or [""])[0]
    if name not in ARCHITECTURES:
        reasons.append(f"adapters of {name} are not written as GGUF, only of {', '.join(ARCHITECTURES)}; merge it")
    if weights.method.factors is None or weights.method.name == "dora":
        reasons.append(f"it knows low-rank factors only, not {weights.method.name}; merge it (graftline merge)")
    if weights.head is not None:
        reasons.append("it takes no head for classes; serve it with graftline serve")
    elif weights.extra:
        reasons.append("it takes no modules_to_save and no trained biases; merge it, or train without them")
    if weights.identity and weights.identity.initial_digest:
        reasons.append("it belongs to the quantized base that it was made with, which GGUF cannot hold; merge it")
    if weights.embeddings:
        reasons.append("its embedding is adapted, which has another layout; merge it, or leave it out of targets")
    return reasons


def _write(path: Path, lora: AdapterWeights, config: PreTrainedConfig) -> None:
    architecture = ARCHITECTURES[(config.architectures or [""])[0]]
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
        B_OR = rows_as_in_llama_cpp(B_OR, module, config)
        writer.add_tensor(f"{name}.weight.lora_a", A_RI.contiguous().numpy())
        writer.add_tensor(f"{name}.weight.lora_b", B_OR.contiguous().numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def rows_as_in_llama_cpp(B_OR: Tensor, module: str, config: PreTrainedConfig) -> Tensor:
    """A weight, or a B, with its rows in llama.cpp's order; a layer whose order is transformers' stays as it is."""
    layer, architecture = module.rpartition(".")[2], ARCHITECTURES[(config.architectures or [""])[0]]
    if architecture in _ROTATES_NEIGHBOURS and layer in ("q_proj", "k_proj"):
        num_heads = config.num_attention_heads if layer == "q_proj" else config.num_key_value_heads
        rows_PHR = B_OR.reshape(num_heads, 2, -1, B_OR.shape[1]).transpose(1, 2)
    elif architecture == gguf.MODEL_ARCH.GPTNEOX and layer == "query_key_value":
        # transformers has a head's query, key and value rows together, llama.cpp all queries first.
        rows_PHR = B_OR.reshape(config.num_attention_heads, 3, -1, B_OR.shape[1]).transpose(0, 1)
    else:
        return B_OR
    return torch.reshape(rows_PHR, B_OR.shape)
