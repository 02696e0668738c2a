"""What a report shows. Every part but the header may be missing: a run that stopped early has a report too."""

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

Outcome = Literal["pass", "fail", "inconclusive"]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One gate: the paired difference candidate − reference with its interval."""

    name: str
    metric: str
    better: Literal["higher", "lower"]
    candidate: float
    reference: float
    difference: float
    low: float
    high: float
    threshold: float
    """The interval has to lie beyond this difference (above it, if higher is better)."""
    outcome: Outcome
    num_items: int
    detectable: float | None = None
    """Smallest difference that this sample can show."""


@dataclass(frozen=True, kw_only=True)
class LossPoint:
    """Mean loss per supervised token (nats) at an optimizer step."""

    step: int
    training: float
    evaluation: float | None = None


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """Counts by true label (row) and predicted label (column)."""

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """Relative error of one quantized weight: ‖W − Ŵ‖_F / ‖W‖_F."""

    name: str
    relative_error: float


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What a stage took."""

    name: str
    seconds: float
    peak_bytes: int
    """Largest resident memory, children included."""


@dataclass(frozen=True, kw_only=True)
class MemoryPart:
    """Memory of one part of training, as planned before the start and as measured (None: cannot be told apart)."""

    name: str
    low_bytes: int
    expected_bytes: int
    high_bytes: int
    measured_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class MetricRow:
    """One metric of base and candidate, with the candidate's 95 % interval."""

    name: str
    base: float | None
    production: float | None
    candidate: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything the report's page is made from."""

    pipeline: str
    created: datetime
    outcome: Outcome | None
    """The gate's verdict; None if the run has not come to it."""
    reasons: tuple[str, ...] = ()
    """Why, in sentences for people."""
    facts: tuple[tuple[str, str], ...] = ()
    """The line under the title: base, method, rows, trained parameters…"""
    gates: tuple[Gate, ...] = ()
    metrics: tuple[MetricRow, ...] = ()
    loss: tuple[LossPoint, ...] = ()
    confusion: Confusion | None = None
    layer_errors: tuple[LayerError, ...] = ()
    stages: tuple[StageCost, ...] = ()
    memory: tuple[MemoryPart, ...] = ()
    lineage: tuple[tuple[str, str], ...] = ()
    """Name and digest or revision of everything the result was made from."""
