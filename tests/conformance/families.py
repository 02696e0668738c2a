"""The families of models: small random ones of each, with everything that sets the family apart switched on."""

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

_COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = _COMMON | {"num_key_value_heads": 2}
_WINDOW = {"sliding_window": 6}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


_LONG = {
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.3 * i for i in range(8)],
    "original_max_position_embeddings": 32,
    "factor": 2.0,
}
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", _GROUPED | {"tie_word_embeddings": False}),
    "Llama, linear": ("LlamaForCausalLM", _GROUPED | _rope("linear", factor=4.0)),
    "Llama, dynamic": ("LlamaForCausalLM", _GROUPED | _rope("dynamic", factor=4.0)),
    "Llama, yarn": (
        "LlamaForCausalLM",
        _GROUPED | _rope("yarn", factor=4.0, original_max_position_embeddings=16) | {"tie_word_embeddings": True},
    ),
    "Llama, llama3": ("LlamaForCausalLM", _GROUPED | _rope("llama3", **_LLAMA3) | {"tie_word_embeddings": True}),
    "Llama, longrope": ("LlamaForCausalLM", _GROUPED | _rope("longrope", **_LONG)),
    "Mistral": ("MistralForCausalLM", _GROUPED | _WINDOW | {"head_dim": 32}),
    "Qwen2.5": (
        "Qwen2ForCausalLM",
        _GROUPED | _WINDOW | {"use_sliding_window": True, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "Qwen3": ("Qwen3ForCausalLM", _GROUPED | {"head_dim": 32, "tie_word_embeddings": True}),
    "Gemma": ("GemmaForCausalLM", _GROUPED | {"head_dim": 32}),
    "Gemma 2": (
        "Gemma2ForCausalLM",
        _GROUPED
        | _WINDOW
        | {
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 1.5,
            "layer_types": _MIXED,
        },
    ),
    "Gemma 3": (
        "Gemma3ForCausalLM",
        _GROUPED
        | _WINDOW
        | {
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "final_logit_softcapping": 2.0,
            "layer_types": _MIXED,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0},
            },
        },
    ),
    "Phi-3 and Phi-4": (
        "Phi3ForCausalLM",
        _GROUPED | {"sliding_window": None} | _rope("default", partial_rotary_factor=0.5),
    ),
    "SmolLM3": ("SmolLM3ForCausalLM", _GROUPED | {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}),
    "OLMo 2": ("Olmo2ForCausalLM", _GROUPED),
    "Granite": (
        "GraniteForCausalLM",
        _GROUPED
        | {
            "logits_scaling": 3.0,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.1,
            "tie_word_embeddings": True,
        },
    ),
    "GPT-NeoX": ("GPTNeoXForCausalLM", _COMMON),
    "GPT-2": ("GPT2LMHeadModel", _COMMON | {"n_inner": 48, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}),
}
"""A family (and what its variant has) to its class in transformers and settings."""


def config_of(name: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of one of `MODELS`."""
    class_name, settings = MODELS[name]
    config_class = getattr(transformers, class_name).config_class
    known = set(config_class().to_dict()) | set(config_class.attribute_map)
    config: PreTrainedConfig = config_class(**{k: v for k, v in (settings | changes).items() if k in known})
    config.architectures = [class_name]
    return config


def make_model(name: str, **changes: Any) -> PreTrainedModel:
    """A random model in fp32 whose weights are far enough from zero that every part is seen."""
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, MODELS[name][0])(config_of(name, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tokens(num_rows: int = 2, length: int = 20) -> Tensor:
    """Random tokens (rows, length), past every sliding window."""
    return torch.randint(4, 96, (num_rows, length), generator=torch.Generator().manual_seed(1))
