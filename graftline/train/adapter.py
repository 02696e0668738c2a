"""Trains one adapter from a base folder and writes the metrics that the run's page shows.

Writes ``adapter/`` (PEFT's files and ``graftline.json``), ``history.json`` (loss per step, and held-out loss where it
was evaluated), ``metrics.json`` and ``memory.json`` (planned and measured, by part).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftline.adapters.attach import Coverage, attach
from graftline.adapters.class_head import add_class_head
from graftline.adapters.peft_format import AdapterIdentity, AdapterWeights, attach_trained, save_adapter
from graftline.data.template import Encoded
from graftline.digest import write_json
from graftline.logs import Reporter
from graftline.settings.model import Adapter, Train
from graftline.train.best import held_out_loss
from graftline.train.devices import (
    DTYPES,
    measured_parts,
    resolve_device,
    resolve_precision,
    return_freed_tensors,
    used_bytes,
    weight_dtype,
)
from graftline.train.distributed import is_main, local_device, save_verified, start_processes
from graftline.train.results import OnStep, StepMetrics, TrainResult
from graftline.train.trainer import train
from graftline.weights.kept_base import kept_bytes, load_base
from graftline.weights.quant.linear import load_shares
from graftline.weights.quant.low_rank import read_factors

logger = logging.getLogger("graftline")


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Folders that a training reads and writes."""

    base: Path
    """The base; if it was prepared for the adapter, with the adapter's initial values."""
    out: Path
    """Output of the training."""
    work: Path
    """Checkpoints."""
    start: Path | None = None
    """The adapter that training continues from; None: a fresh one."""
    trackers: Path
    """Output of the trackers in ``train.report_to``."""


def train_adapter(
    rows: Sequence[Encoded],
    held_out: Sequence[Encoded],
    *,
    settings: Train,
    adapter: Adapter,
    identity: AdapterIdentity,
    folders: Folders,
    planned: Mapping[str, Any],
) -> None:
    """Train an adapter, or resume from the newest checkpoint in ``folders.work``.

    Args:
        rows: training rows.
        held_out: rows that select the best adapter; if empty, the last step's adapter is kept.
        settings: the ``train`` section.
        adapter: the ``adapter`` section.
        identity: written next to the adapter's weights; with objective ``classify`` it has the classes.
        folders: where to read and write.
        planned: the memory plan, written next to the measured values.

    Raises:
        TrainError: the loss is not finite, or the checkpoints belong to another training.
        AdapterError: the adapter does not fit the base.
    """
    return_freed_tensors(settings)
    device = resolve_device(settings.device)
    arithmetic, before = DTYPES[resolve_precision(settings.precision, device)], used_bytes(device)
    before -= kept_bytes(device)
    start_processes(device)
    place, dtype = str(local_device(device)), weight_dtype(arithmetic, adapter)
    if settings.sharding:
        model = load_shares(folders.base, device=place, dtype=dtype)
    else:
        model = load_base(folders.base, device=place, dtype=dtype)
    if identity.labels:
        add_class_head(model, identity.labels, seed=settings.seed)
    first = read_factors(folders.base) if identity.initial_digest else None
    if folders.start:
        coverage = attach_trained(model, adapter, AdapterWeights.open(folders.start))
    else:
        coverage = attach(model, adapter, seed=settings.seed, initial=first)
    logger.info("what is trained:\n%s", coverage.table())
    result = train(
        model,
        rows,
        settings=settings,
        work=folders.work,
        on_step=_progress(),
        evaluate=held_out_loss(held_out, settings) if held_out else None,
        trackers=folders.trackers,
    )
    out = folders.out
    save_verified(lambda folder: save_adapter(model, folder, identity=identity), out / "adapter")
    if is_main():
        _write_figures(out, result, coverage)
        peak = max(0, result.peak_bytes - before)
        parts = measured_parts(model, optimizer_bytes=result.optimizer_bytes, peak_bytes=peak)
        measured = {"measured_peak_bytes": peak, "measured_parts_bytes": parts, "device": device}
        write_json(out / "memory.json", {"planned": planned, **measured})


def _write_figures(out: Path, result: TrainResult, coverage: Coverage) -> None:
    scores = dict(result.scores)
    steps = ({"step": at, "loss": loss, "held_out_loss": scores.get(at)} for at, loss in enumerate(result.losses, 1))
    write_json(
        out / "history.json", [{key: value for key, value in step.items() if value is not None} for step in steps]
    )
    best = {"best_step": result.best_step, "held_out_loss": min(scores.values())} if scores else {}
    write_json(
        out / "metrics.json",
        {
            "loss_first": result.losses[0],
            "loss_last": result.losses[-1],
            "steps": result.steps,
            "tokens": result.tokens,
            "tokens_per_second": round(result.tokens_per_second, 1),
            "trained_parameters": coverage.num_trained,
            "base_parameters": coverage.num_base,
            "peak_bytes": result.peak_bytes,
            **best,
        },
    )


def _progress() -> OnStep:
    report = Reporter("train", "steps")

    def on_step(metrics: StepMetrics) -> None:
        report(metrics.step, metrics.total_steps, note=f"loss {metrics.loss:.3f}")
        if metrics.score is not None:
            # A search reads this line (`graftline.workflow.searching`).
            logger.info(
                "after step %d of %d the held-out loss is %.6g", metrics.step, metrics.total_steps, metrics.score
            )

    return on_step
