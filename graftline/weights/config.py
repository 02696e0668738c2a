"""A model's configuration: always through its class, which knows the defaults, old names and derived values.

``config.json`` names only what differs from the class: a missing ``num_key_value_heads`` means as many as attention
heads, a missing ``tie_word_embeddings`` means what the class says (Gemma and GPT-2 tie, Llama does not), a null head
size is derived. So nothing else in this project looks a value up in the file itself.
"""

import dataclasses
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from graftline.errors import CheckpointError
from graftline.weights.arch import read_architecture
from graftline.weights.reader import read_json_object

CONFIG_FILE = "config.json"

_NOT_COMPUTED = frozenset(
    [
        *("architectures", "dtype", "transformers_version", "use_cache", "return_dict", "chunk_size_feed_forward"),
        *("output_hidden_states", "output_attentions", "id2label", "label2id", "problem_type", "initializer_range"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp", "is_encoder_decoder"),
    ]
)
"""Fields that change no logit: how a model is stored, started from, called or stopped (stop tokens are the
tokenizer's)."""
_ONLY_TRAINED_WITH = ("dropout", "_pdrop", "summary_")


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a model folder; ``architectures`` holds the class that is loaded, named there or not.

    Raises:
        CheckpointError: no config.json, no supported architecture, or a value that the class refuses.
    """
    file = folder / CONFIG_FILE
    architecture = read_architecture(folder)
    try:
        # A class of transformers itself, whatever code the folder names: code from a source is never run.
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each class has checks of its own, and their errors have no nearer common root
        raise CheckpointError(f"{file} is refused by transformers: {error}; correct it") from error
    config.architectures = [architecture.name]
    return config


def is_quantized(config: PreTrainedConfig) -> bool:
    """Whether the weights are stored quantized. ``null`` and ``{}``, which tools that dequantize leave, say no."""
    return any(bool(getattr(config, name, None)) for name in ("quantization_config", "compression_config"))


def max_positions(config: PreTrainedConfig) -> int:
    """How many tokens the model may see at once: its positions, or its sliding window where that is shorter.

    A 4-D mask replaces the one that a sliding window needs, hence the second bound.
    """
    bounds = [getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window")]
    return min((bound for bound in bounds if bound), default=2**31)


def computed_by(folder: Path) -> dict[str, Any] | None:
    """What of a folder's configuration changes what the model computes, without what is the class's default.

    So two spellings of one configuration are equal, and a field that a later transformers adds changes nothing. None
    for a folder without config.json, or with one of another kind of model.
    """
    if not (folder / CONFIG_FILE).is_file():
        return None
    raw = read_json_object(folder / CONFIG_FILE)
    if "model_type" not in raw:
        return raw
    config = read_config(folder)
    defaults = type(config).default_config_fields()
    values = config.to_dict()
    names = {field.name for field in dataclasses.fields(type(config))} - _NOT_COMPUTED
    kept = {
        name: values[name]
        for name in sorted(names)
        if values.get(name) is not None
        and values[name] != defaults.get(name)
        and not any(part in name for part in _ONLY_TRAINED_WITH)
    }
    # None is a value where the class has another default: Mistral without a sliding window.
    kept |= {name: None for name in sorted(names) if values.get(name) is None and defaults.get(name) is not None}
    return {"model_type": config.model_type, "class": config.architectures} | kept
