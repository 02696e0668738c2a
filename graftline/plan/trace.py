"""Memory of one training step, found by running the step's code on tensors without memory.

The model is made from a configuration alone under torch's FakeTensorMode, in which operations know shapes and dtypes
but compute nothing. A dispatch mode sees every storage appear and disappear, in forward, head, backward and
recomputation. So it counts what the code allocates, for every architecture, adapter method and layout, without formulas
that would have to follow the code.

Layers are equal, so a model of more than eight is traced at four and at eight layers, and each part is extrapolated.
The moment of the step that needs most may change with the layers (logits, then gradients), so each has its own peak.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, masking_utils
from transformers.pytorch_utils import Conv1D

from graftline.adapters.base import features_of
from graftline.train.batches import MicroBatch
from graftline.train.devices import DeviceKind, needs_autocast
from graftline.train.loss import SupervisedLoss, chunk_of
from graftline.train.offload import ActivationOffload, checkpoint_blocks
from graftline.weights.experts import ExpertStack, expert_stacks, open_experts
from graftline.weights.reader import ARCHITECTURES

_TRACED_LAYERS = (4, 8)
TRACED_MICRO_BATCHES = 2
"""The second meets the gradients of the first; further ones meet the same."""
_Moment = tuple[str, int]
"""Phase, and how many halves of the parameters have a gradient: the peak is at either end of the backward pass."""


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """The properties of a step that its memory depends on."""

    rows: int
    """Sequences of a micro-batch: its rows, or what they are packed into."""
    tokens: int
    """Tokens of the longest one."""
    supervised_tokens: int
    """Supervised tokens of a micro-batch."""
    micro_batches: int = 1
    """Micro-batches of a step."""
    checkpointing: bool = False
    offloaded: bool = False
    """Whether checkpointed blocks' inputs wait in the host's memory, which is not counted."""
    prefix_tokens: int = 0
    """Of ``tokens``, the prefix that all rows share and that is computed once (layout "shared prefix")."""
    device: DeviceKind = "cpu"
    """Where it is computed: a GPU takes more positions through the head at a time."""
    packed: bool = False
    """Whether a sequence holds several rows, which attention must keep apart."""
    dtype: torch.dtype = torch.float32
    """Of the computation, and of dense weights that are not trained."""


@dataclass(frozen=True)
class StepMemory:
    """A step's memory at its peak, beside weights and optimizer states; bytes."""

    activations: float
    """Of the forward pass: kept for the backward pass, or in use."""
    logits: float
    """Of the head and the loss."""
    gradients: float
    """Of trainable parameters."""
    transient: float
    """Of the backward pass, recomputation and dequantization included."""

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return self.activations + self.logits + self.gradients + self.transient


def trace_step(
    config: PretrainedConfig,
    shape: StepShape,
    *,
    prepare: Callable[[PreTrainedModel], None],
    quantized: bool,
    weights: torch.dtype,
    run: Callable[[PreTrainedModel, StepShape, "Ledger"], None] | None = None,
) -> StepMemory:
    """Memory of one step of a model with this configuration.

    ``prepare`` attaches the adapter and must not need the weights' values. ``quantized``: the blocks' linear layers
    dequantize a whole weight for each use; ``weights`` is the type of the dense ones. ``run`` replaces this project's
    step (studies/memory_published.py).
    """
    text = config.get_text_config()
    layers = text.num_hidden_layers

    def trace(count: int) -> Mapping[_Moment, Mapping[str, float]]:
        with FakeTensorMode():
            model = fake_model(config, layers=count, dtype=weights, quantized=quantized)
            prepare(model)
            ledger = Ledger(model)
            with ledger, _attention_of(shape):
                (run or _run_step)(model, shape, ledger)
            return ledger.peaks

    if layers <= max(_TRACED_LAYERS):
        return max((StepMemory(**peak) for peak in trace(layers).values()), key=lambda memory: memory.total)
    small, large = (trace(count) for count in _TRACED_LAYERS)
    continued = [_continue(small[moment], large[moment], layers) for moment in sorted(small.keys() & large.keys())]
    return max(continued, key=lambda memory: memory.total)


def _continue(small: Mapping[str, float], large: Mapping[str, float], layers: int) -> StepMemory:
    few, more = _TRACED_LAYERS
    return StepMemory(
        **{part: large[part] + (large[part] - small[part]) / (more - few) * (layers - more) for part in large}
    )


def _run_step(model: PreTrainedModel, shape: StepShape, ledger: "Ledger") -> None:
    """A step's micro-batches, as in graftline.train.loop."""
    model.train()
    if shape.checkpointing:
        checkpoint_blocks(model, offload=_Offload(ledger) if shape.offloaded else None)
    autocast = torch.autocast("cpu", shape.dtype, enabled=needs_autocast(model, shape.dtype))
    batch, chunk = empty_batch(shape), chunk_of(SupervisedLoss(model).head, shape.device)
    loss = SupervisedLoss(model, chunk_tokens=chunk)
    loss.head.register_forward_pre_hook(lambda *_: ledger.enter("logits"))
    for _ in range(min(TRACED_MICRO_BATCHES, shape.micro_batches)):
        ledger.enter("activations")
        with autocast:
            value = loss(batch, num_supervised=torch.tensor(1))
        ledger.enter("transient")
        value.backward()


def _has_mask(shape: StepShape) -> bool:
    """Whether packed rows are kept apart by a mask; on a GPU by their bounds (graftline.train.attention)."""
    return shape.packed and shape.device == "cpu"


@contextlib.contextmanager
def _attention_of(shape: StepShape) -> Iterator[None]:
    """Keep transformers from assuming packed rows, which it does if positions have no values.

    It would make a mask (B, 1, T, T) that trainings without packing do not have.
    """
    if _has_mask(shape):
        yield
        return
    real = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = real


def fake_model(
    config: PretrainedConfig, *, layers: int | None = None, dtype: torch.dtype, quantized: bool
) -> PreTrainedModel:
    """A model without memory; make it and use it inside a FakeTensorMode."""
    text = config.get_text_config()
    before = text.num_hidden_layers, getattr(text, "layer_types", None)
    text.num_hidden_layers = layers or before[0]
    if before[1] is not None:
        text.layer_types = before[1][: text.num_hidden_layers]
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    finally:
        text.num_hidden_layers = before[0]
        if before[1] is not None:
            text.layer_types = before[1]
    open_experts(model)
    if quantized:
        for name, layer in list(block_linears(model).items()):
            model.set_submodule(name, _Dequantized(layer))
        for name, stack in quantized_stacks(model).items():
            model.set_submodule(name, _DequantizedExperts(stack))
    return model


def quantized_stacks(model: PreTrainedModel) -> dict[str, ExpertStack]:
    """The experts that a quantized base holds quantized, by path: those with a matrix each in files."""
    architecture = ARCHITECTURES.get(type(model).__name__)
    return expert_stacks(model) if architecture and architecture.experts == "each" else {}


def quantized_sizes(model: PreTrainedModel) -> tuple[int, int]:
    """Weights that a quantized base holds quantized, and rows of their matrices."""
    linears, stacks = block_linears(model).values(), quantized_stacks(model).values()
    weights = sum(layer.weight.numel() for layer in linears)
    rows = sum(features_of(layer)[1] for layer in linears)
    of_experts = sum(stack.num_experts * stack.out_features for stack in stacks)
    return (
        weights + sum(stack.num_experts * stack.out_features * stack.in_features for stack in stacks),
        rows + of_experts,
    )


def block_linears(model: PreTrainedModel) -> dict[str, nn.Linear | Conv1D]:
    """Linear layers inside the decoder's blocks, by path: those that are quantized."""
    head = model.get_output_embeddings()
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}


def empty_batch(shape: StepShape, *, device: str = "cpu") -> MicroBatch:
    """A micro-batch of this shape in its layout; every token is token 0."""
    zeros, tokens = partial(torch.zeros, dtype=torch.long, device=device), shape.tokens - shape.prefix_tokens
    batch = MicroBatch(
        input_ids=zeros(shape.rows, tokens),
        predict_at=zeros(shape.supervised_tokens),
        targets=zeros(shape.supervised_tokens),
        num_tokens=torch.tensor(shape.rows * shape.tokens, device=device),
    )
    if _has_mask(shape):
        batch["position_ids"] = zeros(shape.rows, tokens)
    if shape.prefix_tokens:
        batch["prefix_ids"] = zeros(1, shape.prefix_tokens)
    return batch


class _Dequantized(nn.Module):
    """A stand-in for a quantized layer: its weight takes memory only while it is used, as a dense one."""

    def __init__(self, layer: nn.Linear | Conv1D) -> None:
        super().__init__()
        self.in_features, self.out_features = features_of(layer)
        self.dtype, self.bias = layer.weight.dtype, layer.bias

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(self.out_features, self.in_features, dtype=dtype or self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _DequantizedProduct.apply(x.to(self.dtype), self)
        return y if self.bias is None else y + self.bias


class _DequantizedExperts(ExpertStack):
    """As `_Dequantized`, for experts: a matrix takes memory only while it is used."""

    def __init__(self, stack: ExpertStack) -> None:
        assert stack.weight is not None
        super().__init__(stack.weight, transposed=stack.transposed, parts=stack.parts)
        self.weight = None

    def matrix(self, expert: int, dtype: torch.dtype) -> Tensor:
        del expert
        return torch.empty(self.out_features, self.in_features, dtype=dtype)


class _DequantizedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _Dequantized) -> Tensor:
        ctx.layer = layer
        return x @ layer.dense_weight().T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dense_weight(), None


class Ledger(TorchDispatchMode):
    """Bytes of live storages by phase (a field of `StepMemory`), now and at the peak of each moment."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._live: dict[int, tuple[int, str | None]] = {}
        self._now: dict[str, float] = dict.fromkeys((field.name for field in fields(StepMemory)), 0)
        self._phase: str | None = None  # of the model's own tensors, which are not counted
        self._num_trained, self._num_gradients = 0, 0
        self.peaks: dict[_Moment, dict[str, float]] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            self._see(tensor.detach())
        for parameter in model.parameters():
            if parameter.requires_grad:
                self._num_trained += 1
                parameter.register_post_accumulate_grad_hook(self._is_gradient)

    def enter(self, phase: str) -> None:
        """New storages belong to ``phase`` from now on."""
        self._phase = phase

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[None]:
        """New storages are not on the device that is planned."""
        phase, self._phase = self._phase, None
        try:
            yield
        finally:
            self._phase = phase

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        self._live[key] = (storage.nbytes(), self._phase)
        weakref.finalize(storage, self._forget, key)
        if self._phase is not None:
            self._now[self._phase] += storage.nbytes()
            moment = (self._phase, 2 * self._num_gradients // max(1, self._num_trained))
            if sum(self._now.values()) > sum(self.peaks.get(moment, {}).values()):
                self.peaks[moment] = dict(self._now)

    def _forget(self, key: int) -> None:
        num_bytes, phase = self._live.pop(key)
        if phase is not None:
            self._now[phase] -= num_bytes

    def _is_gradient(self, parameter: Tensor) -> None:
        self._num_gradients += 1
        if parameter.grad is None:
            return
        key = parameter.grad.untyped_storage()._cdata
        num_bytes, phase = self._live.get(key, (0, None))
        if phase is not None and phase != "gradients":
            self._now[phase] -= num_bytes
            self._now["gradients"] += num_bytes
            self._live[key] = (num_bytes, "gradients")


class _Offload(ActivationOffload):
    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    def _host_tensor(self, tensor: Tensor) -> Tensor:
        with self._ledger.elsewhere():
            return super()._host_tensor(tensor)
