"""An adapter read from disk, without a model: every tensor checked, and its effect on a weight.

Merges, exports and conversions use this; `graftline.adapters.peft_format` attaches it to a model.

Dimensions: O = output features, I = input features, R = rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from graftline.adapters.base import Method, State, check_finite
from graftline.adapters.bottleneck import ACTIVATION_OF, Bottleneck
from graftline.adapters.class_head import HEAD_WEIGHT
from graftline.adapters.experts import (
    fold_experts,
    from_matrices,
    names_in_file,
    one_for_all,
    paths_in_file,
    shared_factor,
)
from graftline.adapters.methods import find_method
from graftline.adapters.peft_config import CONFIG_FILE, AdapterIdentity, method_of, read_identity, read_object, to_spec
from graftline.digest import Digest
from graftline.errors import AdapterError
from graftline.settings.model import Adapter
from graftline.weights.experts import Slot
from graftline.weights.identity import BaseIdentity
from graftline.weights.reader import ARCHITECTURES, read_header

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
SHARED_PREFIX = "base_model."
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")


@dataclass(frozen=True, kw_only=True)
class AdapterWeights:
    """An adapter as it is on disk; made by `AdapterWeights.open`."""

    spec: Adapter
    method: Method
    identity: AdapterIdentity | None
    """None for an adapter that another tool wrote."""
    states: Mapping[str, State]
    """Trained tensors by layer."""
    shared: State
    """Tensors that all layers use (VeRA's projections)."""
    extra: Mapping[str, Tensor]
    """Whole tensors of the model by checkpoint name: modules_to_save, trained biases."""
    embeddings: frozenset[str]
    """Layers that are embeddings."""
    experts: frozenset[str] = frozenset()
    """Layers that are the experts of a block; their tensors are as in a file (`graftline.adapters.experts`)."""
    carried: Mapping[str, Tensor]
    """Base weights that PEFT stores beside an adapted embedding, by layer; they must equal the base's."""
    transposed: bool
    """Whether the base stores its linear weights as (I, O): PEFT's fan_in_fan_out."""
    beside: frozenset[str] = frozenset()
    """Embeddings and heads in ``extra`` that PEFT writes unannounced: if the vocabulary was resized, the embedding is a
    target, or ``ensure_weight_tying`` added the tied one. Often they equal the base's."""

    @property
    def holds_base_weights(self) -> bool:
        """Whether it replaces tensors of the base, which must then have the precision that they were trained in."""
        return self.method.layer is None or bool(self.extra.keys() - {HEAD_WEIGHT})

    @property
    def head(self) -> Tensor | None:
        """Weight (classes, hidden size) of the head that chooses among `labels`; None if the adapter writes text."""
        return self.extra.get(HEAD_WEIGHT)

    @property
    def labels(self) -> tuple[str, ...]:
        """The head's classes; named as transformers does where another tool wrote the adapter."""
        if self.head is None:
            return ()
        return (self.identity.labels if self.identity else ()) or tuple(f"LABEL_{at}" for at in range(len(self.head)))

    @classmethod
    def open(cls, folder: Path) -> AdapterWeights:
        """Read and check an adapter.

        Raises:
            AdapterError: a file is missing or is a pickle, a tensor is missing, surplus or not finite, a rank
                disagrees.
            CheckpointError: the safetensors file is damaged.
        """
        config = read_object(folder / CONFIG_FILE)
        recorded = read_identity(folder)
        name = recorded[1] if recorded else method_of(config)
        method = find_method(name)
        parsed = _parse(_read_tensors(folder), method)
        experts = _name_experts(parsed, config)
        layer_names = sorted(parsed.states) if method.layer else config.get("target_modules") or ()
        spec = to_spec(config, method=name, layer_names=tuple(layer_names), extra_names=parsed.extra)
        beside = _beside(parsed, spec) if method.layer else frozenset()
        saved = tuple(sorted({*spec.modules_to_save, *(name.removesuffix(".weight") for name in beside)}))
        sharing = recorded[0].experts if recorded else "each"
        weights = cls(
            spec=spec.model_copy(update={"modules_to_save": saved, "experts": sharing}),
            method=method,
            identity=recorded[0] if recorded else None,
            states=parsed.states,
            shared=parsed.shared,
            extra=parsed.extra,
            embeddings=frozenset(parsed.embeddings),
            experts=experts,
            carried=parsed.carried,
            transposed=bool(config.get("fan_in_fan_out")),
            beside=beside,
        )
        weights._check_states(config)
        weights._check_extra()
        return weights

    def modules(self) -> list[str]:
        """Paths of the adapted layers, sorted."""
        return sorted(self.states)

    def tensors(self, name: str) -> State:
        """The trained tensors of a layer; AdapterError if the adapter does not have it."""
        if name not in self.states:
            raise AdapterError(
                f"the adapter has no layer {name!r}; it has {len(self.states)}, such as {self.modules()[:2]}"
            )
        return self.states[name]

    def scale(self, name: str) -> float:
        """The factor s of a layer."""
        return self.method.scale(self.spec.alpha_of(name), self.spec.rank_of(name))

    def check_base(self, base: BaseIdentity, template_digest: Digest | None = None) -> None:
        """Raise BaseMismatchError for another base than the adapter's; adapters of other tools cannot be checked."""
        if self.identity is not None:
            self.identity.check(base, template_digest)

    def without_copies(self, base_tensor: Callable[[str], Tensor | None]) -> AdapterWeights:
        """The same adapter without the whole tensors that PEFT wrote beside it and that equal the base's.

        ``base_tensor`` gives a tensor of the base by its name, if there is one.

        Raises:
            AdapterError: an embedding or head has other rows than the base: the vocabulary was resized.
        """
        copies = set()
        for name in self.beside:
            tensor, base = self.extra[name], base_tensor(name)
            if base is None:
                continue
            if base.shape != tensor.shape:
                raise AdapterError(
                    f"the adapter carries {name} of shape {tuple(tensor.shape)}, the base's has {tuple(base.shape)}: "
                    "the vocabulary was resized before the training; resize the base in the same way "
                    "(resize_token_embeddings), save it with its tokenizer, and give that base"
                )
            if torch.equal(tensor.to(base.dtype), base.to(tensor.device)):
                copies.add(name)
        saved = {name.removesuffix(".weight") for name in copies}
        kept = tuple(module for module in self.spec.modules_to_save if module not in saved)
        return dataclasses.replace(
            self,
            extra={name: tensor for name, tensor in self.extra.items() if name not in copies},
            beside=self.beside - copies,
            spec=self.spec.model_copy(update={"modules_to_save": kept}),
        )

    def replacements(self) -> dict[str, Tensor]:
        """Whole tensors that replace the base's, by checkpoint name (modules_to_save, trained biases)."""
        return {name: tensor for name, tensor in self.extra.items() if name != HEAD_WEIGHT}

    @property
    def keeps_ties(self) -> bool:
        """Whether tied weights stay tied: full fine-tuning trains them as one."""
        return self.method.layer is None

    def bottlenecks(self) -> dict[str, Bottleneck]:
        """The blocks of a bottleneck adapter by sublayer, such as ``model.layers.0.mlp``; empty for other methods."""
        activation = ACTIVATION_OF.get(self.method.name)
        if activation is None:
            return {}
        return {
            name.rpartition(".")[0]: Bottleneck(
                state["D"].T, state["bias_D"], state["U"].T, state["bias_U"], activation
            )
            for name, state in self.states.items()
        }

    def fold_weight(self, name: str, weight: Tensor, slot: Slot | None = None) -> Tensor:
        """A layer's weight with the adapter folded in, in fp32 and in the orientation of ``weight``.

        ``weight`` is oriented as in the checkpoint: (O, I) for linear layers, (I, O) for GPT-2's, (vocabulary, width)
        for embeddings; a quantized one dequantized. Of experts it is the matrix of one, at ``slot``, or all.

        Raises:
            AdapterError: the method cannot be folded (the reason is given), the shapes disagree, or the result is not
                finite.
        """
        if self.method.fold is None:
            raise AdapterError(f"{self.method.name} cannot be folded, because {self.method.fold_refusal}")
        state = self.tensors(name)
        if name in self.experts:
            return self._fold_experts(name, weight, slot)
        if name in self.carried and not torch.equal(self.carried[name].float(), weight.float()):
            raise AdapterError(
                f"{name}: the adapter carries another weight for this embedding; it was trained on another base"
            )
        flip = self._is_transposed(name, weight)
        weight_OI = (weight.T if flip else weight).float()
        expected = (self._num_outputs(name), self._num_inputs(name))
        if weight_OI.shape[0] != expected[0] or expected[1] not in (None, weight_OI.shape[1]):
            raise AdapterError(f"{name}: the weight is {tuple(weight.shape)}, the adapter is for {expected} (out, in)")
        folded_OI = self.method.fold(weight_OI, {**state, **self.shared}, self.scale(name))
        check_finite(folded_OI, f"{name}: the folded weight")
        return folded_OI.T.contiguous() if flip else folded_OI

    def num_experts(self, name: str) -> int:
        """How many experts the adapter of a stack is for."""
        return int(self.states[name]["A"].shape[0]) // self.spec.rank_of(name)

    def _fold_experts(self, name: str, weight: Tensor, slot: Slot | None) -> Tensor:
        state = from_matrices(self.states[name], self.spec.rank_of(name), name)
        num_experts, _, num_inputs = state["A"].shape
        num_outputs = state["B"].shape[1]
        parts = 2 if name.endswith(".gate_up_proj") else 1
        expected = (num_experts, num_inputs, num_outputs) if slot is None else (num_outputs // parts, num_inputs)
        if weight.shape != expected or (slot is not None and slot.expert >= num_experts):
            raise AdapterError(f"{name}: the weight is {tuple(weight.shape)}, the adapter is for {expected}")
        folded = fold_experts(weight, state, self.scale(name), slot)
        check_finite(folded, f"{name}: the folded weight")
        return folded

    def serving_factors(self, name: str, weight: Callable[[], Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """The layer for ``y = (x Wᵀ + (x A) B) ⊙ g + bias``: A (I, R), B (R, O) including s, g (O,) or None, in fp32.

        ``weight`` gives W (O, I) in fp32 if the method needs it (for DoRA's norm).

        Raises:
            AdapterError: the method has no such factors.
        """
        if self.method.factors is None:
            raise AdapterError(f"{self.method.name} has no low-rank factors, because {self.method.fold_refusal}")
        return self.method.factors({**self.tensors(name), **self.shared}, self.scale(name), weight)

    def disk_tensors(self) -> dict[str, Tensor]:
        """All tensors by the keys of PEFT's file."""
        tensors = {f"{SHARED_PREFIX}{self.method.shared_disk_names[name]}": t for name, t in self.shared.items()}
        paths = paths_in_file(self.experts)
        for layer, state in self.states.items():
            suffixes = self.method.embedding_disk_names if layer in self.embeddings else self.method.disk_names
            path = paths.get(layer, layer)
            tensors |= {f"{PREFIX}{path}.{suffixes[name]}": tensor for name, tensor in state.items()}
        for name, tensor in self.extra.items():
            layer, _, last = name.rpartition(".")
            tensors[f"{PREFIX}{layer}.base_layer.{last}" if layer in self.states else f"{PREFIX}{name}"] = tensor
        return tensors

    def _num_outputs(self, name: str) -> int:
        return int(self.states[name][self.method.output_tensor].shape[0])

    def _num_inputs(self, name: str) -> int | None:
        factor = self.states[name].get("A")
        return None if factor is None else int(factor.shape[1])

    def _is_transposed(self, name: str, weight: Tensor) -> bool:
        if name in self.embeddings:
            return True
        num_outputs, num_inputs = self._num_outputs(name), self._num_inputs(name)
        fits = weight.shape[0] == num_outputs and num_inputs in (None, weight.shape[1])
        fits_flipped = weight.shape[1] == num_outputs and num_inputs in (None, weight.shape[0])
        return self.transposed if fits == fits_flipped else fits_flipped

    def _check_extra(self) -> None:
        # Whole tensors replace the base's, so the configuration must announce them.
        whole = self.spec.targets if self.method.layer is None else self.spec.modules_to_save
        if self.head is not None and self.identity and len(self.identity.labels) != len(self.head):
            raise AdapterError(
                f"the head has {len(self.head)} classes, graftline.json names {len(self.identity.labels)}; train again"
            )
        for name in self.extra:
            is_bias = self.spec.bias != "none" and name.rpartition(".")[2] == "bias"
            if not is_bias and not any(f".{module}." in f".{name}" for module in whole):
                raise AdapterError(
                    f"{WEIGHTS_FILE} holds the tensor {name!r}, which {CONFIG_FILE} announces neither as a target nor "
                    "in modules_to_save or bias; it would replace the base's, so the adapter is refused"
                )

    def _check_states(self, config: Mapping[str, Any]) -> None:
        if not self.states and not (self.method.layer is None and self.extra):
            raise AdapterError(f"the adapter's file holds no tensor of the method {self.method.name}")
        missing = set(self.method.shared_disk_names) - set(self.shared)
        if missing:
            raise AdapterError(
                f"the adapter lacks {', '.join(sorted(missing))}, which its layers share; save it with save_projection"
            )
        names = set(self.method.disk_names)
        for layer, state in self.states.items():
            if set(state) != names:
                raise AdapterError(
                    f"{layer}: the file holds {sorted(state)}, expected {sorted(names)}; it is incomplete, save it "
                    "again"
                )
            rank, found = self.spec.rank_of(layer), _rank_of(self.method, state)
            if layer in self.experts:
                factors = from_matrices(state, rank, layer)
                one_for_all(factors, shared_factor(self.spec.experts, layer), layer)
                continue
            if found is not None and found != rank:
                raise AdapterError(
                    f"{layer}: its tensors have rank {found}, {CONFIG_FILE} says {rank} (r {config.get('r')}, "
                    "rank_pattern)"
                )


def _beside(parsed: _Parsed, spec: Adapter) -> frozenset[str]:
    """Whole embeddings and heads that the configuration does not announce as saved modules."""
    known = {f"{name}.weight" for arch in ARCHITECTURES.values() for name in (arch.embedding, arch.head)}
    return frozenset(
        name
        for name in parsed.extra
        if name in known and name.removesuffix(".weight") not in {*spec.modules_to_save, *parsed.states}
    )


def _name_experts(parsed: _Parsed, config: Mapping[str, Any]) -> frozenset[str]:
    """Give the factors of experts the names of their stacks; returns these names."""
    parameters = config.get("target_parameters") or ()
    if not parameters:
        return frozenset()
    if isinstance(parameters, str) or not all(isinstance(name, str) for name in parameters):
        raise AdapterError(
            f"adapter_config.json: target_parameters is {parameters!r}; expected a list of names: correct the file, or "
            "save it again"
        )
    found = names_in_file(parsed.states, list(parameters))
    for path, name in found.items():
        parsed.states[name] = parsed.states.pop(path)
    return frozenset(found.values())


def _rank_of(method: Method, state: State) -> int | None:
    tensor = state.get(method.rank_tensor)
    return None if tensor is None else int(tensor.shape[0])


@dataclass
class _Parsed:
    states: dict[str, dict[str, Tensor]] = dataclasses.field(default_factory=dict)
    shared: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    extra: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    embeddings: set[str] = dataclasses.field(default_factory=set)
    carried: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    file = folder / WEIGHTS_FILE
    pickles = [name for name in _PICKLES if (folder / name).exists()]
    if not file.exists() and pickles:
        raise AdapterError(
            f"{folder / pickles[0]} is a pickle file, which can run code when it is read; it is never loaded. "
            "Save the adapter as safetensors"
        )
    if not file.exists():
        raise AdapterError(f"{folder} has no {WEIGHTS_FILE}; an adapter's folder was expected")
    read_header(file)
    tensors: dict[str, Tensor] = load_file(file)
    for name, tensor in tensors.items():
        check_finite(tensor, f"{file.name}: {name}")
    return tensors


def _parse(tensors: Mapping[str, Tensor], method: Method) -> _Parsed:
    suffixes = {suffix: (name, False) for name, suffix in method.disk_names.items()}
    suffixes |= {suffix: (name, True) for name, suffix in method.embedding_disk_names.items() if suffix not in suffixes}
    shared = {suffix: name for name, suffix in method.shared_disk_names.items()}
    parsed = _Parsed()
    for key, tensor in tensors.items():
        if key.removeprefix(SHARED_PREFIX) in shared:
            parsed.shared[shared[key.removeprefix(SHARED_PREFIX)]] = tensor
            continue
        if not key.startswith(PREFIX):
            raise AdapterError(f"{WEIGHTS_FILE}: the key {key!r} does not start with {PREFIX!r}; this is no PEFT file")
        path = key.removeprefix(PREFIX)
        suffix = next((s for s in suffixes if path.endswith(f".{s}")), None)
        if suffix is not None:
            layer, (name, is_embedding) = path.removesuffix(f".{suffix}"), suffixes[suffix]
            parsed.states.setdefault(layer, {})[name] = tensor
            if is_embedding:
                parsed.embeddings.add(layer)
        elif path.endswith(".base_layer.weight"):
            parsed.carried[path.removesuffix(".base_layer.weight")] = tensor
        elif any(part in path for part in ("lora_", "vera_")):
            raise AdapterError(f"{WEIGHTS_FILE}: the key {key!r} belongs to no tensor of the method {method.name}")
        else:
            parsed.extra[path.replace(".base_layer.", ".")] = tensor
    return parsed
