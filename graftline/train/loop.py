"""transformers' Trainer with this project's loss, order of rows, optimizers, checkpoints and journal."""

import contextlib
import math
from collections.abc import Iterator
from importlib.metadata import version
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
from graftline.settings.model import Train
from graftline.train.batches import MicroBatch, MicroBatches
from graftline.train.best import BestAdapter
from graftline.train.checkpoint import Journal, load_trainable, new_checkpoint, save_trainable, saved_trainable
from graftline.train.distributed import (
    average_gradients,
    is_main,
    num_processes,
    replicate_trainable,
    shard_base,
    verify_replicas,
    written_together,
)
from graftline.train.loss import SupervisedLoss
from graftline.train.optimizers import make_optimizer, restore_paging
from graftline.train.results import OnStep, StepMetrics
from graftline.train.trackers import TellSteps, tracker_callbacks

_EXPLODED = 3.0
"""A mean loss above this multiple of ln(vocabulary), the loss of a uniform guess, is taken as an explosion."""
_REPLAY_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
"""Largest relative difference between a replayed loss and the recorded one; on one device there is none at all."""


def _arguments(settings: Train, work: Path, *, num_steps: int) -> TrainingArguments:
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
        save_strategy="no",  # `Loop.log` asks for checkpoints: the Trainer refuses them for a base sharded by us
        ddp_backend="gloo" if settings.device == "cpu" and num_processes() > 1 else None,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=settings.device == "cuda",
    )


class Loop(transformers.Trainer):
    """transformers' Trainer over planned micro-batches, with atomic adapter-only checkpoints and a journal."""

    def __init__(
        self,
        model: PreTrainedModel,
        micro_batches: MicroBatches,
        *,
        settings: Train,
        work: Path,
        on_step: OnStep,
        best: BestAdapter,
    ) -> None:
        num_steps = len(micro_batches) // micro_batches.parts
        loss = SupervisedLoss(model)
        # The Trainer then leaves placement and the exchange of gradients to us.
        loss.is_distributed_loading_by_transformers = settings.sharding  # type: ignore[assignment]
        super().__init__(
            model=loss,
            args=_arguments(settings, work, num_steps=num_steps),
            train_dataset=micro_batches,
            data_collator=_only_item,
        )
        self.remove_callback(PrinterCallback)
        if settings.sharding:
            shard_base(loss, model)
        self.loss_is_scaled_for_ga = True
        self.causal_lm, self.micro_batches, self.settings, self.work = model, micro_batches, settings, work
        self.inputs = _inputs_digest(model, micro_batches, settings)
        self.journal: Journal
        self.best = best
        self._on_step = on_step
        self._num_tokens = self._num_supervised = 0
        self._scale: float | None = None

    def open_journal(self, checkpoint: Path | None) -> None:
        """Read the journal up to the step of ``checkpoint``."""
        step = int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0
        tolerance = _REPLAY_TOLERANCE[self.settings.precision]
        self.journal = Journal(self.work, inputs=self.inputs, resumed_step=step, tolerance=tolerance, writes=is_main())

    def report_to(self, folder: Path) -> None:
        """Add the trackers of the settings, whose files lie in ``folder``."""
        if self.settings.report_to and is_main():
            trackers = tracker_callbacks(self.settings.report_to, folder)
            for callback in (*trackers, TellSteps(trackers, lambda: self.journal.steps)):
                self.add_callback(callback)

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
        loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        if self._scale is None:
            loss.register_hook(self._measure_scale)
        return loss

    def _measure_scale(self, gradient: Tensor) -> None:
        scaler = self.accelerator.scaler
        self._scale = float(gradient) / (scaler.get_scale() if scaler is not None else 1.0)

    def _check_scale(self) -> None:
        """Refuse to train where transformers or accelerate divides the loss once more.

        Versions differ in who divides by the number of micro-batches, and in how they are told not to; a training with
        a gradient that is too small would end without an error, in other numbers.
        """
        if self._scale is not None and self._scale != 1:
            raise TrainError(
                f"transformers {transformers.__version__} with accelerate {version('accelerate')} multiplies the loss "
                f"by {self._scale:.6g} before its gradient is taken; expected 1. Every number of this training would "
                "differ: install the versions in constraints.txt"
            )

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward; stops at a loss that is not a finite number."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._check_scale()
        if not math.isfinite(loss.item()):
            self._stop(f"the loss is {loss.item()}", self.state.global_step)
        if self.settings.sharding and num_processes() > 1 and self.accelerator.sync_gradients:
            average_gradients(self.causal_lm)
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
        """Evaluate if it is time, tell the trackers, journal a step, tell the caller."""
        # what is logged at the end of the training has no loss
        if "loss" not in logs:
            super().log(logs, start_time)
            return
        if logs["loss"] > _EXPLODED * math.log(self.causal_lm.config.get_text_config().vocab_size):
            super().log(logs, start_time)
            self._stop(f"the loss is {logs['loss']:.6g}, far above that of a random guess", self.state.global_step - 1)
        score = self.best.score(self.state.global_step, self.journal.steps)
        super().log(logs if score is None else logs | {"eval_loss": score}, start_time)
        metrics = StepMetrics(
            step=self.state.global_step,
            total_steps=self.state.max_steps,
            loss=logs["loss"],
            grad_norm=logs["grad_norm"],
            learning_rate=logs["learning_rate"],
            tokens=self._num_tokens,
            supervised_tokens=self._num_supervised,
            score=score,
        )
        self.journal.append(metrics)
        if is_main():
            self._on_step(metrics)
        self._decide(self.state.global_step)

    def _decide(self, step: int) -> None:
        every, exhausted = self.settings.checkpoint_every, self.best.is_exhausted(self.journal.steps)
        self.control.should_training_stop |= exhausted
        self.control.should_save = every > 0 and (step % every == 0 or step == self.state.max_steps or exhausted)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        step = self.state.global_step
        new = new_checkpoint(self.work, step, inputs=self.inputs)
        with written_together(new, self.work / f".checkpoint-{step}.part") as folder:
            if is_main():
                save_trainable(self.causal_lm, folder)
                self.state.save_to_json(str(folder / "trainer_state.json"))
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
        verify_replicas(self.causal_lm, saved_trainable(self.work / f"checkpoint-{step}"))

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        if num_processes() > 1:
            replicate_trainable(self.causal_lm)

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        yield  # nothing that is sharded has a gradient

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        restore_paging(self.optimizer.optimizer)  # type: ignore[union-attr]  # accelerate's wrapper

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trainable(self.causal_lm, Path(resume_from_checkpoint))


def _only_item(items: list[Any]) -> Any:
    (item,) = items
    return item


def _inputs_digest(model: nn.Module, micro_batches: MicroBatches, settings: Train) -> Digest:
    shapes = {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    # Not part of what is learned: where checkpoints fall, who is told, and how many threads compute it.
    told = settings.replace(checkpoint_every=0, threads=1, report_to=()).model_dump(
        mode="json", exclude={"held_out_rows", "processes"}
    )
    return of_json({"settings": told, "trainable": shapes, "batches": str(micro_batches.digest())})
