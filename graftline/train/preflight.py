"""What a training will do and need, before anything is spent: no weights are loaded.

The caller brings the model's configuration and the encoded rows; the adapter's coverage, the memory by part, the time
and what would fit instead are worked out here. `check_fits` stops a run that cannot fit.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import psutil
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig

from graftline.adapters.attach import Coverage, attach
from graftline.adapters.spec import AdapterSpec
from graftline.data.template import Encoded
from graftline.errors import TrainError
from graftline.quant.scheme import Scheme
from graftline.train.batches import check_rows, count_steps, supervised_positions
from graftline.train.devices import DTYPES, DeviceKind, resolve_device, resolve_precision
from graftline.train.distributed import num_processes
from graftline.train.memory import SAME_IN_TRAINING, Change, MemoryPlan, Workload, plan_memory, what_would_fit
from graftline.train.settings import TrainSettings
from graftline.train.trace import StepShape, block_linears, fake_model

_SHARE_OF_LIMIT = 0.55
"""Of a step's time, what the blocks' matrix products alone take (benchmarks/training.py)."""
_HISTOGRAM_EDGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)


@dataclass(frozen=True)
class Plan:
    """What a training will do and need. Bytes, seconds, tokens."""

    coverage: Coverage
    memory: MemoryPlan
    available_bytes: int
    """Free memory of the device now."""
    changes: tuple[Change, ...]
    """What would make it fit, step by step; empty if it fits."""
    num_steps: int
    num_rows: int
    longest_row: int
    supervised_histogram: tuple[tuple[str, int], ...]
    """(range of supervised tokens, rows) without empty ranges."""
    tokens_per_step: float
    seconds: tuple[float, float]
    """From, to: the time of the matrix products alone, measured on this device now, and the usual share of it."""

    @property
    def fits(self) -> bool:
        """Whether the expected memory is free now."""
        return self.memory.total.expected <= self.available_bytes

    def text(self) -> str:
        """The plan as text for a terminal."""
        widest = max(count for _, count in self.supervised_histogram)
        bars = [
            f"  {name:>10}  {count:>7}  {'█' * max(1, 30 * count // widest)}"
            for name, count in self.supervised_histogram
        ]
        low, high = self.seconds
        verdict = "fits" if self.fits else "does NOT fit"
        lines = [
            self.coverage.table(),
            "",
            f"rows {self.num_rows}, longest {self.longest_row} tokens; supervised tokens a row:",
            *bars,
            "",
            self.memory.table(),
            f"{'free on this device':<24}{self.available_bytes / 1e9:>19.3f}  → {verdict}",
            *[f"  {change.what}: {change.plan.total.expected / 1e9:.3f} GB" for change in self.changes],
            "",
            f"{self.num_steps} steps of about {self.tokens_per_step:.0f} tokens: "
            f"{low / 60:.1f} to {high / 60:.1f} minutes",
        ]
        return "\n".join(lines)


def plan(
    config: PretrainedConfig,
    rows: Sequence[Encoded],
    *,
    settings: TrainSettings,
    adapter: AdapterSpec,
    quantization: Scheme | None = None,
) -> Plan:
    """Plan a training of ``rows`` on a base with this configuration, on this machine.

    Args:
        config: the base's ``config.json``, as AutoConfig reads it.
        rows: encoded training rows.
        settings: of the training; ``auto`` becomes what it is here.
        adapter: what is attached.
        quantization: the base's scheme; None: dense.

    Raises:
        TrainError: rows that nothing can be learned from, a device or precision that is not there.
        AdapterError: a target that matches no layer.
    """
    check_rows(rows)
    device = resolve_device(settings.device)
    workload = _workload(rows, settings, adapter, quantization)
    memory, available = plan_memory(config, workload), _available_bytes(device)
    fits = memory.total.expected <= available
    rows_per_step = settings.batch_size * settings.gradient_accumulation * num_processes()
    num_steps = count_steps(len(rows), steps=settings.steps, epochs=settings.epochs, rows_per_step=rows_per_step)
    tokens_per_step = sum(len(row.input_ids) for row in rows) / len(rows) * rows_per_step
    limit = num_steps * _product_seconds(config, workload, tokens_per_step / num_processes())
    return Plan(
        coverage=_coverage(config, adapter),
        memory=memory,
        available_bytes=available,
        changes=() if fits else tuple(what_would_fit(config, workload, limit_bytes=available)),
        num_steps=num_steps,
        num_rows=len(rows),
        longest_row=max(len(row.input_ids) for row in rows),
        supervised_histogram=_histogram(rows),
        tokens_per_step=tokens_per_step,
        seconds=(limit, limit / _SHARE_OF_LIMIT * (4 / 3 if settings.gradient_checkpointing else 1)),
    )


def check_fits(config: PretrainedConfig, rows: Sequence[Encoded], **given: object) -> None:
    """Stop a training that cannot fit; takes what `plan` takes.

    Raises:
        TrainError: even the low estimate of its memory is not free; what would fit is named.
    """
    made = plan(config, rows, **given)  # type: ignore[arg-type]
    if made.memory.total.low <= made.available_bytes:
        return
    fitting = [change for change in made.changes if change.plan.total.expected <= made.available_bytes]
    names = "; ".join(change.what for change in made.changes)
    advice = f"it fits with {names}" if fitting else "no setting makes it fit: take a smaller base or a larger device"
    raise TrainError(
        f"the training needs {made.memory.total.low / 1e9:.2f} to {made.memory.total.high / 1e9:.2f} GB, "
        f"{made.available_bytes / 1e9:.2f} GB are free; {advice}"
    )


def _workload(
    rows: Sequence[Encoded], settings: TrainSettings, adapter: AdapterSpec, quantization: Scheme | None
) -> Workload:
    """The largest micro-batch: rows of similar length share a step, and the longest ones come together."""
    device = resolve_device(settings.device)
    largest = sorted(rows, key=lambda row: len(row.input_ids))[-settings.batch_size :]
    shape = StepShape(
        rows=settings.batch_size,
        tokens=len(largest[-1].input_ids),
        supervised_tokens=sum(len(supervised_positions(row)) for row in largest),
        micro_batches=settings.gradient_accumulation,
        checkpointing=settings.gradient_checkpointing,
        dtype=DTYPES[resolve_precision(settings.precision, device)],
    )
    return Workload(
        adapter=adapter, shape=shape, quantization=quantization, optimizer=settings.optimizer, device=device
    )


def _available_bytes(device: DeviceKind) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return int(psutil.virtual_memory().available)


def _coverage(config: PretrainedConfig, adapter: AdapterSpec) -> Coverage:
    with FakeTensorMode():
        model = fake_model(config, dtype=torch.float32, quantized=False)
        return attach(model, replace(adapter, method=SAME_IN_TRAINING.get(adapter.method, adapter.method)), seed=0)


def _histogram(rows: Sequence[Encoded]) -> tuple[tuple[str, int], ...]:
    counts = Counter(max(edge for edge in _HISTOGRAM_EDGES if edge <= len(supervised_positions(row))) for row in rows)
    following = dict(pairwise(_HISTOGRAM_EDGES))

    def name(edge: int) -> str:
        after = following.get(edge)
        return f"{edge}+" if after is None else f"{edge}" if after == edge + 1 else f"{edge}-{after - 1}"

    return tuple((name(edge), counts[edge]) for edge in sorted(counts))


def _product_seconds(config: PretrainedConfig, workload: Workload, tokens: float) -> float:
    """Time of the blocks' matrix products for ``tokens`` tokens, forward and to the input; measured on one block."""
    with FakeTensorMode():
        layers = block_linears(fake_model(config, layers=1, dtype=workload.shape.dtype, quantized=False))
        shapes = [(layer.out_features, layer.in_features) for layer in layers.values()]
    measured = min(512, max(1, round(tokens)))
    seconds = sum(_one_product_seconds(shape, measured, workload) for shape in shapes)
    blocks: int = config.get_text_config().num_hidden_layers
    return seconds * blocks * tokens / measured


def _one_product_seconds(shape: tuple[int, int], tokens: int, workload: Workload) -> float:
    dtype, device = workload.shape.dtype, workload.device
    weight_OI = torch.rand(shape, dtype=dtype, device=device)
    x_TI = torch.rand(tokens, shape[1], dtype=dtype, device=device)
    best = float("inf")
    for _ in range(2):
        started = time.perf_counter()
        y_TO = nn.functional.linear(x_TI, weight_OI)
        (y_TO @ weight_OI).sum().item()  # .item() waits for a CUDA device
        best = min(best, time.perf_counter() - started)
    return best
