"""Which layers of a model are adapted, and an error for every target that names none.

Targets that silently match nothing, or only a part, are the most common silent mistake in this field (peft #3658). Here
each must match, and a coverage table shows what it matched before the training starts.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterable

from torch import nn
from transformers.pytorch_utils import Conv1D

from graftline.adapters.base import Method, embedding_scale, is_quantized, kind_of
from graftline.errors import AdapterError
from graftline.weights.experts import expert_stacks
from graftline.weights.stored import keeps_stored

ALL_LINEAR = "all-linear"
"""Every linear layer except the output head, as in PEFT."""


def find_targets(model: nn.Module, targets: str | tuple[str, ...], *, method: Method) -> dict[str, list[str]]:
    """Paths of the layers that each target names, in the model's order; each path under the first target that names it.

    Args:
        model: the base model.
        targets: ``all-linear`` (every linear layer except the output head; for a bottleneck its sublayers; for full
            fine-tuning every weight), a regular expression for the whole path, or suffixes of paths.
        method: decides what kinds of layers can be adapted.

    Raises:
        AdapterError: a target matches nothing, or something that the method cannot adapt, or ``all-linear`` was written
            for a model with experts.
    """
    if isinstance(targets, str):
        check_pattern(targets, "targets")
    inside = tuple(f"{path}." for path in expert_stacks(model))
    kinds = {n: kind_of(module) for n, module in model.named_modules() if n and not n.startswith(inside)}
    linear = [name for name, kind in kinds.items() if kind in ("linear", "conv1d")]
    if targets == ALL_LINEAR and method.layer is None:
        found = {"every weight": [name for name, module in model.named_modules() if name and _owns_weights(module)]}
    elif targets == ALL_LINEAR and not method.sublayers:
        _refuse_experts(model)
        head = _head_names(model)
        found = {ALL_LINEAR: [name for name in linear if name not in head]}
    elif targets == ALL_LINEAR:
        present = tuple(s for s in method.sublayers if any(_ends_with(name, s) for name in linear))
        found = _match_suffixes(linear, present)
    elif isinstance(targets, str):
        found = {targets: [name for name in kinds if re.fullmatch(targets, name)]}
    else:
        found = _match_suffixes(kinds, targets)
    if not found or not all(found.values()):
        missing = [target for target, names in found.items() if not names] or [str(targets)]
        raise AdapterError(_nothing_matched(model, missing, [n for n, k in kinds.items() if k != "module"]))
    for names in found.values():
        for name in names:
            _check_adaptable(model.get_submodule(name), name, method)
    return _first_only(found)


def check_pattern(pattern: str, name: str) -> None:
    """Raise AdapterError if the pattern of the setting ``name`` is not a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise AdapterError(f"{name}: {pattern!r} is not a regular expression: {error}; correct it") from error


def _match_suffixes(names: Iterable[str], suffixes: Iterable[str]) -> dict[str, list[str]]:
    names = list(names)
    return {suffix: [name for name in names if _ends_with(name, suffix)] for suffix in suffixes}


def _ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _first_only(found: dict[str, list[str]]) -> dict[str, list[str]]:
    seen: set[str] = set()
    unique: dict[str, list[str]] = {}
    for target, names in found.items():
        unique[target] = [name for name in names if name not in seen]
        seen.update(names)
    return unique


def _head_names(model: nn.Module) -> set[str]:
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    return {name for name, module in model.named_modules() if head is not None and module is head}


def _owns_weights(module: nn.Module) -> bool:
    # A quantized layer has codes instead of parameters: it is listed too, and refused.
    return is_quantized(module) or any(True for _ in module.parameters(recurse=False))


def _check_adaptable(layer: nn.Module, name: str, method: Method) -> None:
    kind = kind_of(layer)
    if kind == "experts" and method.expert_layer is None:
        raise AdapterError(
            f"target {name} is a layer of experts, which {method.name} does not take (lora and rslora do); leave it "
            "out, or take another method"
        )
    if method.layer is None:
        if any(is_quantized(module) for module in layer.modules()):
            raise AdapterError(
                f"{name} is quantized and cannot be trained in full; take a dense base or another method"
            )
        return
    if kind == "module" and "Router" in type(layer).__name__:
        raise AdapterError(
            f"target {name} is the router that chooses the experts; it stays frozen: leave it out of targets, or train "
            f"it whole (modules_to_save: [{name.rpartition('.')[2]}])"
        )
    if kind == "module":
        inside = [child for child, module in layer.named_modules() if child and kind_of(module) == "linear"]
        hint = f"; name the linear layers in it: {', '.join(inside[:6])}" if inside else ""
        raise AdapterError(f"target {name} is a {type(layer).__name__}, no linear layer or embedding{hint}")
    if reason := _computes_otherwise(layer, method):
        raise AdapterError(
            f"target {name} is a {type(layer).__name__}, {reason}, so an adapter would be computed wrongly; leave the "
            "layer out of targets, or train it whole (modules_to_save)"
        )
    if kind == "embedding" and not method.embedding_disk_names:
        raise AdapterError(
            f"target {name} is an embedding; {method.name} takes linear layers only (lora and dora take both)"
        )


def _computes_otherwise(layer: nn.Module, method: Method) -> str:
    """Why a layer does not compute what its parent class does, to complete "which is a …,"; empty if it does."""
    parent = next((p for p in (nn.Embedding, nn.Linear, Conv1D) if isinstance(layer, p)), None)
    if parent is None:  # a layer with its own `dense_weight`
        return ""
    if layer._parameters.get("weight") is None:
        return "whose weight is computed from other tensors (a parametrization; remove it first)"
    if keeps_stored(layer) or (type(layer).forward is parent.forward and "forward" not in vars(layer)):
        return ""
    if parent is nn.Embedding and embedding_scale(layer) is not None:
        # peft scales DoRA's embedding only when it is merged, so there is no single right value.
        return (
            "which scales what it looks up, and DoRA on it is defined in two ways" if "m" in method.disk_names else ""
        )
    return f"which does not compute what {parent.__name__} computes"


def _refuse_experts(model: nn.Module) -> None:
    stacks = list(expert_stacks(model))
    if stacks:
        raise AdapterError(
            f"{type(model).__name__} has experts ({stacks[0]} and {len(stacks) - 1} others), which PEFT's all-linear "
            "leaves out without a word; name the layers: q_proj, k_proj, v_proj, o_proj, and experts.gate_up_proj, "
            "experts.down_proj for the experts too"
        )
    experts = [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.ndim == 3 and "expert" in name]
    if experts:
        name, shape = experts[0]
        raise AdapterError(
            f"{name} keeps its experts as one 3-D weight {shape} ({len(experts)} such weights), which no adapter here "
            "covers, and leaving them out silently would not be all-linear; name the layers, for example q_proj, v_proj"
        )


def _nothing_matched(model: nn.Module, missing: list[str], adaptable: list[str]) -> str:
    leaves = Counter(name.rpartition(".")[2] for name in adaptable)
    for target in missing:
        for name, parameter in model.named_parameters():
            if _ends_with(name, target) and parameter.ndim == 3:
                return (
                    f"target {target!r} is the 3-D expert weight {name} {tuple(parameter.shape)}, no linear layer; "
                    "no adapter here covers it"
                )
    near = {close for target in missing for close in difflib.get_close_matches(target, leaves, n=2)}
    names = ", ".join(f"{leaf} ({count})" for leaf, count in leaves.items())
    hint = f" Did you mean {' or '.join(sorted(near))}?" if near else ""
    wanted = ", ".join(repr(target) for target in missing)
    return f"targets {wanted} match no layer of {type(model).__name__}.{hint} Its layers are: {names}"
