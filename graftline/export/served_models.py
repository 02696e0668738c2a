"""Which models the serving graph computes, and how their layers differ.

Everything is read from the configuration, so that a model is refused before its weights are read or an adapter is
trained for it.
"""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from graftline.errors import ExportError
from graftline.weights.model_folder import max_positions

SUPPORTED = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma3ForCausalLM",
)
_GEMMA = "Gemma3ForCausalLM"
_NORMS_QUERIES = ("Qwen3ForCausalLM", _GEMMA)
_ROPE = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}
"""transformers' names to the functions that the graph has."""
_HEAD_SIZE_STEP = 16
"""GroupQueryAttention with rotary embedding (onnxruntime 1.31) refuses other sizes, but only at the first step."""
ADAPTED_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Last parts of the names of the layers inside blocks whose adapters are inputs of the graph."""
_WAY_ON = (
    "serve this base with vLLM (graftline serve --print-vllm), or merge the adapter and serve it with transformers"
)


@dataclass(frozen=True)
class Traits:
    """How a model differs from Llama. Lists have one entry per layer."""

    activation: str
    """silu, gelu or gelu_tanh."""
    windows: tuple[int | None, ...]
    """How many tokens a token sees, itself included; None: all tokens before it."""
    ropes: tuple[str, ...]
    """Type of the layer whose rotary frequencies are used; empty where the model has one set."""
    attention_scale: float | None
    """Factor of the products of queries and keys; None: 1/√(head size)."""
    norms_queries: bool
    """Queries and keys are normalized head by head, before the rotary embedding."""
    is_gemma: bool
    """Embeddings are scaled by √(hidden size), norms multiply by 1 + weight, and sublayers' outputs are normalized."""
    logit_cap: float | None
    """Logits y become cap · tanh(y / cap)."""


def traits_of(config: PreTrainedConfig) -> Traits:
    """The traits of a model that `check_supported` accepts."""
    name, num_layers = architecture_of(config), config.num_hidden_layers
    types = getattr(config, "layer_types", None) or ("full_attention",) * num_layers
    sliding, window = [kind == "sliding_attention" for kind in types], getattr(config, "sliding_window", None)
    if name == "MistralForCausalLM":
        sliding = [True] * num_layers
    is_gemma = name == _GEMMA
    return Traits(
        activation=_ACTIVATIONS[_activation(config)],
        windows=tuple(window if slides else None for slides in sliding),
        ropes=tuple(types) if is_gemma else ("",) * num_layers,
        attention_scale=config.query_pre_attn_scalar**-0.5 if is_gemma else None,
        norms_queries=name in _NORMS_QUERIES,
        is_gemma=is_gemma,
        logit_cap=getattr(config, "final_logit_softcapping", None) if is_gemma else None,
    )


def head_dim_of(config: PreTrainedConfig) -> int:
    """Width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def architecture_of(config: PreTrainedConfig) -> str:
    """Name of the model class that a config is for; the causal language model of its type where it names none."""
    return (config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "unknown")])[0]


def max_served_positions(config: PreTrainedConfig) -> int:
    """How many positions the graph's rotary tables have.

    ``longrope`` has other frequencies for texts longer than those of the original training. A key in the cache would
    have to be rotated anew when a text grows past that length, which transformers does not do either (its answer then
    depends on where the prompt ended). The graph ends there. ``dynamic`` changes only past ``max_position_embeddings``.
    """
    ends = [max_positions(config)]
    ends += [one["original_max_position_embeddings"] for one in _ropes(config) if one["rope_type"] == "longrope"]
    return int(min(ends))


def check_supported(config: PreTrainedConfig) -> None:
    """Refuse models that the graph would compute wrongly, or ONNX Runtime not at all.

    Raises:
        ExportError: another architecture, activation, head size or kind of attention, or a rotary embedding that covers
            a part of each head. Every reason is named.
    """
    if reasons := refusals(config):
        raise ExportError(f"no serving graph for {'; nor for '.join(reasons)}; {_WAY_ON}")


def refusals(config: PreTrainedConfig) -> list[str]:
    """Features of a model that the graph does not compute; empty if it can be served."""
    architecture = architecture_of(config)
    if architecture not in SUPPORTED:
        return [f"{architecture} (supported are {', '.join(SUPPORTED)})"]
    reasons = []
    if _activation(config) not in _ACTIVATIONS:
        reasons.append(f"the activation {_activation(config)!r} (supported are {', '.join(_ACTIVATIONS)})")
    if architecture == "LlamaForCausalLM" and getattr(config, "sliding_window", None):
        reasons.append(f"sliding window attention ({config.sliding_window} tokens), which {architecture} does not have")
    if getattr(config, "use_bidirectional_attention", False):
        reasons.append("attention to later tokens (use_bidirectional_attention)")
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    reasons += [f"layers of the type {kind!r}" for kind in unknown]
    for rope in _ropes(config):
        if rope["rope_type"] not in _ROPE:
            reasons.append(f"rope_type {rope['rope_type']!r} (supported are {', '.join(_ROPE)})")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            factor = rope["partial_rotary_factor"]
            reasons.append(f"rotary embedding of a part of each head (partial_rotary_factor {factor})")
    if head_dim_of(config) % _HEAD_SIZE_STEP:
        reasons.append(
            f"heads of size {head_dim_of(config)} (ONNX Runtime's attention takes multiples of {_HEAD_SIZE_STEP})"
        )
    return reasons


def _activation(config: PreTrainedConfig) -> str:
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def _ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The parameters of each set of rotary frequencies."""
    found = config.rope_parameters or {}
    nested = [value for value in found.values() if isinstance(value, dict)]
    return [{"rope_type": "default"} | one for one in nested or [found]]
