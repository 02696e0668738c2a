"""Which of the evidence study's arms to use: the first, in its order, that fits a budget of memory and time.

Memory is planned and time estimated as for any training (graftline.plan.preflight); no weights are loaded. An arm fits
by its expected memory and the upper end of its time. If none fits, the nearest is named, with the necessary changes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from transformers import PretrainedConfig

from graftline.data.columns import columns_of
from graftline.data.template import Encoded
from graftline.errors import AdapterError, TrainError
from graftline.plan.evidence import Arm, Evidence
from graftline.plan.memory import (
    MemoryPlan,
    MemoryUse,
    Workload,
    measure_micro_batch,
    plan_memory,
    stand_in_micro_batch,
    what_would_fit,
)
from graftline.plan.preflight import TIMED_SHARE, count_work, duration, seconds_of, workload_of
from graftline.settings.model import Quantize, Train
from graftline.train.batches import check_rows
from graftline.train.devices import DeviceKind, cpu_threads, free_bytes, resolve_device
from graftline.train.preferences import check_pairs
from graftline.weights.quant.scheme import plan_of

_STAND_IN_SPREAD = 2.0
"""Upper over lower end of a scaled time: 1.5 as for a measured one, times 1.34, its largest error so far."""
_RECOMPUTING = 4 / 3
"""Time with gradient checkpointing over time without: every forward pass runs twice."""
_TIME_UNKNOWN = "takes an unknown time: this machine has no memory for a short step that would tell"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a training may take; TrainError if a limit is not a positive number."""

    memory_bytes: float | None = None
    """None: the free memory of the device."""
    seconds: float | None = None
    """None: no limit."""

    def __post_init__(self) -> None:
        for name, unit, value in (("memory", 1e9, self.memory_bytes), ("time", 60, self.seconds)):
            if value is not None and not 0 < value < math.inf:
                what = "GB" if name == "memory" else "minutes"
                raise TrainError(f"the budget of {name} is {value / unit:g} {what}; expected a number above 0")


@dataclass(frozen=True)
class TimeEstimate:
    """How long a training takes, in seconds."""

    low: float
    high: float
    basis: Literal["measured", "relation"]
    """A step of two of the base's blocks was measured, or a small Llama's was measured and scaled."""

    def text(self) -> str:
        """The time in words."""
        return f"{duration(self.low)} to {duration(self.high)}"


@dataclass(frozen=True)
class ArmAssessment:
    """An arm, what it would take, and what speaks against it."""

    arm: Arm
    memory: MemoryPlan | None = None
    """None: it cannot be trained here at all."""
    time: TimeEstimate | None = None
    """None: not estimated, because the arm was rejected before, or no step could be measured."""
    against: str | None = None
    """Why it is passed over; None: it fits."""


@dataclass(frozen=True)
class NearestMiss:
    """The arm that misses the budget by the least, and what to change for it to fit."""

    assessment: ArmAssessment
    changes: tuple[str, ...]
    """Settings, to be changed together."""
    memory: MemoryUse
    """What it takes with the changes."""
    missing: str | None
    """Why the changes are not enough; None if they are."""


@dataclass(frozen=True)
class Recommendation:
    """The choice, and what it is based on. Bytes and seconds."""

    choice: ArmAssessment | None
    """None: nothing fits."""
    passed_over: tuple[ArmAssessment, ...]
    """Arms that the study prefers to the choice."""
    not_looked_at: tuple[Arm, ...]
    """Arms that come after the choice."""
    nearest: NearestMiss | None
    """Set if nothing fits and an arm can be trained on this base at all."""
    budget: Budget
    memory_limit: float
    """The budget's, or the free memory."""
    free_bytes: int
    device: DeviceKind
    num_steps: int
    tokens_per_step: float


def recommend(
    config: PretrainedConfig,
    rows: Sequence[Encoded],
    *,
    evidence: Evidence,
    settings: Train,
    budget: Budget = Budget(),
    barred: Mapping[str, str] | None = None,
) -> Recommendation:
    """Choose an arm for training ``rows`` on a base with this configuration, on this machine.

    The learning rate in ``settings`` is ignored, because the arm has one. ``barred`` are names of arms that must not be
    chosen, with the reason.

    Raises:
        TrainError: nothing can be learned from the rows, or the device or precision is not available.
    """
    rows = columns_of(rows)
    check_rows(rows)
    check_pairs(len(rows), settings)
    assessor = _ArmAssessor(config, rows, settings, budget)
    assessed: list[ArmAssessment] = []
    for at, arm in enumerate(evidence.arms, 1):
        reason = (barred or {}).get(arm.name)
        assessment = ArmAssessment(arm, against=reason) if reason else assessor.assess(arm)
        if assessment.against is None:
            return assessor.recommendation(assessment, assessed, evidence.arms[at:])
        assessed.append(assessment)
    return assessor.recommendation(None, assessed, ())


@dataclass(frozen=True)
class _ArmAssessor:
    """Assesses arms for one base, one set of rows and one budget."""

    config: PretrainedConfig
    rows: Sequence[Encoded]
    settings: Train
    budget: Budget

    @cached_property
    def device(self) -> DeviceKind:
        return resolve_device(self.settings.device)

    @cached_property
    def free(self) -> int:
        return free_bytes(self.device)

    @cached_property
    def work(self) -> tuple[int, float]:
        return count_work(self.rows, self.settings)

    @property
    def memory_limit(self) -> float:
        return self.free if self.budget.memory_bytes is None else self.budget.memory_bytes

    def workload(self, arm: Arm) -> Workload:
        spec = arm.adapter
        quantize = Quantize(**arm.sections()["quantize"])
        scheme = None if quantize.method == "none" else plan_of(quantize).default
        return workload_of(self.rows, self.settings, spec, scheme)

    def assess(self, arm: Arm) -> ArmAssessment:
        try:
            memory = plan_memory(self.config, self.workload(arm))
        except AdapterError as error:
            return ArmAssessment(arm, against=f"does not fit this base: {error}")
        against, time = self._too_large(memory), None
        if self.budget.seconds is not None or not against:
            time = self.time(arm)
        against += self._too_slow(time)
        return ArmAssessment(arm, memory, time, against=" and ".join(against) or None)

    def _too_large(self, memory: MemoryPlan) -> list[str]:
        expected, limit = memory.total.expected, self.memory_limit
        is_over = expected > limit
        return [f"takes {expected / 1e9:.3f} GB, more than the {limit / 1e9:.3f} GB of the budget"] if is_over else []

    def _too_slow(self, time: TimeEstimate | None) -> list[str]:
        limit = self.budget.seconds
        if limit is None or (time and time.high <= limit):
            return []
        if time is None:
            return [_TIME_UNKNOWN]
        return [f"may take {duration(time.high)}, more than the {duration(limit)} of the budget"]

    def time(self, arm: Arm) -> TimeEstimate | None:
        workload, limit = self.workload(arm), TIMED_SHARE * self.free
        num_steps, tokens_per_step = self.work
        with cpu_threads(self.settings.threads):
            measured = measure_micro_batch(self.config, workload, limit_bytes=limit)
            related = None if measured else stand_in_micro_batch(self.config, workload, limit_bytes=limit)
        if micro_batch := measured or related:
            low, high = seconds_of(micro_batch, workload, tokens=num_steps * tokens_per_step)
            return (
                TimeEstimate(low, high, "measured")
                if measured
                else TimeEstimate(low, _STAND_IN_SPREAD * low, "relation")
            )
        return None

    def recommendation(
        self, choice: ArmAssessment | None, assessed: Sequence[ArmAssessment], after: Sequence[Arm]
    ) -> Recommendation:
        return Recommendation(
            choice=choice,
            passed_over=tuple(assessed),
            not_looked_at=tuple(after),
            nearest=None if choice else self.nearest(assessed),
            budget=self.budget,
            memory_limit=self.memory_limit,
            free_bytes=self.free,
            device=self.device,
            num_steps=self.work[0],
            tokens_per_step=self.work[1],
        )

    def nearest(self, assessed: Sequence[ArmAssessment]) -> NearestMiss | None:
        possible = [assessment for assessment in assessed if assessment.memory]
        if not possible:
            return None
        assessment = min(possible, key=self._excess)
        assert assessment.memory is not None
        changes, memory = [], assessment.memory.total
        if memory.expected > self.memory_limit:
            found = what_would_fit(self.config, self.workload(assessment.arm), limit_bytes=self.memory_limit)
            changes = [change.what for change in found]
            memory = found[-1].plan.total if found else memory
        shorter, missing = self._shorten(
            assessment.time, recomputes=any("checkpointing" in change for change in changes)
        )
        if memory.expected > self.memory_limit:
            missing = f"it still takes {memory.expected / 1e9:.3f} GB: take a smaller base or a larger device"
        return NearestMiss(assessment, (*changes, *shorter), memory, missing)

    def _excess(self, assessment: ArmAssessment) -> float:
        """How many times over the budget an arm is."""
        assert assessment.memory is not None
        slow = 0.0
        if self.budget.seconds is not None:
            slow = assessment.time.high / self.budget.seconds if assessment.time else math.inf
        return max(assessment.memory.total.expected / self.memory_limit, slow)

    def _shorten(self, time: TimeEstimate | None, *, recomputes: bool) -> tuple[list[str], str | None]:
        """Fewer steps, if the time requires them, and what is still missing then."""
        limit, num_steps = self.budget.seconds, self.work[0]
        if limit is None:
            return [], None
        if time is None:
            return [], f"it {_TIME_UNKNOWN}"
        high = time.high * (_RECOMPUTING if recomputes else 1)
        if high <= limit:
            return [], None
        steps = int(num_steps * limit / high)
        if not steps:
            each = duration(high / num_steps)
            return [], f"one step alone may take {each}: lower train.batch_size or data.max_tokens, or allow more time"
        instead = f"epochs: {self.settings.epochs:g}" if self.settings.epochs else f"{num_steps}"
        return [f"train.steps: {steps} instead of {instead}"], None


def document(made: Recommendation, evidence: Evidence) -> dict[str, object]:
    """A recommendation as JSON; bytes and seconds."""
    nearest = made.nearest
    return {
        "format": 1,
        "budget": {
            "memory_bytes": round(made.memory_limit),
            "memory_from": "given" if made.budget.memory_bytes is not None else f"free on this {made.device} now",
            "seconds": made.budget.seconds,
        },
        "free_bytes": made.free_bytes,
        "steps": made.num_steps,
        "tokens_per_step": round(made.tokens_per_step, 1),
        "choice": made.choice and _assessment_json(made.choice, evidence),
        "passed_over": [_assessment_json(assessment, evidence) for assessment in made.passed_over],
        "not_looked_at": [arm.name for arm in made.not_looked_at],
        "nearest": nearest
        and {
            "arm": nearest.assessment.arm.name,
            "changes": list(nearest.changes),
            "expected_bytes": round(nearest.memory.expected),
            "missing": nearest.missing,
        },
    }


def _assessment_json(assessment: ArmAssessment, evidence: Evidence) -> dict[str, object]:
    return {
        "arm": assessment.arm.name,
        **assessment.arm.sections(),
        "memory": assessment.memory and assessment.memory.document(),
        "seconds": assessment.time and [round(assessment.time.low, 1), round(assessment.time.high, 1)],
        "seconds_by": assessment.time and assessment.time.basis,
        "found": assessment.arm.found,
        "evidence": list(evidence.links(assessment.arm)),
        "against": assessment.against,
    }
