"""What a training tells: each step's figures, and what it did as a whole."""

from collections.abc import Callable
from dataclasses import dataclass


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
