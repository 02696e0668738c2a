"""Trains an adapter on rows: checks, resume, training loop, metrics."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from graftline.data.columns import columns_of
from graftline.data.template import Encoded
from graftline.errors import TrainError
from graftline.settings.model import Train
from graftline.train.attention import can_run_here, own_attention_after
from graftline.train.batches import (
    Layout,
    MicroBatches,
    can_share_prefix,
    check_rows,
    count_steps,
    plan_steps,
    use_row_attention,
)
from graftline.train.best import BestAdapter, Evaluate
from graftline.train.checkpoint import latest_checkpoint, load_trainable
from graftline.train.compiled import compile_blocks, is_worth_it
from graftline.train.devices import (
    DeviceKind,
    cpu_threads,
    peak_memory_bytes,
    reset_peak_memory,
    resolve_device,
    resolve_precision,
    state_bytes,
)
from graftline.train.distributed import is_main, local_device, num_processes, start_processes
from graftline.train.loop import Loop
from graftline.train.loss import check_head
from graftline.train.offload import ActivationOffload, checkpoint_blocks
from graftline.train.packing import check_packing
from graftline.train.preferences import check_pairs, steps_of_pairs
from graftline.train.results import OnStep, Trackers, TrainResult, ignore_step
from graftline.train.together import in_turns
from graftline.weights.quant.linear import QuantLinear, use_fp8_products
from graftline.weights.sharded import is_sharded

_LOG = logging.getLogger(__name__)


def train(
    model: PreTrainedModel,
    rows: Sequence[Encoded],
    *,
    settings: Train,
    work: Path,
    on_step: OnStep = ignore_step,
    evaluate: Evaluate | None = None,
    trackers: Path | None = None,
) -> TrainResult:
    """Train the model's trainable parameters (its adapters, fp32) on the supervised tokens of ``rows``.

    With an objective on pairs, ``rows`` are chosen and rejected answers in turn (`graftline.train.preferences`).

    A killed training resumes from the newest checkpoint in ``work``; on one device with one thread count it produces
    the same bytes as an uninterrupted one. A finished one returns at once. The model is changed in place and stays on
    the training device.

    ``evaluate`` scores the current model every ``settings.evaluate_every`` steps; lower is better. The model ends with
    the best-scoring adapter, and the training stops early after ``settings.patience`` evaluations without improvement.

    ``trackers`` is the folder for the trackers in ``settings.report_to``; by default ``work/trackers``.

    Raises:
        TrainError: rows without supervised tokens, no trainable parameter, a work folder of another training, a loss
            that is not finite or explodes (the batch is written to ``work``), attention that leaks between packed
            rows, or insufficient memory.
    """
    check_rows(rows)
    _check_trainable(model)
    check_pairs(len(rows), settings)
    if (evaluate is None) != (settings.evaluate_every == 0):
        raise TrainError(
            f"evaluate_every is {settings.evaluate_every} and an evaluation is {'not ' * (evaluate is None)}given"
        )
    if settings.sharding and evaluate is not None:
        raise TrainError(
            "a sharded base cannot be evaluated in training; write train.evaluate_every: 0, or no sharding"
        )
    if settings.sharding and num_processes() == 1:
        raise TrainError("train.sharding with one process, which holds the whole base; write false, or start several")
    device = resolve_device(settings.device)
    start_processes(device)
    resolved = settings.replace(device=device, precision=resolve_precision(settings.precision, device))
    work.mkdir(parents=True, exist_ok=True)
    with cpu_threads(settings.threads), own_attention_after(model) as with_own_attention:
        _prepare(model, rows, resolved)
        best = BestAdapter(model, work, evaluate=evaluate and with_own_attention(evaluate), settings=resolved)
        micro_batches = _micro_batches(rows, resolved, _layout(model, resolved))
        _compile(model, micro_batches, resolved)
        loop = Loop(model, micro_batches, settings=resolved, work=work, on_step=on_step, best=best)
        told = Trackers(resolved.report_to if is_main() else (), trackers or work / "trackers")
        with in_turns(model):
            return _run(loop, device, told)


def _prepare(model: PreTrainedModel, rows: Sequence[Encoded], settings: Train) -> None:
    if not is_sharded(model):  # its shares were read on their device
        model.to(local_device(settings.device))  # type: ignore[arg-type]  # transformers' decorator hides the signature
    check_head(model, list(rows[0].input_ids))
    if settings.fp8_products:
        if settings.precision != "bf16":
            raise TrainError(f"train.fp8_products with precision {settings.precision}; write train.precision: bf16")
        use_fp8_products(model)
    if settings.gradient_checkpointing:
        checkpoint_blocks(model, offload=ActivationOffload() if settings.offload_activations else None)


def _layout(model: PreTrainedModel, settings: Train) -> Layout:
    by_bounds = can_run_here(model) and use_row_attention(model)
    if settings.packing:
        check_packing(model)
        return "in one sequence" if by_bounds else "packed"
    # Recomputed layers cannot use a cache. And with FSDP2 every process must gather a block's shards equally often, but
    # only some micro-batches share a prefix.
    may_share = not settings.gradient_checkpointing and not settings.sharding
    return "shared prefix" if may_share and can_share_prefix(model) else "padded"


def _compile(model: PreTrainedModel, micro_batches: MicroBatches, settings: Train) -> None:
    count = sum(parameter.numel() for parameter in model.parameters())
    count += sum(layer.in_features * layer.out_features for layer in model.modules() if isinstance(layer, QuantLinear))
    # FSDP2's hooks gather a block's shards in Python.
    # With adapters switched off for a moment, compiled blocks would be compiled again each time.
    changes = settings.sharding or settings.objective.has_reference
    choice = "never" if changes and settings.compile == "auto" else settings.compile
    if is_worth_it(choice, device=settings.device, num_parameters=count, num_tokens=micro_batches.num_tokens()):
        compile_blocks(model)


def _micro_batches(rows: Sequence[Encoded], settings: Train, layout: Layout) -> MicroBatches:
    parts = settings.gradient_accumulation * num_processes()
    rows_per_step = settings.batch_size * parts
    lengths = columns_of(rows).lengths
    if settings.objective.on_pairs:
        lengths = lengths.reshape(-1, 2).sum(axis=1)
    num_steps = count_steps(len(lengths), steps=settings.steps, epochs=settings.epochs, rows_per_step=rows_per_step)
    steps = plan_steps(lengths, num_steps=num_steps, rows_per_step=rows_per_step, seed=settings.seed)
    if settings.objective.on_pairs:
        steps = steps_of_pairs(steps)
    return MicroBatches(rows, steps, parts=parts, layout=layout)


def _run(loop: Loop, device: DeviceKind, trackers: Trackers) -> TrainResult:
    checkpoint = latest_checkpoint(loop.work, inputs=loop.inputs)
    loop.open_journal(checkpoint)
    done_before = len(loop.journal.steps)
    if done_before:
        _LOG.info("resuming from step %d", done_before)
    reset_peak_memory(device)
    started = time.monotonic()
    if checkpoint is not None and loop.best.is_exhausted(loop.journal.steps):
        load_trainable(loop.model, checkpoint)  # the training had stopped early
    else:
        _run_steps(loop, checkpoint, trackers)
    seconds = time.monotonic() - started
    steps = loop.journal.steps
    new_tokens = sum(metrics.tokens for metrics in steps[done_before:])
    return TrainResult(
        losses=loop.journal.losses,
        steps=len(steps),
        scores=tuple((metrics.step, metrics.score) for metrics in steps if metrics.score is not None),
        best_step=loop.best.load(steps),
        tokens=sum(metrics.tokens for metrics in steps),
        tokens_per_second=new_tokens / seconds if new_tokens else 0.0,
        peak_bytes=peak_memory_bytes(device),
        optimizer_bytes=state_bytes(loop.optimizer),
        seconds=seconds,
    )


def _run_steps(loop: Loop, checkpoint: Path | None, trackers: Trackers) -> None:
    try:
        with trackers:
            loop.run(checkpoint, trackers)
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU allocator raises a plain one
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise TrainError(
            f"memory did not suffice ({error}); lower train.batch_size and raise train.gradient_accumulation, "
            "or set train.gradient_checkpointing"
        ) from error


def _check_trainable(model: nn.Module) -> None:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise TrainError("the model has no trainable parameter; attach an adapter first")
    for name, parameter in trainable.items():
        if parameter.dtype != torch.float32:
            raise TrainError(f"trainable parameter {name} is {parameter.dtype}; adapters are trained in torch.float32")
