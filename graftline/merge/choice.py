"""Which merged model is shipped: what it is folded into, and whether it is quantized again. Evidence decides.

The reference is always the unmerged model, base and adapter as they were trained and judged. On the same tokens:

    dequantized   must be that model: within the rounding of its type (`ParityLimits.for_dtype`)
    original      is another one: the base from before quantization, which the adapter never saw. Taken if asked for and
                  shown not worse (upper end of the answers' ΔNLL's 90 % interval at most `ORIGINAL_MARGIN`); of `both`
                  only if shown better (the whole interval below 0). The answers': prompts are no task, and an adapter
                  that has forgotten how to write them is easily beaten there
    requantized   taken if it keeps to `REQUANTIZED_LIMITS`; otherwise the 16-bit model stays, and the report says why
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from graftline.adapters.peft_format import load_adapter
from graftline.checkpoint.identity import read_identity
from graftline.data.template import Encoded
from graftline.errors import MergeError
from graftline.merge.fold import MergeReport, merge_folder
from graftline.merge.parity import ParityLimits, ParityReport, compare_with_recorded, record_logits
from graftline.merge.requantize import REQUANTIZED_LIMITS, RequantizeReport, requantize_folder
from graftline.progress import OnProgress, silent
from graftline.quant.load import load_model
from graftline.quant.scheme import Scheme

Into = Literal["dequantized", "original", "both"]
_Name = Literal["dequantized", "original"]

ORIGINAL_MARGIN = 0.01
"""How much worse than the judged model a merge into the original may be, nats a token of the answers."""


@dataclass(frozen=True)
class MergePlan:
    """What is asked for."""

    dtype: torch.dtype
    """float32, float16 or bfloat16."""
    into: Into = "dequantized"
    """What to fold into; a dense base counts as dequantized."""
    original: Path | None = None
    """The folder that a quantized base was made from; needed unless ``into`` is dequantized."""
    requantize: Scheme | None = None
    """Quantize the chosen model again in this scheme, if the result still answers the same."""


@dataclass(frozen=True)
class Candidate:
    """One merged model and what was found of it."""

    merge: MergeReport
    parity: ParityReport
    failures: tuple[str, ...]
    """Why it may not be shipped; empty: it may."""

    def as_json(self) -> dict[str, Any]:
        """A JSON value."""
        facts = asdict(self.merge) | {"digest": str(self.merge.digest), "base_digest": str(self.merge.base_digest)}
        return {"merge": facts, "parity": self.parity.as_json(), "failures": list(self.failures)}


@dataclass(frozen=True)
class Requantized:
    """What quantizing again did to the chosen model."""

    loss: RequantizeReport
    parity: ParityReport

    @property
    def shipped(self) -> bool:
        """Whether it keeps to the limits, and so replaced the 16-bit model."""
        return self.parity.passed


@dataclass(frozen=True)
class Chosen:
    """What lies in the folder, and everything that was measured on the way."""

    name: _Name
    """What was folded into."""
    reason: str
    candidates: Mapping[_Name, Candidate]
    requantized: Requantized | None

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
        """A JSON value: the choice with its reason, what ships, every candidate, the loss by layer."""
        again = self.requantized
        return {
            "chosen": self.name,
            "reason": self.reason,
            "merge": self.candidate.as_json()["merge"],
            "parity": self.parity.as_json(),
            "candidates": {name: candidate.as_json() for name, candidate in self.candidates.items()},
            "requantized": again
            and {"loss": again.loss.as_json(), "parity": again.parity.as_json(), "shipped": again.shipped},
        }


def merge_by_evidence(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    plan: MergePlan,
    rows: Sequence[Encoded],
    device: str = "cpu",
    on_progress: OnProgress = silent,
) -> Chosen:
    """Write the model folder ``out``: the merged model that the evidence allows.

    One model is in memory at a time; with ``both`` or ``requantize`` two folders are on the disk for a while.

    Args:
        base: the model folder that the adapter was trained on, dense or quantized.
        adapter: a folder in PEFT's format with ``graftline.json``.
        out: the folder to make.
        plan: what is asked for.
        rows: what all models are compared on, held out from the training; supervised tokens are answers.
        device: where the models are run for the comparison.
        on_progress: called with (tensors done, tensors in all) of each folder that is written.

    Raises:
        MergeError: no merged model may be shipped, or what `merge_folder` refuses.
        BaseMismatchError: adapter, ``base`` and ``plan.original`` do not belong together.
    """
    reference = _Reference.record(base, adapter, rows, device)
    names: list[_Name] = ["dequantized", "original"] if plan.into == "both" else [plan.into]
    folders = {name: out.with_name(f"{out.name}.{name}") for name in (*names, "requantized")}
    try:
        candidates = {}
        for name in names:
            original = plan.original if name == "original" else None
            report = merge_folder(
                base, adapter, folders[name], dtype=plan.dtype, original=original, on_progress=on_progress
            )
            parity = reference.compare(folders[name], ParityLimits.for_dtype(plan.dtype))
            candidates[name] = Candidate(report, parity, _failures(name, parity))
        name, reason = _choose(candidates)
        requantized = None
        if plan.requantize:
            again = folders["requantized"]
            folded_into = plan.original if name == "original" and plan.original else base
            loss = requantize_folder(
                folders[name], again, base=folded_into, scheme=plan.requantize, on_progress=on_progress
            )
            requantized = Requantized(loss, reference.compare(again, REQUANTIZED_LIMITS))
        folders["requantized" if requantized and requantized.shipped else name].rename(out)
    finally:
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
    return Chosen(name, reason, candidates, requantized)


@dataclass(frozen=True)
class _Reference:
    """The unmerged model's answers, which all candidates are compared with."""

    recorded: list[Tensor]
    rows: Sequence[Encoded]
    device: str

    @classmethod
    def record(cls, base: Path, adapter: Path, rows: Sequence[Encoded], device: str) -> Self:
        model = load_model(base, device=device, dtype=torch.float32)
        load_adapter(model, adapter, base=read_identity(base))
        return cls(record_logits(model, [row.input_ids for row in rows]), rows, device)

    def compare(self, folder: Path, limits: ParityLimits) -> ParityReport:
        merged = load_model(folder, device=self.device, dtype=torch.float32)
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


def _choose(candidates: Mapping[_Name, Candidate]) -> tuple[_Name, str]:
    """Raises MergeError where none may be shipped."""
    allowed = {name: candidate for name, candidate in candidates.items() if not candidate.failures}
    if not allowed:
        found = "; ".join(f"{name}: {', '.join(candidate.failures)}" for name, candidate in candidates.items())
        raise MergeError(
            f"the merged model answers differently ({found}); set package.dtype to float16 or float32, "
            "or package.merged to false and serve the adapter unmerged"
        )
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
