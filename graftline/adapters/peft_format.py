"""Adapters on disk: PEFT's two files, readable by PEFT, and ``graftline.json`` beside them.

    adapter_config.json          its settings; keys sorted
    adapter_model.safetensors    base_model.model.<layer>.lora_A.weight …, fp32
    graftline.json               which base it was trained on (`graftline.adapters.peft_config`)

The same adapter always gives the same bytes: no time, no path and no machine's name is written.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftline.adapters.attach import (
    Coverage,
    adapter_layers,
    attach,
    attachment_of,
    plan_layers,
    trainable_parameters,
)
from graftline.adapters.base import AdapterLayer, State, check_finite
from graftline.adapters.class_head import HEAD, add_class_head, class_head_of
from graftline.adapters.experts import paths_in_file
from graftline.adapters.peft_config import CONFIG_FILE, IDENTITY_FILE, AdapterIdentity, to_config, write_identity
from graftline.adapters.weights import PREFIX, SHARED_PREFIX, WEIGHTS_FILE, AdapterWeights
from graftline.digest import Digest, atomic_write, write_json
from graftline.errors import AdapterError
from graftline.settings.model import Adapter
from graftline.weights.experts import open_experts
from graftline.weights.identity import BaseIdentity, read_identity
from graftline.weights.quant.linear import load_model
from graftline.weights.reader import read_header
from graftline.weights.sharded import whole

__all__ = [
    "AdapterIdentity",
    "AdapterWeights",
    "load_adapter",
    "load_exact",
    "put_on_model",
    "read_initial",
    "save_adapter",
    "write_weights",
]

logger = logging.getLogger(__name__)


def save_adapter(model: nn.Module, folder: Path, *, identity: AdapterIdentity) -> Digest:
    """Write the adapter of a model; existing adapter files in ``folder`` are replaced.

    Returns:
        Digest of the weights' file.

    Raises:
        AdapterError: the model has no adapter, or the adapter holds NaN.
        GraftlineError: the folder cannot be written.
    """
    attachment = attachment_of(model)
    method = attachment.method
    spec = method.disk_form.to_disk(attachment.spec) if method.disk_form else attachment.spec
    layers = adapter_layers(model)
    experts = _experts_of(layers)
    config = to_config(
        spec,
        method,
        targets=_short_targets(model, [name for name in attachment.layer_names if name not in experts]),
        saved_modules=attachment.saved_modules,
        transposed=any(layer.kind == "conv1d" for layer in layers.values()),
        parameters=experts,
    )
    tensors = _disk_tensors(model)
    for name, tensor in tensors.items():
        check_finite(tensor, name)
    head = class_head_of(model)
    identity = replace(identity, labels=head.labels if head else (), experts=spec.experts)
    return _write(folder, tensors, config, identity, method.name)


def write_weights(weights: AdapterWeights, folder: Path) -> Digest:
    """Write an adapter that was read and converted; ``graftline.json`` only if it had one."""
    config = to_config(
        weights.spec,
        weights.method,
        targets=weights.modules(),
        saved_modules=weights.spec.modules_to_save,
        transposed=weights.transposed,
        parameters=weights.experts,
    )
    tensors = {key: tensor.contiguous().clone() for key, tensor in weights.disk_tensors().items()}
    return _write(folder, tensors, config, weights.identity, weights.method.name)


def load_adapter(
    model: nn.Module,
    folder: Path,
    *,
    base: BaseIdentity,
    template_digest: Digest | None = None,
    trainable: bool = False,
) -> None:
    """Put an adapter from disk on a model.

    Args:
        model: the base, without an adapter. Changed in place.
        folder: what `save_adapter` or PEFT's ``save_pretrained`` wrote.
        base: identity of that base; an adapter that was trained on another one is refused.
        template_digest: of the tokenizer in use; None skips that check.
        trainable: whether it will be trained further. Otherwise it is frozen and in evaluation mode.

    Raises:
        BaseMismatchError: the adapter belongs to another base or template.
        AdapterError: files, keys, shapes or values are not right.
    """
    weights = AdapterWeights.open(folder)
    if weights.identity is None:
        logger.warning("%s has no graftline.json: whether it belongs to this base cannot be checked", folder)
    weights.check_base(base, template_digest)
    put_on_model(model, weights)
    if not trainable:
        model.requires_grad_(False)
        model.eval()


def load_exact(base: Path, adapter: Path | None = None, *, device: str = "cpu") -> PreTrainedModel:
    """A model in fp32 arithmetic, with an adapter if one is given; frozen and in evaluation mode.

    On a GPU 16-bit weights stay 16-bit in memory and are converted where they are used: the same numbers in half the
    memory (`graftline.weights.stored`). Weights that the adapter itself holds whole are fp32.

    Raises:
        BaseMismatchError, AdapterError, CheckpointError: as `load_adapter` and `load_model`.
    """
    keep = device != "cpu" and not (adapter and AdapterWeights.open(adapter).holds_base_weights)
    model = load_model(base, device=device, keep=keep)
    if adapter:
        load_adapter(model, adapter, base=read_identity(base))
    return model


def read_initial(file: Path) -> dict[str, State]:
    """Initial factors that an init stage wrote, A (R, I) and B (O, R) by layer: ``<layer>.lora_A``, ``<layer>.lora_B``.

    Raises:
        AdapterError: a key is not that of such a factor, or a value is not finite.
        CheckpointError: the file is damaged.
    """
    read_header(file)
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(file).items():
        check_finite(tensor, key)
        layer, _, factor = key.rpartition(".lora_")
        if not layer or factor not in ("A", "B"):
            raise AdapterError(
                f"{file}: the key {key!r} is no initial factor; expected <layer>.lora_A or <layer>.lora_B"
            )
        states.setdefault(layer, {})[factor] = tensor
    return dict(states)


def put_on_model(model: nn.Module, weights: AdapterWeights) -> None:
    """Attach an adapter with its tensors; nothing is changed if anything is wrong.

    Raises:
        AdapterError: the model lacks a layer, or shapes differ.
    """
    open_experts(model)
    weights = weights.without_copies(lambda name: _tensor_of(model, name))
    missing = [name for name in weights.modules() if not _has_module(model, name)]
    if missing:
        raise AdapterError(
            f"the adapter has the layer {missing[0]} and {len(missing) - 1} others that {type(model).__name__} lacks; "
            "it was made for another architecture"
        )
    _check_carried(model, weights)
    _check_extra(model, weights.replacements())
    if weights.head is not None:
        add_class_head(model, weights.labels, weight_LH=weights.head)
    form, initial = weights.method.disk_form, None
    spec = form.from_disk(weights.spec) if form else weights.spec
    if form:
        initial = {name: form.initial(state) for name, state in weights.states.items()}
    elif weights.method.is_paired:
        initial = dict(weights.states)
    try:
        attach(model, spec, seed=0, initial=initial, shared=weights.shared, states=weights.states)
    except AdapterError:
        if weights.head is not None:
            delattr(model, HEAD)
        raise
    _load_extra(model, weights.extra)


def attach_trained(model: nn.Module, spec: Adapter, weights: AdapterWeights) -> Coverage:
    """Attach ``spec`` with the tensors of a trained adapter of the same shape, to train it further.

    Raises:
        AdapterError: the adapter has another method, or other layers, ranks or scales than ``spec`` gives this model.
    """
    plans = plan_layers(model, spec)
    ours = {name: (plan.rank, plan.scale) for name, plan in plans.items()}
    theirs = {name: (weights.spec.rank_of(name), weights.scale(name)) for name in weights.states}
    if weights.method.name != spec.method or ours.keys() != theirs.keys():
        raise AdapterError(
            f"the adapter to start from is {weights.method.name} on {len(theirs)} layers, this pipeline trains "
            f"{spec.method} on {len(ours)}; expected the same: start afresh, or keep the adapter's settings"
        )
    if weights.spec.experts != spec.experts:
        raise AdapterError(
            f"the adapter to start from was trained with experts: {weights.spec.experts}, this pipeline asks for "
            f"{spec.experts}; expected the same: start afresh, or keep the adapter's settings"
        )
    for name, (rank, scale) in ours.items():
        if theirs[name] != (rank, scale):
            raise AdapterError(
                f"the adapter to start from has rank and scale {theirs[name]} at {name}, this pipeline asks for "
                f"{(rank, scale)}; expected the same: start afresh, or keep the adapter's settings"
            )
    _check_carried(model, weights)
    _check_extra(model, weights.extra)
    head = class_head_of(model)
    if weights.labels != (head.labels if head else ()):
        raise AdapterError(
            f"the adapter to start from has the classes {', '.join(weights.labels) or 'of no head'}, this pipeline has "
            f"{', '.join(head.labels) if head else 'no head'}; expected the same: start afresh"
        )
    coverage = attach(model, spec, seed=0, shared=weights.shared, states=weights.states)
    _load_extra(model, weights.extra)
    return coverage


def _has_module(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _check_carried(model: nn.Module, weights: AdapterWeights) -> None:
    for name, tensor in weights.carried.items():
        weight = model.get_submodule(name).weight
        own = whole(weight) if isinstance(weight, Tensor) else None
        if own is None or tensor.shape != own.shape or not torch.equal(tensor.to(own), own):
            raise AdapterError(
                f"{name}: the adapter carries another weight for this layer; it was trained on another base"
            )


def _tensor_of(model: nn.Module, name: str) -> Tensor | None:
    tensor = model.state_dict().get(name)
    return tensor if isinstance(tensor, Tensor) else None


def _check_extra(model: nn.Module, extra: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    for name, tensor in extra.items():
        if name not in own:
            raise AdapterError(
                f"the adapter holds a tensor {name!r} that {type(model).__name__} lacks; it is for another base"
            )
        if own[name].shape != tensor.shape:
            raise AdapterError(
                f"{name} has shape {tuple(tensor.shape)}, expected {tuple(own[name].shape)}; the adapter is for "
                "another base"
            )


def _load_extra(model: nn.Module, extra: Mapping[str, Tensor]) -> None:
    """Copy whole tensors in: modules_to_save, biases. Their names are those of the base model."""
    layers = adapter_layers(model)
    own: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        layer, _, last = name.rpartition(".base.")
        own[f"{layer}.{last}" if layer in layers else name] = tensor
    for name, tensor in extra.items():
        with torch.no_grad():
            own[name].copy_(tensor)


def _write(
    folder: Path, tensors: dict[str, Tensor], config: dict[str, object], identity: AdapterIdentity | None, method: str
) -> Digest:
    # graftline.json marks a complete adapter: it is removed before the others change and written after them.
    try:
        (folder / IDENTITY_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise AdapterError(f"cannot replace the adapter in {folder}: {error.strerror or error}") from error
    with atomic_write(folder / WEIGHTS_FILE) as out:
        out.write(save(tensors, metadata={"format": "pt"}))
    write_json(folder / CONFIG_FILE, config)
    if identity is not None:
        write_identity(folder, identity, method=method)
    return out.digest


def _disk_tensors(model: nn.Module) -> dict[str, Tensor]:
    attachment = attachment_of(model)
    method = attachment.method
    tensors = {f"{SHARED_PREFIX}{method.shared_disk_names[name]}": t for name, t in attachment.shared.items()}
    layers = adapter_layers(model)
    paths = paths_in_file(_experts_of(layers))
    for name, layer in layers.items():
        suffixes = method.embedding_disk_names if layer.kind == "embedding" else method.disk_names
        path = paths.get(name, name)
        tensors |= {f"{PREFIX}{path}.{suffixes[key]}": tensor for key, tensor in layer.disk_state().items()}
    if method.layer is None:
        tensors |= {f"{PREFIX}{name}": parameter for name, parameter in trainable_parameters(model).items()}
    for name in attachment.saved_modules:
        tensors |= {f"{PREFIX}{name}.{key}": tensor for key, tensor in model.get_submodule(name).state_dict().items()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.rpartition(".")[2] == "bias":
            tensors.setdefault(f"{PREFIX}{name.replace('.base.bias', '.base_layer.bias')}", parameter.detach())
    # safetensors refuses tensors that share memory, so tied ones are copied.
    return {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}


def _experts_of(layers: Mapping[str, AdapterLayer]) -> list[str]:
    return [name for name, layer in layers.items() if layer.kind == "experts"]


def _short_targets(model: nn.Module, names: Sequence[str]) -> list[str]:
    # PEFT matches suffixes of paths, so the last parts will do if nothing else ends in them.
    leaves = {name.rpartition(".")[2] for name in names}
    matched = [n for n, _ in model.named_modules() if n.rpartition(".")[2] in leaves]
    return sorted(leaves) if Counter(matched) == Counter(names) else sorted(names)
