"""A model folder: its configuration as transformers reads it, its tokenizer, its tensors and where they belong."""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from graftline.errors import CheckpointError
from graftline.extras import refuse_other_versions
from graftline.weights.experts import expert_stacks, find_slot, missing_experts, open_experts
from graftline.weights.reader import (
    ARCHITECTURES,
    INDEX_FILE,
    Architecture,
    CheckpointReader,
    TensorInfo,
    read_architecture,
    read_json_object,
)

# Configurations are always read through their class, which knows defaults, old names and derived values: a missing
# ``num_key_value_heads`` means as many as attention heads, a missing ``tie_word_embeddings`` the class's default (Gemma
# and GPT-2 tie, Llama does not), a null head size is derived.

CONFIG_FILE = "config.json"

_NOT_COMPUTED = frozenset(
    [
        *("architectures", "dtype", "transformers_version", "use_cache", "return_dict", "chunk_size_feed_forward"),
        *("output_hidden_states", "output_attentions", "id2label", "label2id", "problem_type", "initializer_range"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp", "is_encoder_decoder"),
    ]
)
"""Fields that do not change logits: how a model is stored, initialized, called or stopped (stop tokens are the
tokenizer's)."""
_ORIGINAL = "original_max_position_embeddings"
_ONLY_TRAINED_WITH = ("dropout", "_pdrop", "summary_")


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a model folder; its ``architectures`` is the class that is loaded.

    Raises:
        CheckpointError: no config.json, no supported architecture, or a value that the class refuses.
        VersionError: torch or transformers of a version that may compute other numbers.
    """
    refuse_other_versions()
    file = folder / CONFIG_FILE
    architecture = read_architecture(folder)
    try:
        # Always a class of transformers: code from a model folder is never run.
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each class has its own checks, and their errors have no nearer common base
        raise CheckpointError(f"{file} is refused by transformers: {error}; correct it") from error
    config.architectures = [architecture.name]
    # How the model was called where the file was written: an attention that this machine may lack, outputs in a tuple.
    config._attn_implementation = None
    config.return_dict, config.output_attentions, config.output_hidden_states = True, False, False
    return config


def is_quantized(config: PreTrainedConfig) -> bool:
    """Whether the weights are stored quantized; dequantizing tools leave ``null`` or ``{}``."""
    return any(bool(getattr(config, name, None)) for name in ("quantization_config", "compression_config"))


def has_experts(config: PreTrainedConfig) -> bool:
    """Whether a model with this configuration is a mixture of experts."""
    architecture = ARCHITECTURES.get((config.architectures or [""])[0])
    return architecture is not None and bool(architecture.experts)


def max_positions(config: PreTrainedConfig) -> int:
    """How many tokens a text may have; unbounded if the configuration sets no limit.

    YaRN reaches its factor times the original positions; many files leave ``max_position_embeddings`` as it was.
    """
    given = getattr(config, "max_position_embeddings", None)
    if not given:
        return 2**31
    return max([int(given), *(int(rope["factor"] * _original_positions(config, rope)) for rope in _yarns(config))])


def _yarns(config: PreTrainedConfig) -> list[dict[str, Any]]:
    found = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in found.values() if isinstance(value, dict)]  # one for each type of layer
    return [rope for rope in nested or [found] if rope.get("rope_type") == "yarn" and rope.get("factor")]


def _original_positions(config: PreTrainedConfig, rope: dict[str, Any]) -> int:
    return int(rope.get(_ORIGINAL) or config.max_position_embeddings)


def computed_by(folder: Path) -> dict[str, Any] | None:
    """The fields of a folder's configuration that change what the model computes, without the class's defaults.

    So two spellings of one configuration are equal, and a field that a later transformers adds changes nothing. None
    for a folder without config.json. Rotary settings are spelled as the file has them: see `one_spelling`.
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
    # None is a value if the class has another default: Mistral without a sliding window.
    kept |= {name: None for name in sorted(names) if values.get(name) is None and defaults.get(name) is not None}
    return {"model_type": config.model_type, "class": config.architectures} | kept


def one_spelling(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """What `computed_by` found, with one spelling of its rotary settings: the class sees to its own fields alone."""
    return {name: _spelled(value) if name == "rope_parameters" else value for name, value in configuration.items()}


def _spelled(rope: Any) -> Any:
    """Rotary settings, or a value in them.

    Files have 500000 and 500000.0; older ones have ``type`` for ``rope_type``, which transformers keeps beside it.
    """
    if isinstance(rope, dict):
        old = {"type"} if rope.get("type") == rope.get("rope_type") else set()
        return {key: value if key == _ORIGINAL else _spelled(value) for key, value in rope.items() if key not in old}
    if isinstance(rope, list):
        return [_spelled(value) for value in rope]
    return float(rope) if type(rope) is int else rope


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model folder; CheckpointError if there is none, or transformers refuses it."""
    if not (folder / "tokenizer_config.json").is_file():
        raise CheckpointError(f"{folder} has no tokenizer_config.json; a folder with a tokenizer was expected")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each tokenizer has its own checks, and their errors have no nearer common base
        raise CheckpointError(f"the tokenizer in {folder} is refused by transformers: {error}; correct it") from error


logger = logging.getLogger(__name__)


class ModelReader(CheckpointReader):
    """A model folder's tensors, by the names of the model's class.

    As in transformers, folders may differ from what transformers itself writes:

        buffers        rotary frequencies and causal masks in old files are left out: they are computed
        no prefix      ``wte.weight`` for ``transformer.wte.weight``, in models that were saved without their head
        head's name    GPT-NeoX files call it ``embed_out``
        tied head      stored under the head's name only, in the index without being stored, or stored twice
        extra parts    a value head or a vision tower, which the class does not have, are left out

    A tensor inside the model that has no place there is kept, and the loader refuses it.

    Raises:
        CheckpointError: as `CheckpointReader`, no supported architecture, or the index names a tensor that no shard
            holds and that the model needs.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.architecture: Architecture = read_architecture(folder)
        self.absent = {self.architecture.name_of(name): shard for name, shard in self.absent.items()}
        self._tensors = self._own_names(self._tensors)
        self._check_absent()

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The configuration. Two different tensors where the class ties them are both used, as in transformers."""
        config = read_config(self.folder)
        head, embedding = self.tied_names
        if config.tie_word_embeddings and head in self and embedding in self:
            same = self.info(head).shape == self.info(embedding).shape
            if not same or not torch.equal(self.read(head), self.read(embedding)):
                logger.warning("%s ties %s to %s, but stores two tensors: both are used", self.folder, head, embedding)
                config.tie_word_embeddings = False
        return config

    @property
    def tied_names(self) -> tuple[str, str]:
        """Names of the head's and the embedding's weight."""
        return f"{self.architecture.head}.weight", f"{self.architecture.embedding}.weight"

    def _own_names(self, stored: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
        architecture, own, beside = self.architecture, {}, []
        bare = not any(name.startswith(f"{architecture.root}.") for name in stored)
        for stored_name, info in stored.items():
            name = architecture.name_of(stored_name)
            first = name.partition(".")[0]
            if architecture.is_buffer(name):
                continue
            if first != architecture.head and bare:
                name = f"{architecture.root}.{name}"
            elif first not in (architecture.head, architecture.root):
                beside.append(name)
                continue
            own[name] = replace(info, name=name)
        if beside:
            logger.warning(
                "%s: %d tensors are left out, %s does not have them: %s",
                self.folder, len(beside), architecture.name, ", ".join(sorted(beside)[:5]),
            )  # fmt: skip
        head, embedding = self.tied_names
        if embedding not in own and head in own and read_config(self.folder).tie_word_embeddings:
            own[embedding] = replace(own.pop(head), name=embedding)
        return own

    def _check_absent(self) -> None:
        head, _ = self.tied_names
        needed = [name for name in self.absent if not self.architecture.is_buffer(name)]
        if needed == [head] and read_config(self.folder).tie_word_embeddings:
            return
        if needed:
            raise CheckpointError(
                f"{self.folder / INDEX_FILE} names {needed[0]!r} in {self.absent[needed[0]]}, which does not hold it "
                f"({len(needed)} such tensors); fetch the model folder again"
            )


def load_skeleton(folder: Path) -> PreTrainedModel:
    """The fp32 model that a folder's config.json describes, see `skeleton_of`."""
    return skeleton_of(ModelReader(folder), torch.float32)


def skeleton_of(reader: ModelReader, dtype: torch.dtype) -> PreTrainedModel:
    """The model that config.json describes: parameters without memory, real buffers (rotary frequencies).

    Experts are `graftline.weights.experts.ExpertStack`s.

    Raises:
        CheckpointError: config.json does not fit the class, or transformers refuses it.
    """
    config, class_name = reader.config, reader.architecture.name
    model_class = getattr(transformers, class_name)
    if not isinstance(config, model_class.config_class):
        raise CheckpointError(
            f"{reader.folder / CONFIG_FILE} names {class_name} with the model_type {config.model_type!r}; "
            f"{model_class.config_class.model_type!r} was expected: correct one of them"
        )
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the tensors show how they are quantized
    config.dtype = dtype
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = model_class(config)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, AssertionError, ImportError) as error:
        raise CheckpointError(
            f"{reader.folder / CONFIG_FILE}: {class_name} cannot be built from it: {error}; correct it"
        ) from error
    open_experts(model)
    # Not the folder's generation_config.json: its penalties and samplers would change the greedy answers that are
    # judged and recorded, and that the server must give.
    model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    return model


def check_tensors(reader: ModelReader) -> None:
    """Raise CheckpointError unless a dense folder holds exactly the tensors of its model; no weights are read."""
    model = skeleton_of(reader, torch.float32)
    tied = set(model.all_tied_weights_keys)
    for name in reader.names():
        if name not in tied and not find_slot(model, name, reader.info(name).shape):
            place_of(model, name, reader.info(name).shape)
    by_expert = {f"{path}.weight" for path in expert_stacks(model)}
    missing = (name for name, _ in model.named_parameters() if name not in reader and name not in tied | by_expert)
    refuse_missing([*sorted(missing), *missing_experts(model, reader.names())], model, reader.folder)


def place_of(model: nn.Module, name: str, shape: tuple[int, ...]) -> tuple[nn.Module, str]:
    """The module that a tensor is a parameter of, and the parameter's name in it."""
    path, _, last = name.rpartition(".")
    owner = find_module(model, path, name)
    parameter = owner._parameters.get(last)
    if parameter is None:
        raise CheckpointError(
            f"tensor {name!r} is not a parameter of {type(model).__name__} as config.json describes it; is this "
            "another model's folder, or is a setting of config.json wrong?"
        )
    if parameter.shape != shape:
        raise CheckpointError(f"tensor {name!r} has shape {shape}, config.json asks for {tuple(parameter.shape)}")
    return owner, last


def find_module(model: nn.Module, path: str, name: str) -> nn.Module:
    """The module at a path; ``name`` is the tensor that belongs there, for the error."""
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise CheckpointError(
            f"tensor {name!r} has no place in {type(model).__name__} as config.json describes it; is this another "
            "model's folder, or is a setting of config.json wrong (num_hidden_layers)?"
        ) from error


def refuse_missing(missing: list[str], model: PreTrainedModel, folder: Path) -> None:
    """Raise CheckpointError if a tensor is missing."""
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors of {type(model).__name__}, for example {missing[0]!r}"
        )
