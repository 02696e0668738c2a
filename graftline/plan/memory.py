"""How much memory and time a training will take, from a configuration alone.

Weights, constants, adapters and optimizer states are counted; a step's memory is traced (graftline.plan.trace). GB are
10⁹ bytes. Each part has three values: ``low`` is what the code allocates, ``expected`` adds the allocator's usual
waste, ``high`` its worst waste and a larger CUDA context.

    4-bit codes      bits / 8 bytes a weight of the blocks' linear layers (QLoRA §3, arXiv 2305.14314)
    constants        one an absmax block: 4 bytes, or 1 byte and 4 / 256 with double quantization
    AdamW            8 bytes a trained parameter (two fp32 states); 8-bit: 2 bytes and 2 · 4 / 256 (arXiv 2110.02861)
"""

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from graftline.adapters.attach import attach, trainable_parameters
from graftline.adapters.base import dense_weight
from graftline.plan.trace import (
    TRACED_MICRO_BATCHES,
    StepMemory,
    StepShape,
    block_linears,
    empty_batch,
    fake_model,
    quantized_sizes,
    trace_step,
)
from graftline.settings.model import Adapter, Optimizer, Quantize
from graftline.train.devices import DeviceKind, needs_autocast, weight_dtype
from graftline.train.loss import SupervisedLoss
from graftline.weights.experts import expert_stacks, open_experts
from graftline.weights.model_folder import has_experts
from graftline.weights.quant.blockwise import quantize
from graftline.weights.quant.linear import QuantLinear
from graftline.weights.quant.scheme import NESTED_BLOCK_SIZE, Scheme, plan_of
from graftline.weights.sharded import blocks_of

SAME_IN_TRAINING = {"pissa": "lora", "qpissa": "lora", "loftq": "lora"}
"""Methods that differ from LoRA only in their initial values, which need real weights."""
HEAP_WASTE, RETURNED_WASTE = 0.41, 0.04
"""On a CPU glibc's heap keeps holes between live tensors, 0.2 to 0.73 of their size; with checkpointing freed memory is
returned instead (graftline.train.devices.return_freed_tensors). Measured in studies/memory.py: 0.41 is the mean of six
cases and was tested on the others."""
_WASTE = {"heap": (0.0, HEAP_WASTE, 0.75), "returned": (0.0, RETURNED_WASTE, 0.15), "cuda": (0.0, 0.05, 0.1)}
"""Share of a step's memory that the allocator loses: low, expected, high."""
_CONTEXT_BYTES = {"cpu": (0.0, 0.0, 0.0), "cuda": (0.5e9, 0.75e9, 1.0e9)}
_SMALLEST_8BIT = 4096
"""bitsandbytes keeps fp32 states for smaller tensors."""


def expected_waste(allocator: Literal["heap", "returned", "cuda"]) -> float:
    """Share of a step's memory that an allocator usually wastes."""
    return _WASTE[allocator][1]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The properties of a training that its memory depends on."""

    adapter: Adapter
    shape: StepShape
    quantization: Scheme | None
    """None: dense weights, in ``shape.dtype`` unless they are trained."""
    optimizer: Optimizer
    device: DeviceKind
    batch_size: int | None = None
    """`train.batch_size`: rows that may be packed into fewer sequences, or pairs of two; None: one a sequence."""
    processes: int = 1
    """Processes that train together, one a device; what is planned is the memory of one."""
    sharded: bool = False
    """Whether the base is divided over them (`graftline.weights.sharded`)."""
    may_shard: bool = False
    """Whether it could be."""


@dataclass(frozen=True)
class MemoryUse:
    """A use of memory, bytes."""

    name: str
    low: float
    expected: float
    high: float


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of a training by part."""

    parts: tuple[MemoryUse, ...]
    num_parameters: int
    num_trained: int
    processes: int = 1
    """Processes that train together; each takes this memory, as their shares are equal."""
    divided: tuple[str, ...] = ()
    """Parts of which each process has a share; of the others it has all."""

    @property
    def total(self) -> MemoryUse:
        """Sum of the parts."""
        low, expected, high = (sum(getattr(part, name) for part in self.parts) for name in ("low", "expected", "high"))
        return MemoryUse("total", low, expected, high)

    def document(self) -> dict[str, Any]:
        """The plan as JSON; bytes."""
        return {
            "parts": [
                {"name": part.name}
                | {f"{name}_bytes": round(getattr(part, name)) for name in ("low", "expected", "high")}
                for part in (*self.parts, self.total)
            ],
            "parameters": self.num_parameters,
            "trained_parameters": self.num_trained,
            **({"processes": self.processes, "divided": list(self.divided)} if self.processes > 1 else {}),
        }

    def table(self) -> str:
        """The parts and their sum in GB, as aligned text."""
        lines = [f"{'GB':<24}{'low':>9}{'expected':>10}{'high':>9}"]
        lines += [
            f"{part.name:<24}{part.low / 1e9:>9.3f}{part.expected / 1e9:>10.3f}{part.high / 1e9:>9.3f}"
            for part in (*self.parts, self.total)
        ]
        if self.processes > 1:
            lines.append(
                f"for each of {self.processes} processes, rank 0 to {self.processes - 1} alike; {self._division()}"
            )
        return "\n".join(lines)

    def _division(self) -> str:
        if not self.divided:
            return "each has the whole base (train.sharding: true divides it)"
        return f"divided over them: {' and '.join(self.divided)}; each has the rest whole"


def untrained(spec: Adapter) -> Adapter:
    """The adapter in a form that a model without weights can have: LoRA if it differs only in its initial values."""
    return spec.model_copy(update={"method": SAME_IN_TRAINING.get(spec.method, spec.method)})


def plan_memory(config: PretrainedConfig, workload: Workload) -> MemoryPlan:
    """The memory for training a model of this configuration; AdapterError if the adapter does not fit it."""
    spec = untrained(workload.adapter)
    held = count_held(config, workload)
    traced = min(TRACED_MICRO_BATCHES, workload.shape.micro_batches)
    shape, is_quantized = replace(workload.shape, micro_batches=traced), workload.quantization is not None
    config_json = f"{config._attn_implementation} {config.to_json_string()}"
    step = _trace(_Traced(config_json, spec.model_dump_json(), shape, is_quantized, config, spec))
    return MemoryPlan(
        tuple(_parts(held, step, workload)),
        held.num_parameters,
        held.num_trained,
        workload.processes,
        ("weights", "quantization constants") if workload.sharded else (),
    )


@dataclass(frozen=True)
class _Traced:
    """What a trace depends on. Of many alternatives (processes, optimizers, numbers of micro-batches) few differ."""

    config_json: str
    spec_json: str
    shape: StepShape
    is_quantized: bool
    config: PretrainedConfig = field(compare=False)
    spec: Adapter = field(compare=False)


@lru_cache(maxsize=256)
def _trace(of: _Traced) -> StepMemory:
    def prepare(model: PreTrainedModel) -> None:
        attach(model, of.spec, seed=0)

    weights = weight_dtype(of.shape.dtype, of.spec)
    return trace_step(of.config, of.shape, prepare=prepare, quantized=of.is_quantized, weights=weights)


@dataclass(frozen=True)
class MemoryBreakdown:
    """What is in memory before, during and after a step; bytes."""

    num_parameters: int
    num_trained: int
    weights: float
    constants: float
    adapters: float
    optimizer: float
    gathered: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """What a sharded base has gathered at a time: low, expected, high."""


def count_held(config: PretrainedConfig, workload: Workload) -> MemoryBreakdown:
    """Count a model's weights and its adapter; no step is traced. Raises as `plan_memory`."""
    spec = untrained(workload.adapter)
    with FakeTensorMode():
        model = fake_model(config, dtype=workload.shape.dtype, quantized=False)
        total = sum(p.numel() for p in model.parameters())
        blocks = blocks_of(model) if workload.sharded else []
        outside = total - sum(parameter.numel() for each in blocks for parameter in each.parameters())
        block, rows = quantized_sizes(model)
        attach(model, spec, seed=0)
        trained = {name: parameter.numel() for name, parameter in trainable_parameters(model).items()}
    num_trained = sum(trained.values())
    item = weight_dtype(workload.shape.dtype, spec).itemsize
    scheme = workload.quantization
    # Full fine-tuning adds no parameters.
    added = 0 if spec.method == "full" else num_trained
    if scheme is None:
        weights, constants = float(total * item), 0.0
    else:
        weights = block * scheme.bits / 8 + (total - block) * item
        each = 1 + 4 / NESTED_BLOCK_SIZE if scheme.double_quant else 4
        constants = (rows if scheme.code == "fp8" else block / scheme.block_size) * each
    gathered = (0.0, 0.0, 0.0)
    if workload.sharded:
        outside_bytes = float(outside * item)
        gathered = _gathered(outside_bytes, (weights + constants - outside_bytes) / len(blocks))
        weights, constants = weights / workload.processes, constants / workload.processes
    return MemoryBreakdown(
        num_parameters=total,
        num_trained=num_trained,
        weights=weights,
        constants=constants,
        gathered=gathered,
        adapters=4.0 * added,
        optimizer=sum(_state_bytes(numel, workload.optimizer) for numel in trained.values()),
    )


def _gathered(outside: float, block: float) -> tuple[float, float, float]:
    """Low, expected, high of what FSDP2 has gathered at a time, from the bytes outside the blocks and of one block.

    Embedding, last norm and head are gathered for the whole step, and so is the block that runs; while it runs, the
    next one arrives, first in a buffer and then in its tensors. At the start embedding and head are in such a buffer.
    """
    return outside + block, outside + 3 * block, max(outside + 4 * block, 2 * outside + 2 * block)


def _state_bytes(numel: int, optimizer: Optimizer) -> float:
    if "8bit" in optimizer and numel >= _SMALLEST_8BIT:
        return numel * (2 + 2 * 4 / 256)
    return 8.0 * numel


def _parts(held: MemoryBreakdown, step: StepMemory, workload: Workload) -> Iterator[MemoryUse]:
    for name in ("weights", "constants", "adapters"):
        value = getattr(held, name)
        yield MemoryUse({"constants": "quantization constants"}.get(name, name), value, value, value)
    if workload.sharded:
        yield MemoryUse("gathered weights", *held.gathered)
    # Paged states can leave the device, but bitsandbytes pages only tensors of at least 1e5 elements.
    paged = workload.optimizer.startswith("paged") and workload.device == "cuda"
    yield MemoryUse("optimizer", 0.0 if paged else held.optimizer, held.optimizer, held.optimizer)
    allocator = "cuda" if workload.device == "cuda" else "returned" if workload.shape.checkpointing else "heap"
    for name in ("gradients", "activations", "logits", "transient"):
        value = getattr(step, name)
        low, expected, high = (value * (1 + waste) for waste in _WASTE[allocator])
        yield MemoryUse(name, low, expected, high)
    yield MemoryUse("CUDA context", *_CONTEXT_BYTES[workload.device])


@dataclass(frozen=True)
class MemoryAlternative:
    """A change of the training, and the memory that it then needs."""

    what: str
    plan: MemoryPlan


def what_would_fit(config: PretrainedConfig, workload: Workload, *, limit_bytes: float) -> list[MemoryAlternative]:
    """Cumulative changes, the mildest first, up to the first whose expected memory fits, if one does."""
    workload = replace(workload, may_shard=workload.may_shard and not has_experts(config))
    changes: list[MemoryAlternative] = []
    for what, changed in _milder(workload):
        changes.append(MemoryAlternative(what, plan_memory(config, changed)))
        if changes[-1].plan.total.expected <= limit_bytes:
            break
    return changes


def _milder(workload: Workload) -> Iterator[tuple[str, Workload]]:
    shape, rows = workload.shape, workload.batch_size or workload.shape.rows
    if not shape.checkpointing:
        # Recomputed layers cannot use a cache, so there is no shared prefix.
        shape = replace(shape, checkpointing=True, prefix_tokens=0)
        workload = replace(workload, shape=shape)
        yield "train.gradient_checkpointing: true", workload
    if workload.device == "cuda" and not shape.offloaded:
        shape = replace(shape, offloaded=True)
        workload = replace(workload, shape=shape)
        yield "train.offload_activations: true", workload
    while rows > 1:
        pieces = 2 if rows % 2 == 0 else rows
        rows, shape = rows // pieces, _cut(shape, pieces)
        workload = replace(workload, shape=shape, batch_size=rows)
        yield f"train.batch_size: {rows}, train.gradient_accumulation: {shape.micro_batches}", workload
    if workload.optimizer == "adamw" and workload.device == "cuda":
        workload = replace(workload, optimizer="paged_adamw_8bit")
        yield "train.optimizer: paged_adamw_8bit", workload
    if workload.may_shard and not workload.sharded:
        workload = replace(workload, sharded=True, shape=replace(workload.shape, prefix_tokens=0))
        yield "train.sharding: true", workload
    if workload.quantization is None and workload.adapter.method != "full":
        workload = replace(workload, quantization=plan_of(Quantize(method="nf4")).default)
        yield "quantize.method: nf4", workload


def _cut(shape: StepShape, pieces: int) -> StepShape:
    """One of ``pieces`` equal micro-batches; packed sequences get shorter."""
    rows, tokens = -(-shape.rows // pieces), shape.tokens
    if shape.packed and shape.rows < pieces:
        rows, tokens = 1, -(-shape.rows * shape.tokens // pieces)
    supervised = max(1, shape.supervised_tokens // pieces)
    micro_batches = shape.micro_batches * pieces
    return replace(shape, rows=rows, tokens=tokens, supervised_tokens=supervised, micro_batches=micro_batches)


# The time of a micro-batch is measured on models of one and of two blocks with made-up weights. The difference is a
# block; the rest of the first is embedding, head and loss. The vocabulary has at most 4,096 words and the micro-batch
# 512 tokens; both parts are extrapolated linearly to the real number of blocks, words and tokens. Attention over long
# rows grows faster than that, so their time is underestimated.

_MOST_WORDS, _MOST_TOKENS = 4096, 512
_AT_MOST_SECONDS = 0.5
"""How long a step is repeated; the fastest counts."""
_STAND_IN = LlamaConfig(
    vocab_size=_MOST_WORDS,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=2,
    num_attention_heads=8,
    tie_word_embeddings=True,
)


def measure_micro_batch(config: PretrainedConfig, workload: Workload, *, limit_bytes: float) -> float | None:
    """Seconds of one micro-batch, forward and backward, on this device now, with torch's present number of threads.

    None if two blocks alone need more than ``limit_bytes``.
    """
    shape, text = workload.shape, config.get_text_config()
    words = min(text.vocab_size, _MOST_WORDS)
    small = _small_shape(shape)
    if 8.0 * _block_parameters(config, words) > limit_bytes:  # two blocks in fp32, before one is quantized
        return None
    one, two = (_best_seconds(_small_config(config, blocks, words), workload, small) for blocks in (1, 2))
    seconds = continue_to(text.num_hidden_layers, one, two, words=text.vocab_size / words)
    return seconds * (shape.rows * shape.tokens) / (small.rows * small.tokens)


def stand_in_micro_batch(config: PretrainedConfig, workload: Workload, *, limit_bytes: float) -> float | None:
    """Seconds of one micro-batch, scaled from a small Llama's by the number of multiplications.

    For a base of which not even two blocks can be tried here. Matrices of other sizes run at other speeds, so this is a
    rough figure; docs/training.md says how rough. None if the small Llama does not fit into ``limit_bytes`` either.
    """
    adapter = workload.adapter
    rank = min(adapter.rank, _STAND_IN.hidden_size // 2)
    general = Adapter(method=adapter.method, rank=rank, alpha=adapter.alpha, dropout=adapter.dropout)
    seconds = measure_micro_batch(_STAND_IN, replace(workload, adapter=general), limit_bytes=limit_bytes)
    return seconds and seconds * _products(config, workload.shape) / _products(_STAND_IN, workload.shape)


def _products(config: PretrainedConfig, shape: StepShape) -> float:
    """Multiplications of one pass: every token through the blocks' linear layers, supervised ones through the head."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    open_experts(model)
    blocks = sum(layer.weight.numel() for layer in block_linears(model).values())
    chosen = getattr(config.get_text_config(), "num_experts_per_tok", 1)  # experts that a token runs through
    blocks += sum(chosen * stack.out_features * stack.in_features for stack in expert_stacks(model).values())
    head = model.get_output_embeddings().weight.numel()
    return float(blocks * shape.rows * shape.tokens + head * shape.supervised_tokens)


def continue_to(blocks: int, one: float, two: float, *, words: float) -> float:
    """Seconds with ``blocks`` blocks and ``words`` times the vocabulary, from those with one and with two blocks."""
    block = min(one, max(0.0, two - one))
    return blocks * block + (one - block) * words


def _small_shape(shape: StepShape) -> StepShape:
    tokens = min(shape.tokens, _MOST_TOKENS)
    rows = max(1, min(shape.rows, _MOST_TOKENS // tokens))
    share = rows * tokens / (shape.rows * shape.tokens)
    supervised = min(rows * tokens, max(1, round(shape.supervised_tokens * share)))
    # Without the prefix, whose saving depends on the micro-batch: this is an upper bound.
    return replace(shape, rows=rows, tokens=tokens, supervised_tokens=supervised, prefix_tokens=0)


def _small_config(config: PretrainedConfig, blocks: int, words: int) -> PretrainedConfig:
    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = blocks, words, None
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = (list(text.layer_types) * blocks)[:blocks]
    return small


def _block_parameters(config: PretrainedConfig, words: int) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_small_config(config, 1, words))
    return sum(parameter.numel() for parameter in model.parameters())


def _best_seconds(config: PretrainedConfig, workload: Workload, shape: StepShape) -> float:
    model = _made_up(config, workload)
    loss, batch = SupervisedLoss(model), empty_batch(shape, device=workload.device)
    autocast = torch.autocast(workload.device, shape.dtype, enabled=needs_autocast(model, shape.dtype))
    best, began = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - began < _AT_MOST_SECONDS:
        started = time.perf_counter()
        with autocast:
            value = loss(batch, num_supervised=torch.tensor(1, device=workload.device))
        value.backward()
        value.item()  # waits for a CUDA device
        best = min(best, time.perf_counter() - started)
    return best


def _made_up(config: PretrainedConfig, workload: Workload) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=workload.shape.dtype)
    model.to_empty(device=workload.device)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(0.01)  # uninitialized memory may hold NaN, and denormal numbers are slow
    if workload.quantization is not None:
        for name, layer in block_linears(model).items():
            quantized = quantize(dense_weight(layer).float(), workload.quantization)
            model.set_submodule(name, QuantLinear(quantized, layer.bias))
    attach(model, untrained(workload.adapter), seed=0)
    model.train()
    if workload.shape.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model
