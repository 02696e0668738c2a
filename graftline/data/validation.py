"""Validation of the rows of a pipeline: one report, Data Docs, and a stop where something is wrong."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pandas
from transformers import PreTrainedTokenizerBase

from graftline.data.checks import (
    Check,
    ModelLimits,
    Side,
    check_encoded,
    check_labels,
    check_leakage,
    check_texts,
)
from graftline.data.encoding import EncodedRows, Kept, encode_kept
from graftline.data.expectations import LINE, run_expectations
from graftline.data.rows import Row
from graftline.data.template import Encoded, name_lines, stop_ids, template_digest
from graftline.digest import write_json
from graftline.errors import DataError
from graftline.logs import OnProgress, silent
from graftline.settings.model import Data

REPORT = "report.json"
DATA_DOCS = "data_docs"
_BINS = 20


@dataclass(frozen=True)
class Distribution:
    """Of a number a row: least, middle, most, sum, and ``counts[i]`` rows in ``edges[i]`` to ``edges[i + 1]``."""

    minimum: int
    median: float
    maximum: int
    total: int
    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class SideReport:
    """One side's rows. Line numbers are those of its file."""

    rows: int
    tokens: Distribution | None
    supervised_tokens: Distribution | None
    truncated_lines: tuple[int, ...]
    dropped_lines: tuple[int, ...]
    answers: dict[str, int]
    """How often each label is the answer; empty when no labels are declared."""


@dataclass(frozen=True)
class ValidationReport:
    """What validation found. ``sample``: the first training row decoded, with ⟦ ⟧ around what is learned."""

    training: SideReport
    evaluation: SideReport
    checks: tuple[Check, ...]
    sample: str
    template_digest: str
    stop_ids: tuple[int, ...]

    @property
    def passed(self) -> bool:
        """Whether the line may go on."""
        return not any(check.stops for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """The report as JSON."""
        return {"format": 1, "passed": self.passed, **dataclasses.asdict(self)}


def validate(  # noqa: PLR0913  # all that rows are checked against
    training: Sequence[Row],
    evaluation: Sequence[Row],
    *,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    template: str,
    limits: ModelLimits | None = None,
    out: Path,
    screened: Sequence[Check] = (),
    encode: Callable[[Side], Kept] | None = None,
    on_progress: OnProgress = silent,
) -> ValidationReport:
    """Check both sides as the section ``data`` says, write report.json and data_docs/ to ``out``; stop if one failed.

    ``limits``: what the base takes; None: not compared.

    ``screened``: what `check_dropped` says of the rows that the two sides come from.

    ``encode``: gives a side's rows encoded; left out: they are encoded here, in memory.

    Raises:
        DataError: a check failed (both are written before), or rows cannot be encoded as the section says.
    """
    if not training:
        raise DataError("there are no training rows; check data.source and data.evaluation_rows")
    sides: dict[Side, Sequence[Row]] = {"training": training, "evaluation": evaluation}
    encoded = _encode(sides, encode or partial(_in_memory, sides, tokenizer, data, template, on_progress))
    checks: list[Check] = []
    for side, rows in encoded.items():
        if rows.rows:
            checks += check_encoded(side, rows, tokenizer, template=template, limits=limits)
            checks += check_texts(
                side, rows.rows, labels=data.labels, duplicates=data.duplicates, contradictions=data.contradictions
            )
            if data.labels:
                checks.append(check_labels(side, rows.rows, tokenizer, template=template, labels=data.labels))
    checks += screened
    checks.append(check_leakage(encoded["training"].rows, encoded["evaluation"].rows))
    frames = {side: _frame(rows) for side, rows in encoded.items() if rows.rows}
    checks += run_expectations(frames, data.checks, site=out / DATA_DOCS)
    report = ValidationReport(
        training=_side_report(encoded["training"], data),
        evaluation=_side_report(encoded["evaluation"], data),
        checks=tuple(checks),
        sample=marked_text(encoded["training"].encoded[0], tokenizer),
        template_digest=str(template_digest(tokenizer, template)),
        stop_ids=stop_ids(tokenizer, template=template),
    )
    write_json(out / REPORT, report.as_json())
    _stop_if_failed(report, out)
    return report


def marked_text(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> str:
    """The decoded row with ⟦ ⟧ around what is learned."""
    text = ""
    run: list[int] = []
    for at, token in enumerate(encoded.input_ids):
        run.append(token)
        if at + 1 == len(encoded.input_ids) or encoded.supervised[at + 1] != encoded.supervised[at]:
            piece = str(tokenizer.decode(run))
            text += f"⟦{piece}⟧" if encoded.supervised[at] else piece
            run = []
    return text


def _in_memory(
    sides: Mapping[Side, Sequence[Row]],
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    template: str,
    on_progress: OnProgress,
    side: Side,
) -> Kept:
    return encode_kept(
        sides[side],
        tokenizer,
        template=template,
        max_tokens=data.max_tokens,
        overlength=data.overlength,
        on_progress=on_progress,
    )


def _encode(sides: Mapping[Side, Sequence[Row]], encode: Callable[[Side], Kept]) -> dict[Side, EncodedRows]:
    """Rows of both sides; what is wrong with either is told together."""
    found: dict[Side, EncodedRows] = {}
    problems = []
    for side, rows in sides.items():
        try:
            found[side] = encode(side).of(rows)
        except DataError as error:
            problems.append(f"{side} rows: {error}")
    if problems:
        raise DataError("\n".join(problems))
    return found


def _frame(rows: EncodedRows) -> pandas.DataFrame:
    """What expectations see: one row each, with `prompt` and `completion` as they are written."""
    return pandas.DataFrame(
        {
            LINE: [row.source_line for row in rows.rows],
            "prompt": [row.prompt for row in rows.rows],
            "completion": [row.answer for row in rows.rows],
            "turns": [len(row.messages) for row in rows.rows],
            "tokens": rows.columns.lengths.tolist(),
            "supervised_tokens": rows.columns.count_learned().tolist(),
        }
    )


def _side_report(rows: EncodedRows, data: Data) -> SideReport:
    answers = Counter(row.answer.strip() for row in rows.rows) if data.labels is not None else {}
    return SideReport(
        rows=len(rows.rows),
        tokens=_distribution(rows.columns.lengths.tolist()),
        supervised_tokens=_distribution(rows.columns.count_learned().tolist()),
        truncated_lines=rows.truncated_lines,
        dropped_lines=rows.dropped_lines,
        answers=dict(sorted(answers.items())),
    )


def _distribution(values: Sequence[int]) -> Distribution | None:
    if not values:
        return None
    width = max(1, -(-(max(values) - min(values) + 1) // _BINS))
    edges = range(min(values), max(values) + width + 1, width)
    counts, _ = numpy.histogram(values, bins=list(edges))
    return Distribution(
        minimum=min(values),
        median=float(numpy.median(values)),
        maximum=max(values),
        total=sum(values),
        edges=tuple(edges),
        counts=tuple(int(count) for count in counts),
    )


def _stop_if_failed(report: ValidationReport, out: Path) -> None:
    failed = [check for check in report.checks if check.stops]
    if not failed:
        return
    reasons = "\n  ".join(
        f"{check.name} ({check.side}): {check.detail}" + (f" [{name_lines(check.lines)}]" if check.lines else "")
        for check in failed
    )
    raise DataError(
        f"{len(failed)} of {len(report.checks)} data checks failed:\n  {reasons}\n"
        f"all rows at fault stand in {out / REPORT}, and a page in {out / DATA_DOCS / 'index.html'}"
    )
