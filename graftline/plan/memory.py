"""How much memory a training will need, before anything is loaded: from a configuration alone.

Weights, constants, adapters and optimizer states are counted; what a step adds is traced (graftline.plan.trace). GB
are 10⁹ bytes. Each part has three values: ``low`` is what the code allocates and nothing else, ``expected`` adds what
an allocator usually wastes, ``high`` what it wastes at worst and a larger CUDA context.

    4-bit codes      bits / 8 bytes a weight of the blocks' linear layers (QLoRA §3, arXiv 2305.14314)
    constants        one an absmax block: 4 bytes, or 1 byte and 4 / 256 with double quantization
    AdamW            8 bytes a trained parameter (two fp32 states); 8-bit: 2 bytes and 2 · 4 / 256 (arXiv 2110.02861)
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel

from graftline.adapters.attach import attach, trainable_parameters
from graftline.plan.trace import StepMemory, StepShape, block_linears, fake_model, trace_step
from graftline.settings.model import Adapter, Optimizer, Quantize
from graftline.train.devices import DeviceKind, weight_dtype
from graftline.weights.quant.plan import plan_of
from graftline.weights.quant.scheme import NESTED_BLOCK_SIZE, Scheme

SAME_IN_TRAINING = {"pissa": "lora", "qpissa": "lora", "loftq": "lora"}
"""Methods that differ from LoRA only in how they start, which needs weights that are not there."""
HEAP_WASTE, RETURNED_WASTE = 0.41, 0.04
"""On a CPU glibc's heap keeps holes between live tensors, from 0.2 to 0.73 of what is alive; with checkpointing freed
memory is returned instead (graftline.train.devices.return_freed_tensors). studies/memory.py: the first is the mean
of six cases, tried on the others.
"""
_WASTE = {"heap": (0.0, HEAP_WASTE, 0.75), "returned": (0.0, RETURNED_WASTE, 0.15), "cuda": (0.0, 0.05, 0.1)}
"""Share of a step's memory that the allocator loses: low, expected, high."""
_CONTEXT_BYTES = {"cpu": (0.0, 0.0, 0.0), "cuda": (0.5e9, 0.75e9, 1.0e9)}
_SMALLEST_8BIT = 4096
"""bitsandbytes keeps fp32 states for smaller tensors."""


def expected_waste(allocator: Literal["heap", "returned", "cuda"]) -> float:
    """Share of a step's memory that this allocator usually loses."""
    return _WASTE[allocator][1]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is trained, as far as memory depends on it."""

    adapter: Adapter
    shape: StepShape
    quantization: Scheme | None
    """None: dense weights, in ``shape.dtype`` unless some are trained."""
    optimizer: Optimizer
    device: DeviceKind
    batch_size: int | None = None
    """Rows of a micro-batch where they are packed into fewer sequences; None: each is one."""


@dataclass(frozen=True)
class Part:
    """One use of memory in bytes."""

    name: str
    low: float
    expected: float
    high: float


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of a training by part."""

    parts: tuple[Part, ...]
    num_parameters: int
    num_trained: int

    @property
    def total(self) -> Part:
        """Sum of the parts."""
        low, expected, high = (sum(getattr(part, name) for part in self.parts) for name in ("low", "expected", "high"))
        return Part("total", low, expected, high)

    def document(self) -> dict[str, Any]:
        """The plan as JSON; bytes."""
        return {
            "parts": [
                {
                    "name": part.name,
                    "low_bytes": round(part.low),
                    "expected_bytes": round(part.expected),
                    "high_bytes": round(part.high),
                }
                for part in (*self.parts, self.total)
            ],
            "parameters": self.num_parameters,
            "trained_parameters": self.num_trained,
        }

    def table(self) -> str:
        """The parts and their sum in GB as aligned text."""
        lines = [f"{'GB':<24}{'low':>9}{'expected':>10}{'high':>9}"]
        lines += [
            f"{part.name:<24}{part.low / 1e9:>9.3f}{part.expected / 1e9:>10.3f}{part.high / 1e9:>9.3f}"
            for part in (*self.parts, self.total)
        ]
        return "\n".join(lines)


def untrained(spec: Adapter) -> Adapter:
    """The adapter as it can be put on a model without weights: as LoRA where it only starts differently."""
    return spec.model_copy(update={"method": SAME_IN_TRAINING.get(spec.method, spec.method)})


def plan_memory(config: PretrainedConfig, workload: Workload) -> MemoryPlan:
    """Memory that training a model of this configuration takes.

    Raises:
        AdapterError: a target of the adapter matches no layer, or a rank is too large.
    """
    spec = untrained(workload.adapter)
    held = count_held(config, workload)

    def prepare(model: PreTrainedModel) -> None:
        attach(model, spec, seed=0)

    step = trace_step(
        config,
        workload.shape,
        prepare=prepare,
        quantized=workload.quantization is not None,
        weights=weight_dtype(workload.shape.dtype, spec),
    )
    return MemoryPlan(tuple(_parts(held, step, workload)), held.num_parameters, held.num_trained)


@dataclass(frozen=True)
class Held:
    """What is there before, during and after a step; bytes."""

    num_parameters: int
    num_trained: int
    weights: float
    constants: float
    adapters: float
    optimizer: float


def count_held(config: PretrainedConfig, workload: Workload) -> Held:
    """Count a model's weights and what is attached to it; no step is traced.

    Raises:
        AdapterError: as `plan_memory`.
    """
    spec = untrained(workload.adapter)
    with FakeTensorMode():
        model = fake_model(config, dtype=workload.shape.dtype, quantized=False)
        total = sum(p.numel() for p in model.parameters())
        block = sum(layer.weight.numel() for layer in block_linears(model).values())
        attach(model, spec, seed=0)
        trained = {name: parameter.numel() for name, parameter in trainable_parameters(model).items()}
    num_trained = sum(trained.values())
    item = weight_dtype(workload.shape.dtype, spec).itemsize
    scheme = workload.quantization
    # A fully trained model has no parameters beside its own.
    added = 0 if spec.method == "full" else num_trained
    if scheme is None:
        weights, constants = float(total * item), 0.0
    else:
        weights = block * scheme.bits / 8 + (total - block) * item
        each = 1 + 4 / NESTED_BLOCK_SIZE if scheme.double_quant else 4
        constants = block / scheme.block_size * each
    return Held(
        num_parameters=total,
        num_trained=num_trained,
        weights=weights,
        constants=constants,
        adapters=4.0 * added,
        optimizer=sum(_state_bytes(numel, workload.optimizer) for numel in trained.values()),
    )


def _state_bytes(numel: int, optimizer: Optimizer) -> float:
    if "8bit" in optimizer and numel >= _SMALLEST_8BIT:
        return numel * (2 + 2 * 4 / 256)
    return 8.0 * numel


def _parts(held: Held, step: StepMemory, workload: Workload) -> Iterator[Part]:
    for name in ("weights", "constants", "adapters"):
        value = getattr(held, name)
        yield Part({"constants": "quantization constants"}.get(name, name), value, value, value)
    # Paged states can leave the device; bitsandbytes pages only tensors of 1e5 elements or more, so not all of them.
    paged = workload.optimizer.startswith("paged") and workload.device == "cuda"
    yield Part("optimizer", 0.0 if paged else held.optimizer, held.optimizer, held.optimizer)
    allocator = "cuda" if workload.device == "cuda" else "returned" if workload.shape.checkpointing else "heap"
    for name in ("gradients", "activations", "logits", "transient"):
        value = getattr(step, name)
        low, expected, high = (value * (1 + waste) for waste in _WASTE[allocator])
        yield Part(name, low, expected, high)
    yield Part("CUDA context", *_CONTEXT_BYTES[workload.device])


@dataclass(frozen=True)
class Change:
    """A change of the training, and what it would then need."""

    what: str
    plan: MemoryPlan


def what_would_fit(config: PretrainedConfig, workload: Workload, *, limit_bytes: float) -> list[Change]:
    """Changes, the mildest first, each on top of those before it, up to the first whose expected memory fits.

    The last one may still not fit: then nothing here helps.
    """
    changes: list[Change] = []
    for what, changed in _milder(workload):
        changes.append(Change(what, plan_memory(config, changed)))
        if changes[-1].plan.total.expected <= limit_bytes:
            break
    return changes


def _milder(workload: Workload) -> Iterator[tuple[str, Workload]]:
    shape, rows = workload.shape, workload.batch_size or workload.shape.rows
    if not shape.checkpointing:
        # A layer that is computed again cannot use a cache: no shared prefix then.
        shape = replace(shape, checkpointing=True, prefix_tokens=0)
        workload = replace(workload, shape=shape)
        yield "train.gradient_checkpointing: true", workload
    while rows > 1:
        pieces = 2 if rows % 2 == 0 else rows
        rows, shape = rows // pieces, _cut(shape, pieces)
        workload = replace(workload, shape=shape, batch_size=rows)
        yield f"train.batch_size: {rows}, train.gradient_accumulation: {shape.micro_batches}", workload
    if workload.optimizer == "adamw" and workload.device == "cuda":
        workload = replace(workload, optimizer="paged_adamw_8bit")
        yield "train.optimizer: paged_adamw_8bit", workload
    if workload.quantization is None and workload.adapter.method != "full":
        workload = replace(workload, quantization=plan_of(Quantize(method="nf4")).default)
        yield "quantize.method: nf4", workload


def _cut(shape: StepShape, pieces: int) -> StepShape:
    """One of ``pieces`` equal micro-batches; rows packed into one sequence make it shorter."""
    rows, tokens = -(-shape.rows // pieces), shape.tokens
    if shape.packed and shape.rows < pieces:
        rows, tokens = 1, -(-shape.rows * shape.tokens // pieces)
    supervised = max(1, shape.supervised_tokens // pieces)
    micro_batches = shape.micro_batches * pieces
    return replace(shape, rows=rows, tokens=tokens, supervised_tokens=supervised, micro_batches=micro_batches)
