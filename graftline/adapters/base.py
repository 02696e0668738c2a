"""What adapter methods consist of: a wrapped layer, a plan, and a `Method` record in the table of methods.

A method's file defines an `AdapterLayer` (the frozen layer and the trained tensors around it), a pure function ``fold``
(or says why there is none), and a `Method` that names them. Nothing outside the file knows the formula.

Any layer with ``in_features``, ``out_features``, ``forward(x)`` and ``dense_weight(dtype)`` can be adapted. The
functions here provide these for three layers that lack them: `nn.Linear`, GPT-2's `Conv1D` (whose weight is transposed)
and `nn.Embedding` (a linear layer over one-hot tokens: in = vocabulary, out = width).

Dimensions: O = output features, I = input features, R = rank.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from graftline.errors import AdapterError
from graftline.weights.experts import ExpertStack
from graftline.weights.sharded import whole
from graftline.weights.stored import keeps_stored

if TYPE_CHECKING:
    from graftline.settings.model import Adapter

Kind = Literal["linear", "conv1d", "embedding", "experts", "module"]
"""How a layer stores its weight: (O, I); (I, O); (I, O) as a table of rows; a matrix an expert (`ExpertStack`);
``module``: not a linear layer."""

State = Mapping[str, Tensor]
"""A layer's trained tensors by the method's names (LoRA: ``A``, ``B``)."""


def kind_of(layer: nn.Module) -> Kind:
    """How ``layer`` stores its weight."""
    if isinstance(layer, nn.Embedding):
        return "embedding"
    if isinstance(layer, Conv1D):
        return "conv1d"
    if isinstance(layer, ExpertStack):
        return "experts"
    if isinstance(layer, nn.Linear) or callable(getattr(layer, "dense_weight", None)):
        return "linear"
    return "module"


def features_of(layer: nn.Module) -> tuple[int, int]:
    """(input features, output features) of an adaptable layer."""
    match kind_of(layer):
        case "embedding":
            return int(layer.num_embeddings), int(layer.embedding_dim)  # type: ignore[arg-type]
        case "conv1d":
            weight = layer.weight
            return int(weight.shape[0]), int(weight.shape[1])  # type: ignore[index]
        case "linear" | "experts":
            return int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]
        case "module":
            raise AdapterError(f"{type(layer).__name__} is no linear layer: it has no input and output features")


def dense_weight(layer: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The layer's weight as (O, I), detached; a quantized layer dequantizes it, the others give a view.

    Outside a forward pass a sharded one is gathered: all processes have to ask for it, in the same order.

    Args:
        layer: an adaptable layer.
        dtype: precision of the result; None is the stored one, for a layer that is quantized or converts its weight
            where it is used (`graftline.weights.stored`) fp32.
    """
    if dtype is None and keeps_stored(layer):
        dtype = torch.float32
    match kind_of(layer):
        case "embedding" | "conv1d":
            weight = whole(layer.weight.detach()).T  # type: ignore[operator]
            return weight if dtype is None else weight.to(dtype)
        case "linear" if isinstance(layer, nn.Linear):
            weight = whole(layer.weight.detach())
            return weight if dtype is None else weight.to(dtype)
        case "linear":
            return layer.dense_weight(dtype or torch.float32)  # type: ignore[operator]
        case "experts" | "module":
            raise AdapterError(f"{type(layer).__name__} is no linear layer: it has no dense weight")


def arithmetic(x: Tensor) -> torch.dtype:
    """Number type that a layer computes in for this input: autocast's where it is on, else the input's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def embedding_scale(layer: nn.Module) -> Tensor | float | None:
    """The factor on an embedding's output (Gemma's: √width, a tensor of one element), if it has one.

    The stored table does not include it, so an update of the table is multiplied by it too.
    """
    scale: Tensor | float | None = getattr(layer, "embed_scale", None)
    return None if type(layer).forward is nn.Embedding.forward else scale


def is_quantized(layer: nn.Module) -> bool:
    """Whether the layer's weight has to be dequantized."""
    if isinstance(layer, ExpertStack):
        return layer.is_quantized
    return kind_of(layer) == "linear" and not isinstance(layer, nn.Linear)


def to_stored(weight_OI: Tensor, kind: Kind) -> Tensor:
    """From (O, I) to the orientation in a checkpoint, and back."""
    return weight_OI.T if kind in ("conv1d", "embedding") else weight_OI


def device_of(layer: nn.Module) -> torch.device:
    """The device of the layer's first tensor; the CPU if it has none."""
    first = next(itertools.chain(layer.parameters(), layer.buffers()), None)
    return torch.device("cpu") if first is None else first.device


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """How one layer is adapted."""

    name: str
    """Path of the layer in the model, for example ``model.layers.0.self_attn.q_proj``."""
    rank: int
    """R: inner size of the low-rank update, or width of a bottleneck."""
    scale: float
    """s: factor on the update, already worked out from alpha and rank."""
    dropout: float
    """Probability of zeroing an input of the update in training."""


@dataclass(frozen=True, kw_only=True)
class AttachContext:
    """What the layers of one `attach` share."""

    spec: Adapter
    generator: torch.Generator
    """Draws initial values on the CPU, so that a seed gives the same adapter on every device."""
    shared: State = field(default_factory=dict)
    """Frozen tensors that all layers use (VeRA's projections), by name."""
    initial: Mapping[str, State] = field(default_factory=dict)
    """Initial trained tensors by layer, from an init stage; empty if the method draws them."""


class AdapterLayer(nn.Module):
    """A frozen layer and the trained tensors of one method around it.

    Subclasses list the attributes that are trained in ``trained`` and define ``forward``.
    """

    trained: ClassVar[tuple[str, ...]] = ()

    def __init__(self, base: nn.Module, plan: LayerPlan) -> None:
        super().__init__()
        self.base = base
        self.plan = plan
        self.kind: Kind = kind_of(base)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight: transformers looks at it (device, dtype, tying)."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias, if it has one."""
        return getattr(self.base, "bias", None)

    def take_over(self) -> None:
        """Change the frozen layer if the method needs that (PiSSA); called once, when nothing can fail any more."""

    def state(self) -> dict[str, Tensor]:
        """The trained tensors, detached, not copied."""
        return {name: getattr(self, name).detach() for name in self.trained}

    def disk_state(self) -> dict[str, Tensor]:
        """The tensors that a file holds for this layer."""
        return self.state()

    def load_disk_state(self, state: State) -> None:
        """`load_state` from what a file holds."""
        self.load_state(state)

    def load_state(self, state: State) -> None:
        """Copy trained tensors in.

        Raises:
            AdapterError: a tensor is missing, surplus, of another shape, or has values that are not finite.
        """
        if set(state) != set(self.trained):
            raise AdapterError(
                f"{self.plan.name}: got tensors {sorted(state)}, expected {sorted(self.trained)}; "
                "the adapter was made by another method or is incomplete"
            )
        for name, tensor in state.items():
            parameter = getattr(self, name)
            if tensor.shape != parameter.shape:
                raise AdapterError(
                    f"{self.plan.name}: {name} has shape {tuple(tensor.shape)}, expected {tuple(parameter.shape)}; "
                    "the adapter belongs to another base or rank"
                )
            check_finite(tensor, f"{self.plan.name}: {name}")
            with torch.no_grad():
                parameter.copy_(tensor)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"rank={self.plan.rank}, scale={self.plan.scale:g}, dropout={self.plan.dropout:g}"


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Let a model compute what its base computes. Weights outside its adapter layers that are trained stay as they are.

    Not for methods that change the base they are attached to (PiSSA).
    """
    layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    for layer in layers:
        layer.forward = layer.base.forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the method's own again


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise `AdapterError` if ``tensor`` holds NaN or infinity."""
    if not tensor.is_floating_point():
        return
    # A sum, four times as fast as checking each value, keeps NaN and infinity. Finite values can overflow it, so a bad
    # sum is followed by the full check.
    if math.isfinite(float(tensor.sum(dtype=torch.float32))):
        return
    num_bad = int((~torch.isfinite(tensor)).sum())
    if num_bad:
        raise AdapterError(
            f"{name} holds {num_bad} values that are NaN or infinite; train again, with a lower learning rate"
        )


def nothing_shared(layers: Mapping[str, nn.Module], spec: Adapter) -> dict[str, Tensor]:
    """``Method.share`` of the methods whose layers share nothing."""
    del layers, spec
    return {}


Factors = tuple[Tensor, Tensor, Tensor | None]
"""A layer for a serving graph: A (I, R), B (R, O) including s, g (O,) or None for ones; all fp32."""


@dataclass(frozen=True, kw_only=True)
class DiskForm:
    """How a method's adapter on disk differs from the one in memory (PiSSA: LoRA of twice the rank)."""

    to_disk: Callable[[Adapter], Adapter]
    from_disk: Callable[[Adapter], Adapter]
    initial: Callable[[State], State]
    """A layer's tensors on disk → the initial tensors that it was started from."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """An adapter method, as the rest of the project sees it."""

    name: str
    formula: str
    """The forward equation in one line."""
    source: str
    """Paper with arXiv number."""
    layer: Callable[[nn.Module, LayerPlan, AttachContext], AdapterLayer] | None
    """Wrap one frozen layer; at step 0 the result computes what the layer computes. None: the layer itself is
    trained."""
    count: Callable[[int, int, int], int]
    """Trained parameters of one layer from (input features, output features, rank)."""
    count_formula: str
    disk_names: Mapping[str, str]
    """On-disk key suffix of each trained tensor."""
    scale: Callable[[float, int], float] = lambda alpha, rank: alpha / rank
    """s from (alpha, rank)."""
    fold: Callable[[Tensor, State, float], Tensor] | None = None
    """(W (O, I) in fp32, trained and shared tensors, s) → W' (O, I). None: see ``fold_refusal``."""
    fold_refusal: str = ""
    """Completes "cannot be folded, because …"."""
    factors: Callable[[State, float, Callable[[], Tensor]], Factors] | None = None
    """(trained and shared tensors, s, a function that gives W (O, I) in fp32) → low-rank factors for a serving
    graph."""
    rank_tensor: str = "A"
    """The trained tensor whose first dimension is the rank."""
    rank_is_bounded: bool = True
    """Whether a rank above min(I, O) is an error. Not in VeRA, whose shared projection is wide on purpose."""
    output_tensor: str = "B"
    """The trained tensor whose first dimension is the number of output features."""
    embedding_disk_names: Mapping[str, str] = field(default_factory=dict)
    """``disk_names`` for embeddings; empty where the method does not take them."""
    expert_layer: Callable[[nn.Module, LayerPlan, AttachContext], AdapterLayer] | None = None
    """As ``layer``, for the matrices of a block's experts; None where the method does not take them."""
    shared_disk_names: Mapping[str, str] = field(default_factory=dict)
    """Keys of the tensors that all layers share."""
    share: Callable[[Mapping[str, nn.Module], Adapter], dict[str, Tensor]] = nothing_shared
    """Make what all layers share, from the layers to be wrapped."""
    disk_form: DiskForm | None = None
    """None: on disk as in memory."""
    is_paired: bool = False
    """Whether it must start from the factors that its quantized base was made together with."""
    on_quantized: str = ""
    """Name of the method that replaces this one on a quantized base; empty: none."""
    peft_type: str | None = None
    """PEFT's name of the method; None if PEFT has no such method and cannot load the files."""
    sublayers: tuple[str, ...] = ()
    """Suffixes that ``targets: all-linear`` stands for, if the method does not belong on every linear layer."""
