"""Load a model folder: dense, or quantized with `QuantLinear` in place of the linear layers.

The model is made without memory for its parameters; tensors are then read one by one and put in place, so that loading
takes one copy of the weights and one tensor.
"""

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from graftline.errors import CheckpointError
from graftline.weights.cast import cast
from graftline.weights.model_reader import ModelReader
from graftline.weights.quant.linear import QuantLinear
from graftline.weights.quant.tensors import from_tensors, part_names, quantized_weights
from graftline.weights.skeleton import find_module, place_of, refuse_missing, skeleton_of


def load_model(folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model from a folder, in evaluation mode, floating-point parameters in ``dtype``.

    Quantized weights stay as they are stored; their layers are `QuantLinear`. Tied weights share memory.

    Raises:
        CheckpointError: unknown architecture, damaged weights, tensors missing, left over or of a wrong shape.
        NumberTypeError: a weight does not fit ``dtype``.
        QuantizeError: quantized in a way that is not supported.
    """
    reader = ModelReader(folder)
    model = skeleton_of(reader, dtype)
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
        owner, last = place_of(model, name, reader.info(name).shape)
        owner._parameters[last] = nn.Parameter(cast(reader.read(name), dtype, name))
    model.tie_weights()
    _check_complete(model, folder)
    model.to(torch.device(device))  # type: ignore[arg-type] # transformers wraps nn.Module.to without its types
    return model.eval()


def _put_quantized(model: nn.Module, path: str, layer: QuantLinear) -> None:
    """Put a quantized layer in the place of a linear one."""
    old = find_module(model, path, path)
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


def _check_complete(model: PreTrainedModel, folder: Path) -> None:
    refuse_missing(sorted(name for name, parameter in model.named_parameters() if parameter.is_meta), model, folder)
