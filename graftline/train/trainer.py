"""One training: transformers' Trainer drives, with this project's loss, order of rows and checkpoints."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from graftline.digest import Digest, of_json, write_json
from graftline.errors import TrainError
from graftline.train.batches import Encoded, MicroBatch, MicroBatches, check_rows, count_steps, plan_steps
from graftline.train.checkpoint import Journal, latest_checkpoint, load_trainable, new_checkpoint, save_trainable
from graftline.train.devices import (
    DeviceKind,
    cpu_threads,
    peak_memory_bytes,
    reset_peak_memory,
    resolve_device,
    resolve_precision,
)
from graftline.train.loss import SupervisedLoss, check_head
from graftline.train.optimizers import make_optimizer, restore_paging
from graftline.train.settings import OnStep, StepMetrics, TrainResult, TrainSettings, ignore_step

_LOG = logging.getLogger(__name__)
_EXPLODED = 3.0
"""A mean loss above this multiple of ln(vocabulary), the loss of a uniform guess, is taken as an explosion."""
_REPLAY_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
"""Largest relative difference between a replayed loss and the recorded one; on one device there is none at all."""


def train(
    model: PreTrainedModel,
    rows: Sequence[Encoded],
    *,
    settings: TrainSettings,
    work: Path,
    on_step: OnStep = ignore_step,
) -> TrainResult:
    """Train the model's trainable parameters (its adapters, fp32) on the supervised tokens of ``rows``.

    A training that was killed goes on from the newest checkpoint in ``work``; on one device with one thread count it
    ends with the same bytes as one that was never stopped. A finished one returns at once. The model is changed in
    place and stays on the training device.

    Raises:
        TrainError: rows without supervised tokens, no trainable parameter, a work folder of another training, a loss
            that is not a number or explodes (the batch is written to ``work``), memory that does not suffice.
    """
    check_rows(rows)
    _check_trainable(model)
    device = resolve_device(settings.device)
    resolved = replace(settings, device=device, precision=resolve_precision(settings.precision, device))
    work.mkdir(parents=True, exist_ok=True)
    with cpu_threads(settings.threads):
        model.to(torch.device(device))  # type: ignore[arg-type]  # transformers' decorator hides the signature
        check_head(model, list(rows[0].input_ids))
        trainer = _Trainer(model, _micro_batches(rows, resolved), settings=resolved, work=work, on_step=on_step)
        return _run(trainer, device)


def _micro_batches(rows: Sequence[Encoded], settings: TrainSettings) -> MicroBatches:
    rows_per_step = settings.batch_size * settings.gradient_accumulation
    num_steps = count_steps(len(rows), steps=settings.steps, epochs=settings.epochs, rows_per_step=rows_per_step)
    lengths = [len(row.input_ids) for row in rows]
    steps = plan_steps(lengths, num_steps=num_steps, rows_per_step=rows_per_step, seed=settings.seed)
    return MicroBatches(rows, steps, parts=settings.gradient_accumulation)


def _run(trainer: "_Trainer", device: DeviceKind) -> TrainResult:
    checkpoint = latest_checkpoint(trainer.work, inputs=trainer.inputs)
    trainer.open_journal(checkpoint)
    done_before = len(trainer.journal.steps)
    reset_peak_memory(device)
    started = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise TrainError(
            f"memory did not suffice ({error}); lower train.batch_size and raise train.gradient_accumulation"
        ) from error
    seconds = time.monotonic() - started
    steps = trainer.journal.steps
    new_tokens = sum(metrics.tokens for metrics in steps[done_before:])
    return TrainResult(
        losses=trainer.journal.losses,
        steps=len(steps),
        tokens=sum(metrics.tokens for metrics in steps),
        tokens_per_second=new_tokens / seconds if new_tokens else 0.0,
        peak_bytes=peak_memory_bytes(device),
        seconds=seconds,
    )


def _check_trainable(model: nn.Module) -> None:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise TrainError("the model has no trainable parameter; attach an adapter first")
    for name, parameter in trainable.items():
        if parameter.dtype != torch.float32:
            raise TrainError(f"trainable parameter {name} is {parameter.dtype}; adapters are trained in torch.float32")


def _arguments(settings: TrainSettings, work: Path, *, num_steps: int) -> TrainingArguments:
    """The Trainer's arguments. One "row" of its data set is a micro-batch, and one epoch is the whole training."""
    scheduler = settings.scheduler
    return TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.gradient_accumulation,
        max_steps=num_steps,
        learning_rate=settings.learning_rate,
        # transformers' "constant" has no warm-up
        lr_scheduler_type="constant_with_warmup" if scheduler == "constant" else scheduler,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        use_cpu=settings.device == "cpu",
        bf16=settings.precision == "bf16",
        fp16=settings.precision == "fp16",
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would hide what `_Trainer.training_step` stops at
        save_strategy="steps" if settings.checkpoint_every else "no",
        save_steps=settings.checkpoint_every or 1,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=settings.device == "cuda",
    )


class _Trainer(transformers.Trainer):
    """transformers' Trainer over planned micro-batches, with atomic adapter-only checkpoints and a journal."""

    def __init__(
        self,
        model: PreTrainedModel,
        micro_batches: MicroBatches,
        *,
        settings: TrainSettings,
        work: Path,
        on_step: OnStep,
    ) -> None:
        num_steps = len(micro_batches) // micro_batches.parts
        super().__init__(
            model=SupervisedLoss(model),
            args=_arguments(settings, work, num_steps=num_steps),
            train_dataset=micro_batches,
            data_collator=_only_item,
        )
        self.remove_callback(PrinterCallback)
        self.loss_is_scaled_for_ga = True
        self.causal_lm, self.micro_batches, self.settings, self.work = model, micro_batches, settings, work
        self.inputs = _inputs_digest(model, micro_batches, settings)
        self.journal: Journal
        self._on_step = on_step
        self._num_tokens = self._num_supervised = 0

    def open_journal(self, checkpoint: Path | None) -> None:
        """Read the journal up to the step of ``checkpoint``."""
        step = int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0
        tolerance = _REPLAY_TOLERANCE[self.settings.precision]
        self.journal = Journal(self.work, inputs=self.inputs, resumed_step=step, tolerance=tolerance)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer over the trainable parameters that the settings name."""
        if self.optimizer is None:
            trainable = {name: p for name, p in self.causal_lm.named_parameters() if p.requires_grad}
            self.optimizer = make_optimizer(trainable, self.settings)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.micro_batches)

    def _get_num_items_in_batch(self, batch_samples: list[MicroBatch], device: torch.device) -> Tensor:
        each = [(len(batch["targets"]), int(batch["num_tokens"])) for batch in batch_samples]
        counts = torch.tensor(each, device=device).sum(0)
        counts = self.accelerator.reduce(counts, reduction="sum")
        self._num_supervised, self._num_tokens = (int(count) for count in counts)
        return counts[0]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The micro-batch's share of the step's mean loss per supervised token."""
        loss: Tensor = model(inputs, num_supervised=num_items_in_batch)
        return loss * self.accelerator.num_processes  # gradients are averaged over processes

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward; stops at a loss that is not a finite number."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(loss.item()):
            self._stop(f"the loss is {loss.item()}", self.state.global_step)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        norm = float(super()._get_grad_norm(model, grad_norm))
        # With fp16 a scale that is too high gives infinite gradients; the scaler lowers it and skips the update.
        if not math.isfinite(norm) and self.settings.precision != "fp16":
            self._stop(f"the norm of the gradients is {norm}", self.state.global_step)
        return norm

    def _stop(self, what: str, step: int) -> None:
        indices = self.micro_batches.row_indices(step)
        rows = [self.micro_batches.rows[at] for at in indices]
        content = [
            {"row": at, "input_ids": list(row.input_ids), "supervised": list(row.supervised)}
            for at, row in zip(indices, rows, strict=True)
        ]
        path = self.work / f"offending-batch-{step + 1}.json"
        write_json(path, {"step": step + 1, "reason": what, "rows": content})
        raise TrainError(
            f"at step {step + 1} {what}; a finite one is expected. The step's {len(rows)} rows are in {path}; "
            "lower train.learning_rate, set train.max_grad_norm, or remove the rows that are wrong"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Journal a step and hand it to the caller; what is logged at the end of the training has no ``loss``."""
        super().log(logs, start_time)
        if "loss" not in logs or not self.is_world_process_zero():
            return
        if logs["loss"] > _EXPLODED * math.log(self.causal_lm.config.get_text_config().vocab_size):
            self._stop(f"the loss is {logs['loss']:.6g}, far above that of a random guess", self.state.global_step - 1)
        metrics = StepMetrics(
            step=self.state.global_step,
            total_steps=self.state.max_steps,
            loss=logs["loss"],
            grad_norm=logs["grad_norm"],
            learning_rate=logs["learning_rate"],
            tokens=self._num_tokens,
            supervised_tokens=self._num_supervised,
        )
        self.journal.append(metrics)
        self._on_step(metrics)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        with new_checkpoint(self.work, self.state.global_step, inputs=self.inputs) as folder:
            save_trainable(self.causal_lm, folder)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            self.state.save_to_json(str(folder / "trainer_state.json"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        restore_paging(self.optimizer.optimizer)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trainable(self.causal_lm, Path(resume_from_checkpoint))


def _only_item(items: list[Any]) -> Any:
    (item,) = items
    return item


def _inputs_digest(model: nn.Module, micro_batches: MicroBatches, settings: TrainSettings) -> Digest:
    shapes = {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    # Not part of what is learned: where checkpoints fall, and how many threads compute it.
    told = asdict(replace(settings, checkpoint_every=0, threads=1))
    return of_json({"settings": told, "trainable": shapes, "batches": str(micro_batches.digest())})
