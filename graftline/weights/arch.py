"""Which architectures are supported, and what the parts of their checkpoints are called.

Everything that must tell a linear layer's weight from an embedding or a norm by its name asks here.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from graftline.errors import CheckpointError
from graftline.weights.reader import read_json_object

_LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Architecture:
    """Names inside one causal language model class of transformers.

    linears: last components of the linear layers inside the blocks. blocks: path of the list of blocks.
    conv1d: the linears are transformers' Conv1D, whose weight is stored (in, out). scales_embedding: what is
    looked up is multiplied by a factor that the table does not hold. buffers: parts of names that old
    files hold and the class computes from its configuration (rotary frequencies, causal masks).
    """

    name: str
    linears: tuple[str, ...]
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    conv1d: bool = False
    scales_embedding: bool = False
    buffers: tuple[str, ...] = (".rotary_emb.",)

    @property
    def root(self) -> str:
        """Name of the part that holds everything but the head: ``model``, or ``transformer``."""
        return self.blocks.partition(".")[0]

    def is_buffer(self, name: str) -> bool:
        """Whether a stored tensor is one that the class computes itself."""
        return any(part in f".{name}." for part in self.buffers)

    def block_of(self, name: str) -> int | None:
        """Number of the block that a tensor or module belongs to; None outside the blocks."""
        match = re.match(re.escape(self.blocks) + r"\.(\d+)\.", name)
        return int(match.group(1)) if match else None

    def is_linear_weight(self, name: str) -> bool:
        """Whether a tensor is the weight of a linear layer inside a block (the head and embeddings are not)."""
        return self.block_of(name) is not None and name.endswith(tuple(f".{linear}.weight" for linear in self.linears))


ARCHITECTURES = {
    arch.name: arch
    for arch in (
        Architecture("LlamaForCausalLM", _LLAMA_LINEARS),
        Architecture("MistralForCausalLM", _LLAMA_LINEARS),
        Architecture("Qwen2ForCausalLM", _LLAMA_LINEARS),
        Architecture("Qwen3ForCausalLM", _LLAMA_LINEARS),
        Architecture("GemmaForCausalLM", _LLAMA_LINEARS, scales_embedding=True),
        Architecture("Gemma2ForCausalLM", _LLAMA_LINEARS, scales_embedding=True),
        Architecture("Phi3ForCausalLM", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
        Architecture(
            "GPT2LMHeadModel",
            ("c_attn", "c_proj", "c_fc"),
            "transformer.h",
            "transformer.wte",
            conv1d=True,
            buffers=(".attn.bias.", ".attn.masked_bias."),
        ),
    )
}


def read_architecture(folder: Path) -> Architecture:
    """The architecture that a folder's config.json names.

    Where it names none, or the model without its head, it is the causal language model of its ``model_type``, as in
    transformers.

    Raises:
        CheckpointError: no config.json, no single architecture in it, or one that is not supported (known ones listed).
    """
    config = read_json_object(folder / "config.json")
    given, kind = config.get("architectures"), config.get("model_type")
    if isinstance(kind, str) and (not given or given == [MODEL_MAPPING_NAMES.get(kind)]):
        given = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)]
    if not isinstance(given, list) or len(given) != 1 or given[0] not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise CheckpointError(
            f"{folder / 'config.json'} names the architectures {given!r}; exactly one of {known} was expected"
        )
    return ARCHITECTURES[given[0]]
