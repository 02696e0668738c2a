"""Layers of experts: one frozen matrix an expert, of which each token takes a few.

transformers keeps the experts of a block as 3-D parameters, ``gate_up_proj`` and ``down_proj``. `open_experts` makes
each of them a module, an `ExpertStack`, so that it can be adapted, quantized and counted like a linear layer; the
products run through transformers' own interface for implementations of experts. What a model computes stays the same.

Files hold a matrix for each expert (Mixtral, Qwen3-MoE), ``experts.3.gate_proj.weight``, or the whole parameter
(gpt-oss). A matrix that is stored by itself is quantized by itself.

Rows are sorted by expert, and each expert multiplies its rows: one product an expert, but in bf16 on a GPU one for all
experts of a dense stack (`graftline.weights.grouped`).

Dimensions: E = experts, T = tokens, K = experts a token, S = T·K rows, O = output features, I = input features.
"""

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from graftline.errors import CheckpointError
from graftline.weights.frozen import FrozenProduct
from graftline.weights.grouped import aligned, can_group, grouped_linear

STACKS = ("gate_up_proj", "down_proj")
"""The 3-D parameters of a block's experts, in the order in which transformers has them."""
_PARTS = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", 0)}
"""An expert's matrix in a file: its stack, and which part of the stack's rows it is."""
_STORED = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_IMPLEMENTATION = "graftline"


@dataclass(frozen=True)
class Slot:
    """Where the matrix of one expert belongs."""

    stack: str
    """Path of the `ExpertStack`."""
    expert: int
    part: int
    """0 is the first half of the rows (gate), 1 the second (up); 0 where there is one part."""


def slot_of(name: str) -> Slot | None:
    """The place of a tensor in a file; None for one that is not the matrix of one expert."""
    match = _STORED.fullmatch(name)
    if match is None:
        return None
    stack, part = _PARTS[match[3]]
    return Slot(f"{match[1]}.{stack}", int(match[2]), part)


@dataclass(frozen=True)
class Groups:
    """Which of the rows, sorted by expert, are whose."""

    ends: Tensor
    """(E,): those of experts up to e end here; int32."""
    num_rows: int

    @classmethod
    def of(cls, experts_S: Tensor, num_experts: int) -> "Groups":
        """From the expert of each row, in ascending order."""
        numbers_E = torch.arange(num_experts, dtype=experts_S.dtype, device=experts_S.device)
        return cls(torch.searchsorted(experts_S, numbers_E, right=True, out_int32=True), len(experts_S))

    @cached_property
    def counts(self) -> list[int]:
        """How many rows each expert has; on a GPU this waits for the router.

        Where numbers have no values, when memory is planned, all have equally many.
        """
        if isinstance(self.ends, FakeTensor):
            each, more = divmod(self.num_rows, len(self.ends))
            return [each + (expert < more) for expert in range(len(self.ends))]
        counts: list[int] = torch.diff(self.ends, prepend=self.ends.new_zeros(1)).tolist()
        return counts

    def split(self, x_SI: Tensor) -> list[tuple[int, Tensor]]:
        """The experts that have rows, with their rows."""
        return [(expert, x) for expert, x in enumerate(x_SI.split(self.counts)) if len(x)]


class ExpertStack(nn.Module):
    """The matrices (O, I) of all experts of a block, dense or quantized one by one.

    ``transposed``: the parameter is (E, I, O), not (E, O, I). ``parts``: a file has so many matrices an expert, one
    above the other.
    """

    weight: nn.Parameter | None

    def __init__(self, weight: nn.Parameter, *, transposed: bool, parts: int) -> None:
        super().__init__()
        self.num_experts, rows, columns = weight.shape
        self.out_features, self.in_features = (columns, rows) if transposed else (rows, columns)
        self.transposed, self.parts = transposed, parts
        self.weight = weight
        self.pieces = nn.ModuleDict()

    @property
    def is_quantized(self) -> bool:
        """Whether the matrices have to be dequantized."""
        return self.weight is None

    def matrix(self, expert: int, dtype: torch.dtype) -> Tensor:
        """The matrix (O, I) of an expert."""
        if self.weight is None:
            pieces = [self.pieces[f"{expert}_{part}"] for part in range(self.parts)]
            return torch.cat([piece.dense_weight(dtype) for piece in pieces])  # type: ignore[operator]
        stored = self.weight[expert]
        return (stored.T if self.transposed else stored).to(dtype)

    def put(self, slot: Slot, tensor: Tensor) -> None:
        """Copy in a dense matrix (O / parts, I)."""
        if self.weight is None or self.weight.is_meta:
            empty = tensor.new_empty((self.num_experts, self.out_features, self.in_features))
            self.weight = nn.Parameter(empty, requires_grad=False)
        rows = self.out_features // self.parts
        self.weight.data[slot.expert, slot.part * rows : (slot.part + 1) * rows] = tensor

    def put_quantized(self, slot: Slot, layer: nn.Module) -> None:
        """Take a quantized linear layer (O / parts, I) as the matrix."""
        self.weight = None
        self.pieces[f"{slot.expert}_{slot.part}"] = layer

    def can_group(self, x: Tensor) -> bool:
        """Whether products with matrices of this size can be grouped for this input."""
        return all(size == aligned(size, x.dtype) for size in (self.in_features, self.out_features)) and can_group(x)

    def forward(self, x_SI: Tensor, groups: Groups) -> Tensor:
        """(S, O) for rows sorted by expert."""
        if torch.is_autocast_enabled(x_SI.device.type):
            x_SI = x_SI.to(torch.get_autocast_dtype(x_SI.device.type))
        # Quantized matrices are dequantized one by one; all of a stack at once would take 2·E·O·I bytes.
        if self.weight is not None and self.weight.dtype == x_SI.dtype and self.can_group(x_SI):
            return grouped_linear(x_SI, self.weight.transpose(1, 2) if self.transposed else self.weight, groups.ends)
        return torch.cat([FrozenProduct.apply(x, FrozenExpert(self, e)) for e, x in groups.split(x_SI)])

    def extra_repr(self) -> str:
        """Sizes, as nn.Linear prints itself."""
        return f"experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}"


@dataclass(frozen=True)
class FrozenExpert:
    """One expert of a stack as two products: x Wᵀ forward, g W backward, where W is dequantized again."""

    stack: ExpertStack
    expert: int

    def product(self, x_TI: Tensor) -> Tensor:
        """The expert's output, as a new array."""
        return F.linear(x_TI, self.stack.matrix(self.expert, x_TI.dtype))

    def input_gradient(self, grad_TO: Tensor) -> Tensor:
        """Gradient of x: g W."""
        return grad_TO @ self.stack.matrix(self.expert, grad_TO.dtype)


def open_experts(model: nn.Module) -> None:
    """Make each 3-D parameter of experts in ``model`` an `ExpertStack`, in place; done before, it does nothing."""
    # Not at import: a torch that transformers refuses must be told by us, and importing sets nothing.
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, _experts_forward)
    for module in list(model.modules()):
        if not _has_stacks(module):
            continue
        for name in STACKS:
            weight = getattr(module, name)
            delattr(module, name)
            transposed = bool(module.is_transposed)
            setattr(module, name, ExpertStack(weight, transposed=transposed, parts=2 if name == STACKS[0] else 1))
        # A copy: other models, whose experts are as they were, may have the same configuration.
        module.config = copy.copy(module.config)
        module.config._experts_implementation = _IMPLEMENTATION  # type: ignore[union-attr]


def _has_stacks(module: nn.Module) -> bool:
    """Whether these are experts that transformers lets be computed by other code."""
    if not hasattr(module, "_apply_gate") or not hasattr(module, "is_transposed"):
        return False
    return all(isinstance(module._parameters.get(name), nn.Parameter) for name in STACKS)


def expert_stacks(model: nn.Module) -> dict[str, ExpertStack]:
    """The stacks by path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertStack)}


def find_slot(model: nn.Module, name: str, shape: tuple[int, ...]) -> tuple[ExpertStack, Slot] | None:
    """The stack that a tensor of a file goes into, and where; None for one that is not the matrix of one expert.

    Raises:
        CheckpointError: the model has no such expert, or its matrix has another shape.
    """
    slot = slot_of(name)
    if slot is None:
        return None
    try:
        stack: nn.Module | None = model.get_submodule(slot.stack)
    except AttributeError:
        stack = None
    if not isinstance(stack, ExpertStack) or slot.expert >= stack.num_experts:
        raise CheckpointError(
            f"tensor {name!r} has no place in {type(model).__name__} as config.json describes it; is this another "
            "model's folder, or is a setting of config.json wrong (the number of experts)?"
        )
    expected = (stack.out_features // stack.parts, stack.in_features)
    if shape != expected:
        raise CheckpointError(f"tensor {name!r} has shape {shape}, config.json asks for {expected}")
    return stack, slot


def missing_experts(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Matrices of experts that the model needs and ``names`` lacks, sorted."""
    present, missing = set(names), []
    for path, stack in expert_stacks(model).items():
        if f"{path}.weight" in present:
            continue
        root, _, kind = path.rpartition(".")
        last = [part for part, (of, _) in _PARTS.items() if of == kind]
        needed = (f"{root}.{expert}.{part}.weight" for expert in range(stack.num_experts) for part in last)
        missing += [name for name in needed if name not in present]
    return sorted(missing)


def _experts_forward(module: Any, hidden_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """What transformers' own implementations compute (transformers/integrations/moe.py)."""
    num_tokens, num_chosen = experts_TK.shape
    experts_S, order_S = torch.sort(experts_TK.reshape(-1), stable=True)
    groups = Groups.of(experts_S, module.num_experts)
    x = module.gate_up_proj(hidden_TH[order_S // num_chosen], groups)
    if module.has_bias:
        x = x + module.gate_up_proj_bias[experts_S].to(x.dtype)
    y_SH = module.down_proj(module._apply_gate(x), groups)
    if module.has_bias:
        y_SH = y_SH + module.down_proj_bias[experts_S].to(y_SH.dtype)
    y_SH = y_SH * weights_TK.reshape(-1)[order_S, None]
    back_S = torch.empty_like(order_S)
    back_S[order_S] = torch.arange(len(order_S), device=order_S.device)
    # A sum over each token's experts, not index_add_, whose order on a GPU is left to chance.
    return y_SH[back_S].view(num_tokens, num_chosen, -1).sum(dim=1).to(hidden_TH.dtype)
