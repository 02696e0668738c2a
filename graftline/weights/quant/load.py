"""Load a model folder: dense, or quantized with `QuantLinear` in place of the linear layers.

The model is made without memory for its parameters; tensors are then read one by one and put in place, so that loading
takes one copy of the weights and one tensor.
"""

from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from graftline.errors import CheckpointError
from graftline.weights.cast import cast
from graftline.weights.config import CONFIG_FILE
from graftline.weights.model_reader import ModelReader
from graftline.weights.quant.linear import QuantLinear
from graftline.weights.quant.tensors import from_tensors, part_names, quantized_weights


def load_model(folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model from a folder, in evaluation mode, floating-point parameters in ``dtype``.

    Quantized weights stay as they are stored; their layers are `QuantLinear`. Tied weights share memory.

    Raises:
        CheckpointError: unknown architecture, damaged weights, tensors missing, left over or of a wrong shape.
        NumberTypeError: a weight does not fit ``dtype``.
        QuantizeError: quantized in a way that is not supported.
    """
    reader = ModelReader(folder)
    model = _skeleton(reader, dtype)
    left = set(reader.names())
    for name, state_key in quantized_weights(reader.names()).items():
        left -= {name, state_key, *part_names(name, reader.names())}
        bias_name = name.removesuffix("weight") + "bias"
        bias = cast(reader.read(bias_name), dtype, bias_name) if bias_name in left else None
        left.discard(bias_name)
        _put_quantized(
            model, name.removesuffix(".weight"), QuantLinear(from_tensors(name, state_key, reader.read), bias)
        )
    for name in sorted(left - set(model.all_tied_weights_keys)):
        owner, last = _place(model, name, reader.info(name).shape)
        owner._parameters[last] = nn.Parameter(cast(reader.read(name), dtype, name))
    model.tie_weights()
    _check_complete(model, folder)
    model.to(torch.device(device))  # type: ignore[arg-type] # transformers wraps nn.Module.to without its types
    return model.eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model folder.

    Raises:
        CheckpointError: the folder has none, or transformers refuses it.
    """
    if not (folder / "tokenizer_config.json").is_file():
        raise CheckpointError(f"{folder} has no tokenizer_config.json; a folder with a tokenizer was expected")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each tokenizer has checks of its own, and their errors have no nearer common root
        raise CheckpointError(f"the tokenizer in {folder} is refused by transformers: {error}; correct it") from error


def check_tensors(reader: ModelReader) -> None:
    """Whether a dense folder holds every tensor of its model and no other, each in its shape; no weights are read.

    Raises:
        CheckpointError: as `load_model`.
    """
    model = _skeleton(reader, torch.float32)
    tied = set(model.all_tied_weights_keys)
    for name in reader.names():
        if name not in tied:
            _place(model, name, reader.info(name).shape)
    missing = sorted(name for name, _ in model.named_parameters() if name not in reader and name not in tied)
    _refuse_missing(missing, model, reader.folder)


def load_skeleton(folder: Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model that config.json describes, parameters without memory, buffers (rotary frequencies) real.

    Raises:
        CheckpointError: unknown architecture, a config that transformers refuses, no weights.
    """
    return _skeleton(ModelReader(folder), dtype)


def _skeleton(reader: ModelReader, dtype: torch.dtype) -> PreTrainedModel:
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


def _place(model: nn.Module, name: str, shape: tuple[int, ...]) -> tuple[nn.Module, str]:
    """The module that a tensor is a parameter of, and the parameter's name in it."""
    path, _, last = name.rpartition(".")
    owner = _find(model, path, name)
    parameter = owner._parameters.get(last)
    if parameter is None:
        raise CheckpointError(
            f"tensor {name!r} is no parameter of {type(model).__name__} as config.json describes it; is this another "
            "model's folder, or is a setting of config.json wrong?"
        )
    if parameter.shape != shape:
        raise CheckpointError(f"tensor {name!r} has shape {shape}, config.json asks for {tuple(parameter.shape)}")
    return owner, last


def _put_quantized(model: nn.Module, path: str, layer: QuantLinear) -> None:
    """Put a quantized layer in the place of a linear one."""
    old = _find(model, path, path)
    weight = getattr(old, "weight", None)
    if not isinstance(old, nn.Linear | Conv1D) or weight is None:
        raise CheckpointError(f"{path} is quantized, but is no linear layer of {type(model).__name__}")
    shape = tuple(weight.shape) if isinstance(old, nn.Linear) else tuple(weight.shape)[::-1]
    if (layer.out_features, layer.in_features) != shape:
        raise CheckpointError(f"{path} is quantized with shape {layer.quantized.shape}, config.json asks for {shape}")
    if (layer.bias is None) != (old.bias is None):
        raise CheckpointError(f"{path} has a bias in only one of its weights and config.json")
    parent, _, last = path.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def _find(model: nn.Module, path: str, name: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise CheckpointError(
            f"tensor {name!r} has no place in {type(model).__name__} as config.json describes it; is this another "
            "model's folder, or is a setting of config.json wrong (num_hidden_layers)?"
        ) from error


def _check_complete(model: PreTrainedModel, folder: Path) -> None:
    _refuse_missing(sorted(name for name, parameter in model.named_parameters() if parameter.is_meta), model, folder)


def _refuse_missing(missing: list[str], model: PreTrainedModel, folder: Path) -> None:
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors of {type(model).__name__}, for example {missing[0]!r}"
        )
