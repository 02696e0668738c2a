"""The training loop: a step's micro-batches, forward and backward, clipping, update, journal, checkpoint.

A step's loss is the mean over its supervised tokens, however the step is split into micro-batches and processes: each
micro-batch adds its sum divided by the whole step's token count, and gradients are summed, across processes too.
"""

import math
import random
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, get_scheduler

from graftline.digest import Digest, of_json, write_json
from graftline.errors import PreemptedError, TrainError
from graftline.settings.model import Train
from graftline.train.batches import MicroBatch, MicroBatches
from graftline.train.best import BestAdapter
from graftline.train.checkpoint import (
    Journal,
    Replay,
    load_state,
    load_trainable,
    new_checkpoint,
    save_object,
    save_state,
    save_trainable,
    saved_trainable,
)
from graftline.train.devices import DTYPES, needs_autocast
from graftline.train.distributed import (
    add_gradients,
    is_main,
    local_device,
    num_processes,
    rank,
    replicate_trainable,
    shard_base,
    verify_replicas,
    written_together,
)
from graftline.train.optimizers import make_optimizer
from graftline.train.preemption import Preemption
from graftline.train.preferences import loss_of
from graftline.train.results import OnStep, StepMetrics, Trackers

NOT_LEARNED = ("engine", "ray_address", "checkpoints")
"""Settings of where a training runs; changing them does not make it another training."""
_EXPLODED = 3.0
"""A mean loss above this multiple of ln(vocabulary), the loss of a uniform guess, counts as an explosion."""
_REPLAY_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
"""Tolerated relative difference between a replayed loss and the recorded one; on a CPU they are equal."""
_CUDA_NOISE = 10.0
"""CUDA sums in a different order each time: up to this many tolerances only warn, more stop the training."""


def replay_limits(precision: str, device: str) -> Replay:
    """How far a replayed loss may be from the recorded one."""
    tolerance = _REPLAY_TOLERANCE[precision]
    return Replay(told=tolerance, refused=tolerance * (_CUDA_NOISE if device == "cuda" else 1))


class Loop:
    """One training: its optimizer, schedule and state, and the steps from a checkpoint to the end."""

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
        """``settings``: device and precision are resolved, not `auto`. Seeds every random number generator."""
        _seed(settings.seed)
        self.model, self.micro_batches, self.settings, self.work, self.best = model, micro_batches, settings, work, best
        self.num_steps = len(micro_batches) // micro_batches.parts
        self.inputs = _inputs_digest(model, micro_batches, settings)
        self.journal: Journal
        self._on_step = on_step
        self._loss = loss_of(model, settings.objective)
        if settings.sharding:
            shard_base(self._loss, model)
        trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._trainable = list(trainable.values())
        self.optimizer = make_optimizer(trainable, settings)
        # transformers' "constant" has no warm-up.
        schedule = "constant_with_warmup" if settings.scheduler == "constant" else settings.scheduler
        self._schedule = get_scheduler(
            schedule, self.optimizer, num_warmup_steps=settings.warmup_steps, num_training_steps=self.num_steps
        )
        self._scaler = torch.amp.GradScaler(settings.device, enabled=settings.precision == "fp16")
        self._device = local_device(settings.device)
        self._dtype = DTYPES[settings.precision]
        self._autocast = needs_autocast(model, self._dtype)

    def open_journal(self, checkpoint: Path | None) -> None:
        """Read the journal up to the step of ``checkpoint``."""
        replay = replay_limits(self.settings.precision, self.settings.device)
        self.journal = Journal(self.work, inputs=self.inputs, checkpoint=checkpoint, replay=replay, writes=is_main())
        self.best.mark(self.journal.steps)

    def run(self, checkpoint: Path | None, trackers: Trackers) -> None:
        """Run every step after ``checkpoint``; without one, all steps.

        Raises:
            TrainError: a loss or a gradient is not finite, or the loss explodes; the batch is written to ``work``.
            PreemptedError: the process was asked to stop (SIGTERM); the steps so far are in a checkpoint.
        """
        if checkpoint is not None:
            self._resume(checkpoint)
        if num_processes() > 1:
            replicate_trainable(self.model)
        trackers.tell(self.journal.steps)
        self._loss.train()
        with Preemption() as preemption:
            for step in range(len(self.journal.steps), self.num_steps):
                batches = [self.micro_batches[at] for at in self._own(step)]
                counts, is_preempted = self._count(batches, preemption.is_asked)
                if is_preempted:
                    self._leave(step)
                metrics = self._step(step, batches, counts)
                self.journal.append(metrics)
                if is_main():
                    trackers.tell([metrics])
                    self._on_step(metrics)
                is_last = metrics.step == self.num_steps or self.best.is_exhausted(self.journal.steps)
                if self._is_due(metrics.step, is_last):
                    self._save(metrics.step)
                if is_last:
                    break

    def _own(self, step: int) -> range:
        """This process's micro-batches of a step: consecutive ones go to different processes."""
        first, parts = step * self.micro_batches.parts, self.micro_batches.parts
        return range(first + rank(), first + parts, num_processes())

    def _count(self, batches: list[MicroBatch], is_asked: bool) -> tuple[Tensor, bool]:
        """(what the loss is the mean over, supervised tokens, tokens) of the step, and whether to stop was asked."""
        counted = sum(map(self._loss.count, batches))
        supervised = sum(len(batch["targets"]) for batch in batches)
        tokens = sum(int(batch["num_tokens"]) for batch in batches)
        counts = _moved(torch.tensor([counted, supervised, tokens, int(is_asked)]), self._device)
        if num_processes() > 1:
            dist.all_reduce(counts)
            is_asked = bool(counts[3])
        return counts[:3], is_asked

    def _step(self, step: int, batches: list[MicroBatch], counts: Tensor) -> StepMetrics:
        rate = float(self._schedule.get_last_lr()[0])
        loss, norm = self._gradients(batches, counts[0])
        self._check(step, loss, norm)
        self._scaler.step(self.optimizer)
        scale = self._scaler.get_scale()
        self._scaler.update()
        # A lower scale means that the gradients overflowed and the update was skipped.
        if self._scaler.get_scale() >= scale:
            self._schedule.step()
        self.optimizer.zero_grad()
        _, supervised, tokens = counts.tolist()
        return StepMetrics(
            step=step + 1,
            total_steps=self.num_steps,
            loss=loss,
            grad_norm=norm,
            learning_rate=rate,
            tokens=tokens,
            supervised_tokens=supervised,
            score=self.best.score(step + 1, self.journal.steps),
        )

    def _gradients(self, batches: list[MicroBatch], num_supervised: Tensor) -> tuple[float, float]:
        """Mean loss of the step in nats, and the gradient norm before clipping."""
        total = torch.zeros((), device=self._device)
        for batch in batches:
            with torch.autocast(self._device.type, dtype=self._dtype, enabled=self._autocast):
                loss: Tensor = self._loss(_on(batch, self._device), num_supervised=num_supervised)
            self._scaler.scale(loss).backward()
            total += loss.detach()
        if num_processes() > 1:
            add_gradients(self.model)
            dist.all_reduce(total)
        self._scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._trainable, self.settings.max_grad_norm or math.inf)
        # The only point in a step where the host waits for the device.
        loss_value, norm_value = torch.stack([total, norm.to(total.dtype)]).tolist()
        return loss_value, norm_value

    def _check(self, step: int, loss: float, norm: float) -> None:
        if not math.isfinite(loss):
            self._stop(f"the loss is {loss}", step)
        if loss > _EXPLODED * math.log(self.model.config.get_text_config().vocab_size):
            self._stop(f"the loss is {loss:.6g}, far above that of a random guess", step)
        # In fp16, too high a scale gives infinite gradients; the scaler lowers it and skips the update.
        if not math.isfinite(norm) and self.settings.precision != "fp16":
            self._stop(f"the norm of the gradients is {norm}", step)

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

    def _is_due(self, step: int, is_last: bool) -> bool:
        every = self.settings.checkpoint_every
        return every > 0 and (is_last or step % every == 0)

    def _leave(self, steps: int) -> None:
        if steps and not (self.work / f"checkpoint-{steps}").exists():
            self._save(steps)
        raise PreemptedError(
            f"this process was asked to end (SIGTERM) after step {steps} of {self.num_steps}, which is kept in "
            f"{self.work}; run again: it continues from there"
        )

    def _save(self, step: int) -> None:
        new = new_checkpoint(self.work, step, inputs=self.inputs)
        with written_together(new, self.work / f".checkpoint-{step}.part") as folder:
            if is_main():
                save_trainable(self.model, folder)
                self.journal.copy_to(folder)
                save_state(folder, optimizer=self.optimizer, schedule=self._schedule, scaler=self._scaler)
            save_object(_random_state(), folder / f"random-{rank()}.pt")
        verify_replicas(self.model, saved_trainable(self.work / f"checkpoint-{step}"))
        self.best.mark(self.journal.steps)

    def _resume(self, checkpoint: Path) -> None:
        load_trainable(self.model, checkpoint)
        load_state(checkpoint, optimizer=self.optimizer, schedule=self._schedule, scaler=self._scaler)
        _set_random_state(torch.load(checkpoint / f"random-{rank()}.pt", weights_only=True))


def _on(batch: MicroBatch, device: torch.device) -> MicroBatch:
    values = cast(dict[str, Tensor | int], batch)
    moved = {name: value if isinstance(value, int) else _moved(value, device) for name, value in values.items()}
    return cast(MicroBatch, moved)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; copied from pinned memory, so that the host does not wait."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # CUDA's generators too
    # A data loader used to draw one number here; this keeps trainings of earlier versions reproducible to the byte.
    torch.empty((), dtype=torch.int64).random_()


def _random_state() -> dict[str, Any]:
    numpy: dict[str, Any] = dict(np.random.get_state(legacy=False))
    words = numpy["state"]
    return {
        "python": random.getstate(),
        "numpy": numpy | {"state": words | {"key": torch.from_numpy(words["key"].astype(np.int64))}},
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    words = state["numpy"]["state"]
    np.random.set_state(state["numpy"] | {"state": words | {"key": words["key"].numpy().astype(np.uint32)}})
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def _inputs_digest(model: PreTrainedModel, micro_batches: MicroBatches, settings: Train) -> Digest:
    shapes = {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    # Left out because they do not change what is learned: checkpoint steps, trackers, threads and kernels.
    told = settings.replace(checkpoint_every=0, threads=1, report_to=()).model_dump(
        mode="json", exclude={"held_out_rows", "processes", "compile", "offload_activations", *NOT_LEARNED}
    )
    del told["start_from"]  # the folder of the checkpoints is named by the release, and the first loss follows from it
    if not settings.fp8_products:  # so that checkpoints from before these settings existed still match
        del told["fp8_products"]
    if settings.objective.kind == "supervised":
        del told["objective"]
    return of_json({"settings": told, "trainable": shapes, "batches": str(micro_batches.digest())})
