"""Which merged model is shipped: its number type, what it is folded into, whether it is quantized again, or none.

The reference is always the unmerged model, base and adapter as they were trained and judged. On the same tokens:

    dequantized   must equal it within the rounding of the number type (`ParityLimits.for_dtype`)
    original      a different model: folded into the base from before quantization, which the adapter never saw. Chosen
                  if asked for and not worse (the 90 % interval of the answers' ΔNLL ends at or below
                  `ORIGINAL_MARGIN`); with `both` only if better (the whole interval below 0). Only answers count,
                  because adapters forget how to write prompts, and any base beats them there
    requantized   shipped if it is within `REQUANTIZED_LIMITS`; otherwise the 16-bit model is, and the report says why

If none may be shipped in the number type that was asked for, the next more precise one is tried: bfloat16 (8 bits),
float16 (11), float32 (24). If float32 fails too, the difference is not due to rounding, and none is shipped.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch

from graftline.adapters.peft_format import load_exact
from graftline.data.template import Encoded
from graftline.errors import NumberTypeError
from graftline.logs import OnProgress, silent
from graftline.merge.fold import MergeReport, merge_folder
from graftline.merge.parity import (
    REQUANTIZED_LIMITS,
    ParityLimits,
    ParityReport,
    Recorded,
    RequantizeReport,
    compare_with_recorded,
    record,
    requantize_folder,
)
from graftline.settings.model import MergeInto, Quantize, Rounding
from graftline.weights.cast import type_name

_Name = Literal["dequantized", "original"]

ORIGINAL_MARGIN = 0.01
"""How much worse a merge into the original may be than the judged model, nats a token of the answers."""


@dataclass(frozen=True)
class MergePlan:
    """What is asked for."""

    dtype: torch.dtype
    """float32, float16 or bfloat16; if it fails, the more precise ones are tried."""
    into: MergeInto
    """What to fold into; a dense base counts as dequantized."""
    original: Path | None = None
    """The folder that a quantized base was made from; needed unless ``into`` is dequantized."""
    requantize: Quantize | None = None
    """Quantize the chosen model again like this, if its answers stay the same."""
    calibration: Sequence[Sequence[int]] | None = None
    """Token ids of training rows, on which `requantize` compensates rounding errors; None: to the nearest code."""


@dataclass(frozen=True)
class Candidate:
    """A merged model and its comparison with the reference."""

    merge: MergeReport
    parity: ParityReport
    failures: tuple[str, ...]
    """Why it may not be shipped; empty if it may."""

    def as_json(self) -> dict[str, Any]:
        """A JSON value."""
        facts = asdict(self.merge) | {"digest": str(self.merge.digest), "base_digest": str(self.merge.base_digest)}
        return {"merge": facts, "parity": self.parity.as_json(), "failures": list(self.failures)}


@dataclass(frozen=True)
class Requantized:
    """The result of quantizing the chosen model again."""

    loss: RequantizeReport
    parity: ParityReport
    rounding: Rounding = "nearest"

    @property
    def shipped(self) -> bool:
        """Whether it is within the limits, and so replaces the 16-bit model."""
        return self.parity.passed


@dataclass(frozen=True)
class RefusedDtype:
    """A number type in which no merged model may be shipped."""

    dtype: str
    failures: tuple[str, ...]
    """Why, a sentence for each limit that a candidate exceeds."""
    candidates: Mapping[_Name, Candidate] = field(default_factory=dict)
    """What was measured; empty if a weight does not fit the type."""

    def as_json(self) -> dict[str, Any]:
        """A JSON value."""
        candidates = {name: candidate.as_json() for name, candidate in self.candidates.items()}
        return {"dtype": self.dtype, "failures": list(self.failures), "candidates": candidates}

    def __str__(self) -> str:
        return f"{self.dtype}: {'; '.join(self.failures)}"


@dataclass(frozen=True)
class MergeOutcome:
    """The shipped model, and everything that was measured."""

    name: _Name
    """What was folded into."""
    reason: str
    candidates: Mapping[_Name, Candidate]
    requantized: Requantized | None
    attempts: tuple[RefusedDtype, ...] = ()
    """Less precise number types that were tried before."""

    @property
    def candidate(self) -> Candidate:
        """The chosen one, before it was quantized again."""
        return self.candidates[self.name]

    @property
    def parity(self) -> ParityReport:
        """How the shipped model compares with the unmerged one."""
        if self.requantized and self.requantized.shipped:
            return self.requantized.parity
        return self.candidate.parity

    def as_json(self) -> dict[str, Any]:
        """A JSON value: the choice with its reason, what ships, all candidates, the loss by layer."""
        again = self.requantized
        return {
            "merged": True,
            "chosen": self.name,
            "reason": self.reason,
            "merge": self.candidate.as_json()["merge"],
            "parity": self.parity.as_json(),
            "candidates": {name: candidate.as_json() for name, candidate in self.candidates.items()},
            "requantized": again
            and {
                "loss": again.loss.as_json(),
                "parity": again.parity.as_json(),
                "shipped": again.shipped,
                "rounding": again.rounding,
            },
            "attempts": [attempt.as_json() for attempt in self.attempts],
        }


@dataclass(frozen=True)
class NotMerged:
    """No merged model may be shipped: in no number type does one give the judged model's answers."""

    attempts: tuple[RefusedDtype, ...]

    @property
    def reason(self) -> str:
        """Why, in words."""
        tried = " | ".join(str(attempt) for attempt in self.attempts)
        return f"no merged model answers as the adapter on its base does ({tried}): the release holds the adapter alone"

    def as_json(self) -> dict[str, Any]:
        """A JSON value: the reason and everything that was measured."""
        return {
            "merged": False,
            "reason": self.reason,
            "attempts": [attempt.as_json() for attempt in self.attempts],
        }


_BY_DIGITS = (torch.bfloat16, torch.float16, torch.float32)


def merge_by_evidence(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    plan: MergePlan,
    rows: Sequence[Encoded],
    device: str = "cpu",
    on_progress: OnProgress = silent,
) -> MergeOutcome | NotMerged:
    """Write the merged model that the evidence allows to the folder ``out``, or nothing if it allows none.

    One model is in memory at a time; with ``both`` or ``requantize`` two folders are on disk for a while.

    Args:
        base: the model folder that the adapter was trained on, dense or quantized.
        adapter: a folder in PEFT's format with ``graftline.json``.
        out: the folder to make.
        plan: what is asked for.
        rows: held-out rows to compare models on; their supervised tokens are the answers.
        device: where the models run for the comparison.
        on_progress: called with (tensors done, all tensors) of each folder that is written.

    Raises:
        MergeError: `merge_folder` refuses in every number type.
        BaseMismatchError: adapter, ``base`` and ``plan.original`` do not belong together.
    """
    reference = _Reference.record(base, adapter, rows, device)
    attempts: list[RefusedDtype] = []
    for dtype in _BY_DIGITS[_BY_DIGITS.index(plan.dtype) :]:
        merge = _Merge(base, adapter, out, replace(plan, dtype=dtype), reference, on_progress)
        found = merge.run()
        if isinstance(found, MergeOutcome):
            return replace(found, attempts=tuple(attempts))
        attempts.append(found)
    return NotMerged(tuple(attempts))


@dataclass(frozen=True)
class _Merge:
    """The merge in one number type: every candidate that the plan asks for, and the choice among them."""

    base: Path
    adapter: Path
    out: Path
    plan: MergePlan
    reference: "_Reference"
    on_progress: OnProgress

    def run(self) -> MergeOutcome | RefusedDtype:
        names: list[_Name] = ["dequantized", "original"] if self.plan.into == "both" else [self.plan.into]
        folders = {name: self.out.with_name(f"{self.out.name}.{name}") for name in (*names, "requantized")}
        try:
            return self._choose(names, folders)
        except NumberTypeError as error:
            return RefusedDtype(type_name(self.plan.dtype), (str(error),))
        finally:
            for folder in folders.values():
                shutil.rmtree(folder, ignore_errors=True)

    def _choose(self, names: list[_Name], folders: Mapping[str, Path]) -> MergeOutcome | RefusedDtype:
        candidates = {name: self._candidate(name, folders[name]) for name in names}
        choice = _choose(candidates)
        if choice is None:
            failures = (f"{name}: {failure}" for name, found in candidates.items() for failure in found.failures)
            return RefusedDtype(type_name(self.plan.dtype), tuple(failures), candidates)
        name, reason = choice
        requantized = self._requantize(name, folders) if self.plan.requantize else None
        folders["requantized" if requantized and requantized.shipped else name].rename(self.out)
        return MergeOutcome(name, reason, candidates, requantized)

    def _candidate(self, name: _Name, folder: Path) -> Candidate:
        original = self.plan.original if name == "original" else None
        dtype = self.plan.dtype
        report = merge_folder(
            self.base, self.adapter, folder, dtype=dtype, original=original, on_progress=self.on_progress
        )
        parity = self.reference.compare(folder, ParityLimits.for_dtype(dtype))
        return Candidate(report, parity, _failures(name, parity))

    def _requantize(self, name: _Name, folders: Mapping[str, Path]) -> Requantized:
        assert self.plan.requantize is not None
        folded_into = self.plan.original if name == "original" and self.plan.original else self.base
        again = folders["requantized"]
        loss = requantize_folder(
            folders[name],
            again,
            base=folded_into,
            quantize=self.plan.requantize,
            rows=self.plan.calibration,
            on_progress=self.on_progress,
        )
        parity = self.reference.compare(again, REQUANTIZED_LIMITS)
        return Requantized(loss, parity, "nearest" if self.plan.calibration is None else "compensated")


@dataclass(frozen=True)
class _Reference:
    """The unmerged model's answers, which all candidates are compared with."""

    recorded: Recorded
    rows: Sequence[Encoded]
    device: str

    @classmethod
    def record(cls, base: Path, adapter: Path, rows: Sequence[Encoded], device: str) -> Self:
        model = load_exact(base, adapter, device=device)
        return cls(record(model, [row.input_ids for row in rows]), rows, device)

    def compare(self, folder: Path, limits: ParityLimits) -> ParityReport:
        merged = load_exact(folder, device=self.device)
        return compare_with_recorded(
            self.recorded,
            merged,
            [row.input_ids for row in self.rows],
            limits=limits,
            answers=[row.supervised for row in self.rows],
        )


def _failures(name: _Name, parity: ParityReport) -> tuple[str, ...]:
    if name == "dequantized":
        return parity.failures
    worst = parity.answer_nll_change_interval[1]
    if worst <= ORIGINAL_MARGIN:
        return ()
    found = f"ΔNLL of the answers may be {worst:+.3g} nats a token (90 % interval)"
    return (f"{found}, at most {ORIGINAL_MARGIN:+.3g} is allowed",)


def _choose(candidates: Mapping[_Name, Candidate]) -> tuple[_Name, str] | None:
    """Name and reason; None if none may be shipped."""
    allowed = {name: candidate for name, candidate in candidates.items() if not candidate.failures}
    if not allowed:
        return None
    if len(allowed) == 1:
        (name,) = allowed
        return name, "asked for" if len(candidates) == 1 else f"the other failed: {_others(candidates, name)}"
    low, high = candidates["original"].parity.answer_nll_change_interval
    interval = f"ΔNLL of the original's answers within [{low:.3g}, {high:.3g}] nats a token"
    if high < 0:
        return "original", f"shown better than the model that was judged: {interval}"
    return "dequantized", f"the original is not shown better: {interval}"


def _others(candidates: Mapping[_Name, Candidate], chosen: _Name) -> str:
    return "; ".join(", ".join(other.failures) for name, other in candidates.items() if name != chosen)
