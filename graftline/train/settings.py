"""What one training is told, and what it tells back: plain frozen values."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from graftline.errors import TrainError

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Scheduler = Literal["constant", "linear", "cosine"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]
Tracker = Literal["tensorboard", "dvclive", "mlflow"]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of one training.

    Raises:
        TrainError: a value is out of its range (field, value and range are named).
    """

    steps: int | None = None
    """Optimizer steps. Exactly one of ``steps`` and ``epochs`` is given."""
    epochs: float | None = None
    """Passes over the rows, rounded up to whole steps."""
    batch_size: int = 16
    """Rows of one micro-batch on one device."""
    gradient_accumulation: int = 1
    """Micro-batches of one optimizer step on one device."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    scheduler: Scheduler = "constant"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: int = 0
    """Optimizer steps during which the learning rate rises linearly from zero."""
    optimizer: Optimizer = "adamw"
    """Update rule; the 8-bit and paged ones are bitsandbytes'."""
    lr_ratio_b: float = 1.0
    """Learning rate of a low-rank update's B over that of A (LoRA+ recommends 16)."""
    lr_ratio_vectors: float = 1.0
    """Learning rate of trained vectors (VeRA's, DoRA's magnitude, biases) over that of matrices."""
    weight_decay: float = 0.0
    """Decoupled weight decay per step, times the learning rate; vectors have none."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm; 0 switches clipping off."""
    seed: int = 0
    """Seeds the order of the rows and dropout."""
    device: Device = "auto"
    """Where to train; ``auto`` takes CUDA if there is one."""
    precision: Precision = "auto"
    """Arithmetic of the base; adapters and optimizer states are fp32. ``auto``: bf16 or fp16 on CUDA, fp32 on CPU."""
    threads: int = 1
    """CPU threads of one operation."""
    packing: bool = False
    """Put a micro-batch's rows into one sequence instead of padding them; attention stays inside each row."""
    gradient_checkpointing: bool = False
    """Compute each layer's activations again in the backward pass instead of keeping them: a third more time."""
    sharding: bool = False
    """With several processes: shard the frozen base with FSDP2 instead of holding it whole in each (DDP)."""
    evaluate_every: int = 0
    """Optimizer steps between two calls of the evaluation that is passed to `train`; 0 without one."""
    patience: int = 0
    """Evaluations without a better score after which the training stops; 0 never stops it."""
    checkpoint_every: int = 50
    """Optimizer steps between two checkpoints; 0 writes none."""
    report_to: tuple[Tracker, ...] = ()
    """Where each step's figures are also written (graftline.train.trackers)."""

    def __post_init__(self) -> None:
        """Check every field."""
        self._check_duration()
        self._check_choices()
        self._at_least(1, "batch_size", "gradient_accumulation", "threads")
        self._at_least(
            0, "warmup_steps", "weight_decay", "max_grad_norm", "seed", "checkpoint_every", "evaluate_every", "patience"
        )
        for field in ("learning_rate", "lr_ratio_b", "lr_ratio_vectors"):
            if not 0 < getattr(self, field) < math.inf:
                raise TrainError(f"{field} is {getattr(self, field)}; a positive finite number is expected")

    def _check_duration(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise TrainError(f"steps is {self.steps} and epochs is {self.epochs}; give exactly one of them")
        if self.steps is not None:
            self._at_least(1, "steps")
        elif not 0 < (self.epochs or 0) < math.inf:
            raise TrainError(f"epochs is {self.epochs}; a positive finite number is expected")

    def _check_choices(self) -> None:
        choices = {"device": Device, "precision": Precision, "scheduler": Scheduler, "optimizer": Optimizer}
        for field, kind in choices.items():
            value = getattr(self, field)
            if value not in get_args(kind):
                raise TrainError(f"{field} is {value!r}; expected one of {', '.join(get_args(kind))}")
        if unknown := set(self.report_to) - set(get_args(Tracker)):
            raise TrainError(f"report_to has {', '.join(unknown)}; expected some of {', '.join(get_args(Tracker))}")

    def _at_least(self, lowest: int, *fields: str) -> None:
        for field in fields:
            value = getattr(self, field)
            if not lowest <= value < math.inf:
                raise TrainError(f"{field} is {value}; a finite number of at least {lowest} is expected")


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What one optimizer step showed."""

    step: int
    """Number of this step, from 1."""
    total_steps: int
    loss: float
    """Mean negative log-likelihood in nats per supervised token of the step, before the update."""
    grad_norm: float
    """Global L2 norm of the gradients before clipping."""
    learning_rate: float
    """Learning rate of this update."""
    tokens: int
    """Input tokens of the step on all devices, padding not counted."""
    supervised_tokens: int
    """Tokens that the loss was taken on, on all devices."""
    score: float | None = None
    """What the evaluation gave after this step; lower is better. None where there was none."""


OnStep = Callable[[StepMetrics], None]
"""Called after every optimizer step."""


def ignore_step(metrics: StepMetrics) -> None:
    """The step callback that does nothing."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a training did. Counts cover the whole training; times only this process, not one that it went on from."""

    losses: tuple[float, ...]
    """Loss of every step from the first, those before a resume included."""
    steps: int
    scores: tuple[tuple[int, float], ...]
    """Steps after which there was an evaluation, and what it gave; lower is better."""
    best_step: int | None
    """Step whose adapter the model has now, by evaluation; None: without one, the last step's."""
    tokens: int
    """Input tokens of all steps, padding not counted."""
    tokens_per_second: float
    """Input tokens per second in this process; 0 when nothing was left to do."""
    peak_bytes: int
    """Peak memory during this process's steps: allocated CUDA memory, or the process's resident set on CPU."""
    optimizer_bytes: int
    """Memory of the optimizer's states; 0 when nothing was left to do."""
    seconds: float
    """Wall clock seconds of this process's steps, checkpoints included."""
