"""Load a model folder: dense, or quantized with `QuantLinear` in place of the linear layers.

The model is made without memory for its parameters; tensors are then read one by one and put in place, so that loading
takes one copy of the weights and one tensor.
"""

from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from graftline.errors import CheckpointError
from graftline.weights.arch import read_architecture
from graftline.weights.quant.linear import QuantLinear
from graftline.weights.quant.tensors import from_tensors, part_names, quantized_weights
from graftline.weights.reader import CheckpointReader


def load_model(folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model from a folder, in evaluation mode, floating-point parameters in ``dtype``.

    Quantized weights stay as they are stored; their layers are `QuantLinear`. Tied weights share memory.

    Raises:
        CheckpointError: unknown architecture, damaged weights, tensors missing, left over or of a wrong shape.
        QuantizeError: quantized in a way that is not supported.
    """
    reader = CheckpointReader(folder)
    model = load_skeleton(folder, dtype=dtype)
    left = set(reader.names())
    for name, state_key in quantized_weights(reader.names()).items():
        left -= {name, state_key, *part_names(name, reader.names())}
        bias_name = name.removesuffix("weight") + "bias"
        bias = reader.read(bias_name).to(dtype) if bias_name in left else None
        left.discard(bias_name)
        _put_quantized(
            model, name.removesuffix(".weight"), QuantLinear(from_tensors(name, state_key, reader.read), bias)
        )
    tied = model.all_tied_weights_keys
    for name in sorted(left):
        if name in tied:
            _check_tied(reader, name, tied[name])
        else:
            _put(model, name, reader.read(name), dtype)
    model.tie_weights()
    _check_complete(model, folder)
    model.to(torch.device(device))  # type: ignore[arg-type] # transformers wraps nn.Module.to without its types
    return model.eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model folder.

    Raises:
        CheckpointError: the folder has none.
    """
    if not (folder / "tokenizer_config.json").is_file():
        raise CheckpointError(f"{folder} has no tokenizer_config.json; a folder with a tokenizer was expected")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_skeleton(folder: Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model that config.json describes, parameters without memory, buffers (rotary frequencies) real.

    Raises:
        CheckpointError: unknown architecture, a config that transformers refuses.
    """
    class_name = read_architecture(folder).name
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'config.json'} is refused by transformers: {error}") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the tensors themselves say how they are quantized
    config.dtype = dtype
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = getattr(transformers, class_name)(config)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def _put(model: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Make a tensor a parameter of the model, without a copy where the dtype is already right."""
    path, _, last = name.rpartition(".")
    owner = _find(model, path, name)
    parameter = owner._parameters.get(last)
    if parameter is None:
        raise CheckpointError(
            f"tensor {name!r} is no parameter of {type(model).__name__}; is this another model's folder?"
        )
    if parameter.shape != tensor.shape:
        raise CheckpointError(
            f"tensor {name!r} has shape {tuple(tensor.shape)}, config.json asks for {tuple(parameter.shape)}"
        )
    owner._parameters[last] = nn.Parameter(tensor.to(dtype))


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
            f"tensor {name!r} has no place in {type(model).__name__}; is this another model's folder?"
        ) from error


def _check_tied(reader: CheckpointReader, name: str, source: str) -> None:
    """A tied weight may be stored twice, but only with the same values."""
    if source not in reader or not torch.equal(reader.read(name), reader.read(source)):
        raise CheckpointError(
            f"{reader.folder}: config.json ties {name} to {source}, but the stored values differ; "
            "set tie_word_embeddings to false in config.json, or remove the tensor"
        )


def _check_complete(model: PreTrainedModel, folder: Path) -> None:
    missing = sorted(name for name, parameter in model.named_parameters() if parameter.is_meta)
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors of {type(model).__name__}, for example {missing[0]!r}"
        )
