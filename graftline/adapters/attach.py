"""Attach an adapter to a model: freeze it, wrap the layers that the targets name, and report the coverage.

The model is changed in place and remembers its adapter (`attachment_of`). A model has one adapter in training; several
at once are for serving.
"""

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from graftline.adapters.base import (
    AdapterLayer,
    AttachContext,
    LayerPlan,
    Method,
    State,
    features_of,
    is_quantized,
    kind_of,
)
from graftline.adapters.class_head import HEAD, class_head_of
from graftline.adapters.methods import find_method
from graftline.adapters.targets import check_pattern, find_targets
from graftline.errors import AdapterError
from graftline.settings.model import Adapter
from graftline.weights.experts import ExpertStack, expert_stacks, open_experts
from graftline.weights.sharded import is_sharded, whole

_ATTRIBUTE = "graftline_attachment"
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class CoverageRow:
    """What one target covers."""

    target: str
    modules: tuple[str, ...]
    num_parameters: int
    """Trained parameters in these modules."""


@dataclass(frozen=True)
class Coverage:
    """What an adapter covers: a row for each target, and for modules and biases that are trained whole."""

    rows: tuple[CoverageRow, ...]
    num_trained: int
    num_base: int
    """Parameters of the base model; a quantized layer counts its dense weight."""

    def document(self) -> dict[str, Any]:
        """The rows as JSON."""
        rows = [
            {"target": row.target, "modules": len(row.modules), "trained_parameters": row.num_parameters}
            for row in self.rows
        ]
        return {"targets": rows, "trained_parameters": self.num_trained, "base_parameters": self.num_base}

    def table(self) -> str:
        """The rows as aligned text: target, modules, trained parameters."""
        lines = [("target", "modules", "trained parameters")]
        lines += [(row.target, str(len(row.modules)), f"{row.num_parameters:,}") for row in self.rows]
        share = 100 * self.num_trained / max(self.num_base, 1)
        num_modules = sum(len(row.modules) for row in self.rows)
        lines.append(("total", str(num_modules), f"{self.num_trained:,} ({share:.3g} % of {self.num_base:,})"))
        first, second = (max(len(line[column]) for line in lines) for column in (0, 1))
        return "\n".join(f"{a:<{first}}  {b:>{second}}  {c}" for a, b, c in lines)


@dataclass(frozen=True)
class Attachment:
    """What is attached to a model."""

    spec: Adapter
    method: Method
    layer_names: tuple[str, ...]
    coverage: Coverage
    shared: State
    saved_modules: tuple[str, ...]
    """Paths of the modules that are trained whole."""


def attach(
    model: nn.Module,
    spec: Adapter,
    *,
    seed: int,
    initial: Mapping[str, State] | None = None,
    shared: State | None = None,
    states: Mapping[str, State] | None = None,
) -> Coverage:
    """Freeze ``model`` and wrap the layers that ``spec.targets`` names; nothing is changed if anything is wrong.

    Args:
        model: a base model, dense or quantized, without an adapter. Changed in place.
        spec: the adapter.
        seed: seeds the initial values; the same seed gives the same adapter on every device.
        initial: A and B by layer, from an init stage (LoftQ, PiSSA on a quantized base), instead of random values.
        shared: the tensors that all layers share, from a file; None: the method makes them.
        states: trained tensors by layer, from a file, instead of initial ones.

    Raises:
        AdapterError: a target matches nothing or cannot be adapted; a rank exceeds a layer; the model has an adapter.
    """
    if has_adapter(model):
        raise AdapterError("the model already has an adapter; load the base again to attach another one")
    method, found, layers = _find_layers(model, spec)
    if method.on_quantized and any(is_quantized(layer) for layer in layers.values()):
        method = find_method(method.on_quantized)
    plans = {name: _plan(name, layer, spec, method) for name, layer in layers.items()}
    saved = _find_saved_modules(model, spec, set(layers))
    _check_biases(layers, spec)
    if is_sharded(model):
        _check_sharded(model, spec, method, saved)
    num_base = _count_base(model)
    context = AttachContext(
        spec=spec,
        generator=torch.Generator().manual_seed(seed),
        shared=method.share(layers, spec) if shared is None else shared,
        initial=_check_initial(initial, layers, plans),
    )
    wrapped = {} if method.layer is None else {n: _wrap(layers[n], plans[n], method, context) for n in layers}
    for name, state in (states or {}).items():
        wrapped[name].load_disk_state(state)
    # Copies, so that training a tied head does not train the embedding too.
    copies = {name: _copy(model.get_submodule(name)) for name in saved}
    # Nothing below can fail.
    model.requires_grad_(False)
    for name, layer in layers.items():
        if name in wrapped:
            wrapped[name].take_over()
            model.set_submodule(name, wrapped[name])
        else:
            layer.requires_grad_(True)
    for name, module in copies.items():
        model.set_submodule(name, module.requires_grad_(True))
    _train_biases(model, spec, tuple(layers))
    coverage = _cover(model, found, saved, num_base)
    setattr(model, _ATTRIBUTE, Attachment(spec, method, tuple(layers), coverage, context.shared, saved))
    return coverage


def _wrap(layer: nn.Module, plan: LayerPlan, method: Method, context: AttachContext) -> AdapterLayer:
    make = method.expert_layer if isinstance(layer, ExpertStack) else method.layer
    assert make is not None  # find_targets refuses such layers
    return make(layer, plan, context)


def _copy(module: nn.Module) -> nn.Module:
    """A deep copy with new tensors; unlike `copy.deepcopy` alone it works on tensors without memory."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    memo: dict[int, object] = {}
    for tensor in tensors:
        clone = whole(tensor.detach()).clone()
        memo[id(tensor)] = nn.Parameter(clone, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else clone
    return copy.deepcopy(module, memo)


def without_adapter(model: Model) -> Model:
    """The model as it would compute without its adapter; it shares every tensor with ``model``.

    For timing: what PiSSA took out of the base's weights and what is trained whole stay as they are.
    """
    memo: dict[int, object] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    bare = copy.deepcopy(model, memo)
    for name, layer in adapter_layers(bare).items():
        bare.set_submodule(name, layer.base)
    return bare


def plan_layers(model: nn.Module, spec: Adapter) -> dict[str, LayerPlan]:
    """What `attach` would wrap, with each layer's rank and scale; nothing is wrapped, the model may be on ``meta``."""
    method, _, layers = _find_layers(model, spec)
    return {name: _plan(name, layer, spec, method) for name, layer in layers.items()}


def has_adapter(model: nn.Module) -> bool:
    """Whether something is attached to ``model``."""
    return getattr(model, _ATTRIBUTE, None) is not None


def attachment_of(model: nn.Module) -> Attachment:
    """What is attached to ``model``; AdapterError if nothing is."""
    attachment = getattr(model, _ATTRIBUTE, None)
    if not isinstance(attachment, Attachment):
        raise AdapterError(f"this {type(model).__name__} has no adapter; attach or load one first")
    return attachment


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """The wrapped layers by their path in the base model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLayer)}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name; shared ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _find_layers(model: nn.Module, spec: Adapter) -> tuple[Method, dict[str, list[str]], dict[str, nn.Module]]:
    """The method, the layers' paths by target, and the layers by path; experts become layers."""
    method = find_method(spec.method)
    open_experts(model)
    for field, patterns in (("rank_pattern", spec.rank_pattern), ("alpha_pattern", spec.alpha_pattern)):
        for pattern in patterns:
            check_pattern(pattern, field)
    found = find_targets(model, spec.targets, method=method)
    layers = {name: model.get_submodule(name) for names in found.values() for name in names}
    _check_experts(model, layers, spec)
    return method, found, layers


def _plan(name: str, layer: nn.Module, spec: Adapter, method: Method) -> LayerPlan:
    rank = spec.rank_of(name)
    if method.rank_is_bounded and method.layer is not None:
        num_inputs, num_outputs = features_of(layer)
        if rank > min(num_inputs, num_outputs):
            raise AdapterError(
                f"{name}: rank {rank} is above min(input features {num_inputs}, output features {num_outputs}); "
                f"write a rank of at most {min(num_inputs, num_outputs)}, or set one for this layer in rank_pattern"
            )
    return LayerPlan(name=name, rank=rank, scale=method.scale(spec.alpha_of(name), rank), dropout=spec.dropout)


def _find_saved_modules(model: nn.Module, spec: Adapter, adapted: set[str]) -> tuple[str, ...]:
    saved: list[str] = []
    for suffix in spec.modules_to_save:
        names = [name for name, _ in model.named_modules() if name == suffix or name.endswith(f".{suffix}")]
        if not names:
            raise AdapterError(f"modules_to_save: no module of {type(model).__name__} is called {suffix!r}")
        both = [name for name in names if any(a == name or a.startswith(f"{name}.") for a in adapted)]
        if both:
            raise AdapterError(f"modules_to_save: {both[0]} is also a target; it can be one or the other")
        for name in names:
            if expert_stacks(model.get_submodule(name)):
                raise AdapterError(
                    f"modules_to_save: {name} has experts, whose weights are not trained whole; name them as targets, "
                    "for example experts.gate_up_proj and experts.down_proj"
                )
        saved += names
    if class_head_of(model) is not None:
        saved.append(HEAD)
    return tuple(dict.fromkeys(saved))


def _check_initial(
    initial: Mapping[str, State] | None, layers: Mapping[str, nn.Module], plans: Mapping[str, LayerPlan]
) -> Mapping[str, State]:
    if not initial:
        return {}
    missing, surplus = sorted(set(layers) - set(initial)), sorted(set(initial) - set(layers))
    if missing or surplus:
        raise AdapterError(
            f"the initial factors and the targets differ: missing {missing[:3]}, not targeted {surplus[:3]}; "
            "run the init stage again with these targets"
        )
    for name, state in initial.items():
        num_inputs, num_outputs = features_of(layers[name])
        expected = {"A": (plans[name].rank, num_inputs), "B": (num_outputs, plans[name].rank)}
        found = {key: tuple(tensor.shape) for key, tensor in state.items()}
        if found != expected:
            raise AdapterError(
                f"{name}: the initial factors have shapes {found}, expected {expected}; run the init stage again with "
                "this rank"
            )
    return initial


def _check_biases(layers: Mapping[str, nn.Module], spec: Adapter) -> None:
    for name, layer in layers.items():
        bias = getattr(layer, "bias", None)
        if spec.bias != "none" and bias is not None and not isinstance(bias, nn.Parameter):
            raise AdapterError(f"{name}: the bias of a quantized layer cannot be trained; write bias: none")


def _check_experts(model: nn.Module, layers: Mapping[str, nn.Module], spec: Adapter) -> None:
    if spec.bias == "all" and expert_stacks(model):
        raise AdapterError(
            "bias: all would train the biases of the experts and of their router, which stay frozen; write bias: none, "
            "or adapter_only"
        )
    name = next((name for name, layer in layers.items() if isinstance(layer, ExpertStack)), None)
    if name is None and spec.experts != "each":
        raise AdapterError(
            f"experts: {spec.experts} was given, and no target names experts ({len(layers)} other layers have an "
            "adapter); add experts.gate_up_proj or experts.down_proj to targets, or leave the setting out"
        )
    if name is not None and (spec.dropout or spec.bias != "none"):
        raise AdapterError(
            f"{name} is a layer of experts, and was given dropout {spec.dropout:g} and bias {spec.bias}; PEFT loads "
            "adapters on experts only without either: write dropout: 0 and bias: none"
        )


def _check_sharded(model: nn.Module, spec: Adapter, method: Method, saved: tuple[str, ...]) -> None:
    """Refuse what trains or changes the base's own tensors, of which each process holds a part."""
    if method.layer is None or method.name == "pissa" or spec.bias != "none":
        raise AdapterError(
            f"method {spec.method} with bias {spec.bias} changes weights of the base, which is sharded over the "
            "processes; expected an adapter that leaves them as they are, such as lora: take it, or write "
            "train.sharding: false"
        )
    for name in saved:
        if any(map(is_sharded, model.get_submodule(name).modules())):
            raise AdapterError(
                f"modules_to_save: {name} has whole blocks of a sharded base; name a smaller module, such as lm_head"
            )


def _train_biases(model: nn.Module, spec: Adapter, adapted: tuple[str, ...]) -> None:
    if spec.bias == "none":
        return
    names = {f"{name}.base.bias" for name in adapted}
    for name, parameter in model.named_parameters():
        if name in names or (spec.bias == "all" and name.rpartition(".")[2] == "bias"):
            parameter.requires_grad_(True)


def _count_base(model: nn.Module) -> int:
    # A quantized layer has codes instead of parameters: its dense weight is counted.
    total = sum(parameter.numel() for parameter in model.parameters() if parameter.is_floating_point())
    if head := class_head_of(model):
        total -= head.weight.numel()
    for layer in model.modules():
        if kind_of(layer) == "linear" and not isinstance(layer, nn.Linear):
            num_inputs, num_outputs = features_of(layer)
            total += num_inputs * num_outputs
    return total


def _cover(model: nn.Module, found: Mapping[str, list[str]], saved: tuple[str, ...], num_base: int) -> Coverage:
    def num_trained(names: tuple[str, ...]) -> int:
        parameters = {id(p): p for name in names for p in model.get_submodule(name).parameters() if p.requires_grad}
        return sum(p.numel() for p in parameters.values())

    rows = [CoverageRow(target, tuple(names), num_trained(tuple(names))) for target, names in found.items()]
    if saved:
        rows.append(CoverageRow("modules_to_save", saved, num_trained(saved)))
    total = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    others = total - sum(row.num_parameters for row in rows)
    if others:
        rows.append(CoverageRow("biases of other layers", (), others))
    return Coverage(tuple(rows), total, num_base)
