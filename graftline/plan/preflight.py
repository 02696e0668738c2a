"""What a training will do and need: the adapter's coverage, memory by part, time, and what would fit instead.

It is computed from the model's configuration and the encoded rows; no weights are loaded. `check_fits` stops a run that
cannot fit.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, takewhile
from typing import Any

import numpy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig

from graftline.adapters.attach import Coverage, attach
from graftline.data.columns import EncodedColumns, columns_of
from graftline.data.template import Encoded
from graftline.errors import TrainError
from graftline.plan.memory import (
    MemoryAlternative,
    MemoryPlan,
    Workload,
    measure_micro_batch,
    plan_memory,
    untrained,
    what_would_fit,
)
from graftline.plan.micro_batches import MicroBatchChoice, best_of, ways_to_cut
from graftline.plan.trace import StepShape, fake_model
from graftline.settings.model import Adapter, Train
from graftline.train.batches import (
    SHORTEST_PREFIX,
    check_rows,
    count_steps,
    pack_rows,
    shared_prefix,
    supervised_positions,
)
from graftline.train.devices import (
    DTYPES,
    DeviceKind,
    cpu_threads,
    free_bytes,
    resolve_device,
    resolve_precision,
    what_limits,
)
from graftline.train.distributed import processes_here, wait_for_all
from graftline.train.preferences import check_pairs, steps_of_pairs
from graftline.weights.quant.scheme import Scheme

SLOWER = 1.5
"""Upper over lower end of the time: for the optimizer, checkpoints, and a busier machine."""
TIMED_SHARE = 0.25
"""Share of the free memory that the measured step may take."""
_LOOKED_AT = 1000
"""Rows whose common beginning is looked at before that of all."""
_HISTOGRAM_EDGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)


@dataclass(frozen=True)
class TrainingPlan:
    """What a training will do and need. Bytes, seconds, tokens."""

    coverage: Coverage
    memory: MemoryPlan
    available_bytes: int
    """Free memory of the device now; of a CPU's, which several processes share, the part of one."""
    changes: tuple[MemoryAlternative, ...]
    """Changes that would make it fit, step by step; empty if it fits."""
    num_steps: int
    num_rows: int
    longest_row: int
    supervised_histogram: tuple[tuple[str, int], ...]
    """(range of supervised tokens, rows), without empty ranges."""
    tokens_per_step: float
    micro_batches: tuple[MicroBatchChoice, ...]
    """Ways to cut a step, on a GPU; empty on a CPU, where only memory depends on it."""
    seconds: tuple[float, float] | None
    """From, to, by a short step that was measured on this device; None if not even that fits."""

    @property
    def fits(self) -> bool:
        """Whether the expected memory is free now."""
        return self.memory.total.expected <= self.available_bytes

    def text(self) -> str:
        """The plan for a terminal."""
        widest = max(count for _, count in self.supervised_histogram)
        bars = [
            f"  {name:>10}  {count:>7}  {'█' * max(1, 30 * count // widest)}"
            for name, count in self.supervised_histogram
        ]
        time = "time unknown: two of its blocks do not fit in the free memory"
        if self.seconds:
            time = f"{duration(self.seconds[0])} to {duration(self.seconds[1])}"
        verdict = "fits" if self.fits else "does NOT fit"
        where = "free for each of them" if self.memory.processes > 1 else "free on this device"
        lines = [
            self.coverage.table(),
            "",
            f"rows {self.num_rows}, longest {self.longest_row} tokens; supervised tokens a row:",
            *bars,
            "",
            self.memory.table(),
            f"{where:<24}{self.available_bytes / 1e9:>19.3f}  → {verdict}",
            *[f"  {change.what}: {change.plan.total.expected / 1e9:.3f} GB" for change in self.changes],
            *self._cuts(),
            "",
            f"{self.num_steps} steps of about {self.tokens_per_step:.0f} tokens: {time}",
        ]
        return "\n".join(lines)

    def _cuts(self) -> list[str]:
        if not self.micro_batches:
            return []
        best = best_of(self.micro_batches)
        marks = {True: "→ ", False: "  "}
        return ["", "ways to cut a step:", *[marks[cut == best] + cut.text() for cut in self.micro_batches]]

    def document(self) -> dict[str, Any]:
        """The plan as JSON; bytes and seconds."""
        cuts = [{**asdict(cut), "best": cut == best_of(self.micro_batches)} for cut in self.micro_batches]
        return {
            **({"micro_batches": cuts} if cuts else {}),
            "coverage": self.coverage.document(),
            "rows": {
                "count": self.num_rows,
                "longest_tokens": self.longest_row,
                "supervised_tokens": [{"tokens": name, "rows": count} for name, count in self.supervised_histogram],
            },
            "memory": self.memory.document(),
            "available_bytes": self.available_bytes,
            "fits": self.fits,
            "changes": [
                {"change": change.what, "expected_bytes": round(change.plan.total.expected)} for change in self.changes
            ],
            "steps": self.num_steps,
            "tokens_per_step": round(self.tokens_per_step, 1),
            "seconds": self.seconds and [round(value, 1) for value in self.seconds],
        }


def duration(seconds: float) -> str:
    """Seconds in a suitable unit: ``45 s``, ``90 min``, ``3.0 h``."""
    for longest, unit, name in ((120, 1, "s"), (7200, 60, "min")):
        if seconds < longest:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 3600:.1f} h"


def plan(
    config: PretrainedConfig,
    rows: Sequence[Encoded],
    *,
    settings: Train,
    adapter: Adapter,
    quantization: Scheme | None = None,
) -> TrainingPlan:
    """Plan a training of ``rows`` on a base with this configuration, on this machine.

    With an objective on pairs, ``rows`` are chosen and rejected answers in turn.

    ``quantization`` is the base's scheme; None: dense.

    Raises:
        TrainError: nothing can be learned from the rows, or the device or precision is not available.
        AdapterError: a target matches no layer.
    """
    rows = columns_of(rows)
    check_rows(rows)
    check_pairs(len(rows), settings)
    device = resolve_device(settings.device)
    workload = workload_of(rows, settings, adapter, quantization)
    memory, available = plan_memory(config, workload), _free(settings)
    fits = memory.total.expected <= available
    num_steps, tokens_per_step = count_work(rows, settings)
    with cpu_threads(settings.threads):
        micro_batch = measure_micro_batch(config, workload, limit_bytes=TIMED_SHARE * available)
    return TrainingPlan(
        coverage=_coverage(config, adapter),
        memory=memory,
        available_bytes=available,
        changes=() if fits else tuple(what_would_fit(config, workload, limit_bytes=available)),
        micro_batches=ways_to_cut(config, workload, limit_bytes=available) if device == "cuda" else (),
        num_steps=num_steps,
        num_rows=len(rows),
        longest_row=int(rows.lengths.max()),
        supervised_histogram=_histogram(rows),
        tokens_per_step=tokens_per_step,
        seconds=seconds_of(micro_batch, workload, tokens=num_steps * tokens_per_step) if micro_batch else None,
    )


def count_work(rows: Sequence[Encoded], settings: Train) -> tuple[int, float]:
    """Optimizer steps, and the tokens of a step on all devices."""
    each = settings.objective.rows_each
    rows_per_step = each * settings.batch_size * settings.gradient_accumulation * settings.processes
    num_steps = count_steps(len(rows), steps=settings.steps, epochs=settings.epochs, rows_per_step=rows_per_step)
    return num_steps, int(columns_of(rows).lengths.sum()) / len(rows) * rows_per_step


def seconds_of(micro_batch: float, workload: Workload, *, tokens: float) -> tuple[float, float]:
    """The time for ``tokens`` on all devices, from and to; the largest micro-batch takes ``micro_batch`` seconds."""
    seconds = micro_batch * tokens / workload.processes / (workload.shape.rows * workload.shape.tokens)
    return seconds, seconds * SLOWER


def _free(settings: Train) -> int:
    """Free memory for one process of a training: of its GPU, or its part of main memory."""
    device = resolve_device(settings.device)
    free = free_bytes(device)
    return free if device == "cuda" else free // processes_here(settings.processes)


def check_fits(
    config: PretrainedConfig,
    rows: Sequence[Encoded],
    *,
    settings: Train,
    adapter: Adapter,
    quantization: Scheme | None = None,
) -> MemoryPlan:
    """Stop a training that cannot fit; returns its planned memory. Arguments and errors as `plan`.

    Raises:
        TrainError: even the low estimate of its memory is not free; what would fit is named.
    """
    rows = columns_of(rows)
    check_rows(rows)
    check_pairs(len(rows), settings)
    workload = workload_of(rows, settings, adapter, quantization)
    memory, available = plan_memory(config, workload), _free(settings)
    wait_for_all()  # one that loads already would take what another looks for
    if memory.total.low <= available:
        return memory
    changes = what_would_fit(config, workload, limit_bytes=available)
    fitting = changes and changes[-1].plan.total.expected <= available
    names = "; ".join(change.what for change in changes)
    each = f"each of {memory.processes} processes of the training" if memory.processes > 1 else "the training"
    advice = f"it fits with {names}" if fitting else "no setting makes it fit: take a smaller base or a larger device"
    raise TrainError(
        f"{each} needs {memory.total.low / 1e9:.2f} to {memory.total.high / 1e9:.2f} GB, "
        f"{available / 1e9:.2f} GB are free{what_limits(workload.device)}; {advice}"
    )


def workload_of(rows: Sequence[Encoded], settings: Train, adapter: Adapter, quantization: Scheme | None) -> Workload:
    """The largest micro-batch: the longest rows or pairs, because those of similar length share a step."""
    device = resolve_device(settings.device)
    rows = columns_of(rows)
    largest = _largest(rows, settings)
    return Workload(
        adapter=adapter,
        shape=StepShape(
            **_layout(largest, rows, settings, device),
            supervised_tokens=sum(len(supervised_positions(row)) for row in largest),
            micro_batches=settings.gradient_accumulation,
            checkpointing=settings.gradient_checkpointing,
            offloaded=settings.offload_activations and device == "cuda",
            dtype=DTYPES[resolve_precision(settings.precision, device)],
            device=device,
        ),
        quantization=quantization,
        optimizer=settings.optimizer,
        device=device,
        batch_size=settings.batch_size,
        processes=settings.processes,
        sharded=settings.sharding,
        may_shard=_may_shard(settings, adapter, quantization),
    )


def _may_shard(settings: Train, adapter: Adapter, quantization: Scheme | None) -> bool:
    """As `graftline.settings.rules` has it."""
    changes = adapter.method == "full" or adapter.bias != "none" or (adapter.method == "pissa" and not quantization)
    return settings.processes > 1 and not (changes or settings.evaluate_every or settings.objective.on_pairs)


def _largest(rows: EncodedColumns, settings: Train) -> list[Encoded]:
    lengths = rows.lengths
    if settings.objective.on_pairs:
        lengths = lengths.reshape(-1, 2).sum(axis=1)
    longest = numpy.argsort(lengths, kind="stable")[-settings.batch_size :].astype(numpy.int64)
    if settings.objective.on_pairs:
        longest = steps_of_pairs(longest[None])[0]
    found = list(rows.take(longest))
    size = settings.objective.rows_each * settings.batch_size
    return [found[at % len(found)] for at in range(size)]  # too few rows are repeated


def _layout(largest: Sequence[Encoded], rows: EncodedColumns, settings: Train, device: DeviceKind) -> dict[str, Any]:
    """Sequences, their tokens and their layout, as graftline.train.trainer chooses it."""
    if settings.packing:
        # On a GPU attention takes the rows' bounds.
        sequences, tokens = pack_rows(largest, in_one=device == "cuda")["input_ids"].shape
        return {"rows": sequences, "tokens": tokens, "packed": True}
    shape: dict[str, Any] = {"rows": len(largest), "tokens": max(len(row.input_ids) for row in largest)}
    # Every micro-batch has the prefix of all rows; one of similar rows may have a longer one.
    prefix = 0 if settings.gradient_checkpointing or settings.sharding else _prefix_of_all(rows)
    return {**shape, "prefix_tokens": prefix} if prefix >= SHORTEST_PREFIX else shape


def _coverage(config: PretrainedConfig, adapter: Adapter) -> Coverage:
    with FakeTensorMode():
        return attach(fake_model(config, dtype=torch.float32, quantized=False), untrained(adapter), seed=0)


def _prefix_of_all(rows: EncodedColumns) -> int:
    """`shared_prefix` of all rows; the first ones tell mostly that it is not worth looking at the others."""
    some = shared_prefix(list(rows[:_LOOKED_AT]))
    if some < SHORTEST_PREFIX or len(rows) <= _LOOKED_AT:
        return some
    first = rows[0].input_ids
    longest = min(some, int(rows.first_learned(after=1).min()) - 1)
    same = (bool((rows.token_at(numpy.full(len(rows), at)) == first[at]).all()) for at in range(longest))
    return sum(takewhile(bool, same))


def _histogram(rows: EncodedColumns) -> tuple[tuple[str, int], ...]:
    places = numpy.searchsorted(_HISTOGRAM_EDGES, rows.count_learned(after=1), side="right") - 1
    counts = Counter(_HISTOGRAM_EDGES[place] for place in places.tolist())
    following = dict(pairwise(_HISTOGRAM_EDGES))

    def name(edge: int) -> str:
        after = following.get(edge)
        return f"{edge}+" if after is None else f"{edge}" if after == edge + 1 else f"{edge}-{after - 1}"

    return tuple((name(edge), counts[edge]) for edge in sorted(counts))
