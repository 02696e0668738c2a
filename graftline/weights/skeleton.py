"""The model that a folder's config.json describes, without memory for its parameters; whether its tensors fit it."""

from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from graftline.errors import CheckpointError
from graftline.weights.config import CONFIG_FILE
from graftline.weights.model_reader import ModelReader


def load_skeleton(folder: Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model that config.json describes, parameters without memory, buffers (rotary frequencies) real.

    Raises:
        CheckpointError: unknown architecture, a config that transformers refuses, no weights.
    """
    return skeleton_of(ModelReader(folder), dtype)


def skeleton_of(reader: ModelReader, dtype: torch.dtype) -> PreTrainedModel:
    """As `load_skeleton`, of a folder that is open."""
    config, class_name = reader.config, reader.architecture.name
    model_class = getattr(transformers, class_name)
    if not isinstance(config, model_class.config_class):
        raise CheckpointError(
            f"{reader.folder / CONFIG_FILE} names {class_name} with the model_type {config.model_type!r}; "
            f"{model_class.config_class.model_type!r} was expected: correct one of them"
        )
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the tensors themselves say how they are quantized
    config.dtype = dtype
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = model_class(config)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{reader.folder / CONFIG_FILE}: {class_name} cannot be built from it: {error}; correct it"
        ) from error
    # Not the folder's generation_config.json: its penalties and samplers would change greedy answers, which are judged
    # and recorded here as the server gives them.
    model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    return model


def check_tensors(reader: ModelReader) -> None:
    """Whether a dense folder holds every tensor of its model and no other, each in its shape; no weights are read.

    Raises:
        CheckpointError: as `load_model`.
    """
    model = skeleton_of(reader, torch.float32)
    tied = set(model.all_tied_weights_keys)
    for name in reader.names():
        if name not in tied:
            place_of(model, name, reader.info(name).shape)
    missing = sorted(name for name, _ in model.named_parameters() if name not in reader and name not in tied)
    refuse_missing(missing, model, reader.folder)


def place_of(model: nn.Module, name: str, shape: tuple[int, ...]) -> tuple[nn.Module, str]:
    """The module that a tensor is a parameter of, and the parameter's name in it."""
    path, _, last = name.rpartition(".")
    owner = find_module(model, path, name)
    parameter = owner._parameters.get(last)
    if parameter is None:
        raise CheckpointError(
            f"tensor {name!r} is no parameter of {type(model).__name__} as config.json describes it; is this another "
            "model's folder, or is a setting of config.json wrong?"
        )
    if parameter.shape != shape:
        raise CheckpointError(f"tensor {name!r} has shape {shape}, config.json asks for {tuple(parameter.shape)}")
    return owner, last


def find_module(model: nn.Module, path: str, name: str) -> nn.Module:
    """The module at a path; ``name`` is the tensor that it is looked for, for the error."""
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise CheckpointError(
            f"tensor {name!r} has no place in {type(model).__name__} as config.json describes it; is this another "
            "model's folder, or is a setting of config.json wrong (num_hidden_layers)?"
        ) from error


def refuse_missing(missing: list[str], model: PreTrainedModel, folder: Path) -> None:
    """Raise `CheckpointError` if a tensor is missing."""
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors of {type(model).__name__}, for example {missing[0]!r}"
        )
