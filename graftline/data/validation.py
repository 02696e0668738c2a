"""Validation of the rows of a pipeline: one report, Data Docs, and a stop where something is wrong."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    check_rejected,
    check_texts,
)
from graftline.data.encoding import EncodedRows, Kept, batches, encode_kept
from graftline.data.expectations import LINE, Frames, run_expectations
from graftline.data.row_file import keys_of
from graftline.data.row_keys import Integers
from graftline.data.rows import Row
from graftline.data.template import Encoded, name_lines, stop_ids, template_digest
from graftline.digest import write_json
from graftline.errors import DataError
from graftline.logs import OnProgress, Reporter, silent
from graftline.settings.data import Data

REPORT = "report.json"
DATA_DOCS = "data_docs"
_BINS = 20
_FRAME_ROWS, _FRAME_CHARACTERS = 20_000, 50_000_000
"""Number of rows in a frame for Great Expectations."""


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
    sample_parts: tuple[tuple[str, bool], ...]
    """`sample` in pieces, each with whether it is learned."""
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
    in_memory = partial(_in_memory, tokenizer=tokenizer, data=data, template=template, on_progress=on_progress)
    encoded, rejected = _encode(sides, encode or (lambda side: in_memory(sides[side])), in_memory)
    checks: list[Check] = []
    for side, rows in rejected.items():
        checks += check_rejected(side, rows, tokenizer, template=template, limits=limits)
    for side, rows in encoded.items():
        if rows.rows:
            checks += _checks_of(side, rows, tokenizer, data, template, limits)
    checks += screened
    compare = Reporter("compare sides", "rows")
    checks.append(check_leakage(encoded["training"].rows, encoded["evaluation"].rows, on_progress=compare))
    frames: dict[Side, pandas.DataFrame | Frames] = {
        side: partial(_frames, rows) for side, rows in encoded.items() if rows.rows
    }
    checks += run_expectations(frames, data.checks, site=out / DATA_DOCS)
    report = ValidationReport(
        training=_side_report(encoded["training"], data),
        evaluation=_side_report(encoded["evaluation"], data),
        checks=tuple(checks),
        sample=marked_text(encoded["training"].encoded[0], tokenizer),
        sample_parts=tuple(learned_parts(encoded["training"].encoded[0], tokenizer)),
        template_digest=str(template_digest(tokenizer, template)),
        stop_ids=stop_ids(tokenizer, template=template),
    )
    write_json(out / REPORT, report.as_json())
    _stop_if_failed(report, out)
    return report


def _checks_of(  # all that rows are checked against
    side: Side,
    rows: EncodedRows,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    template: str,
    limits: ModelLimits | None,
) -> list[Check]:
    """Checks of one side's rows by themselves."""
    keys_of(rows.rows, on_progress=Reporter(f"check {side}", "rows"))
    checks = check_encoded(side, rows, tokenizer, template=template, limits=limits, special_tokens=data.special_tokens)
    checks += check_texts(
        side, rows.rows, labels=data.labels, duplicates=data.duplicates, contradictions=data.contradictions
    )
    if data.labels:
        checks.append(check_labels(side, rows.rows, tokenizer, template=template, labels=data.labels, limits=limits))
    return checks


def marked_text(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> str:
    """The decoded row with ⟦ ⟧ around what is learned."""
    return "".join(f"⟦{piece}⟧" if learned else piece for piece, learned in learned_parts(encoded, tokenizer))


def learned_parts(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, bool]]:
    """The decoded row in pieces, each with whether it is learned."""
    run: list[int] = []
    for at, token in enumerate(encoded.input_ids):
        run.append(token)
        if at + 1 == len(encoded.input_ids) or encoded.supervised[at + 1] != encoded.supervised[at]:
            yield str(tokenizer.decode(run)), bool(encoded.supervised[at])
            run = []


def _in_memory(
    rows: Sequence[Row], *, tokenizer: PreTrainedTokenizerBase, data: Data, template: str, on_progress: OnProgress
) -> Kept:
    return encode_kept(
        rows,
        tokenizer,
        template=template,
        max_tokens=data.max_tokens,
        overlength=data.overlength,
        on_progress=on_progress,
    )


def _encode(
    sides: Mapping[Side, Sequence[Row]], encode: Callable[[Side], Kept], in_memory: Callable[[Sequence[Row]], Kept]
) -> tuple[dict[Side, EncodedRows], dict[Side, EncodedRows]]:
    """Rows of both sides, and the rejected answers of those that are pairs; what is wrong with any is told together."""
    found: dict[Side, EncodedRows] = {}
    rejected: dict[Side, EncodedRows] = {}
    problems = []
    for side, rows in sides.items():
        try:
            found[side] = encode(side).of(rows)
        except DataError as error:
            problems.append(f"{side} rows: {error}")
        if not rows or rows[0].rejected is None:  # a file holds one format
            continue
        others = [row.with_rejected for row in rows]
        try:
            rejected[side] = in_memory(others).of(others)
        except DataError as error:
            problems.append(f"{side} rows, rejected answers: {error}")
    if problems:
        raise DataError("\n".join(problems))
    return found, rejected


def _frames(rows: EncodedRows) -> Iterator[pandas.DataFrame]:
    """What expectations see, in frames: one row each, with `prompt` and `completion` as they are written."""
    tokens, supervised, at = rows.columns.lengths, rows.columns.count_learned(), 0
    for batch in batches(rows.rows, most_rows=_FRAME_ROWS, most_characters=_FRAME_CHARACTERS):
        part, at = slice(at, at + len(batch)), at + len(batch)
        yield pandas.DataFrame(
            {
                LINE: [row.source_line for row in batch],
                "prompt": [row.prompt for row in batch],
                "completion": [row.answer for row in batch],
                "turns": [len(row.messages) for row in batch],
                "tokens": tokens[part].tolist(),
                "supervised_tokens": supervised[part].tolist(),
            }
        )


def _side_report(rows: EncodedRows, data: Data) -> SideReport:
    answers = Counter(row.answer.strip() for row in rows.rows) if data.labels is not None else {}
    return SideReport(
        rows=len(rows.rows),
        tokens=_distribution(rows.columns.lengths),
        supervised_tokens=_distribution(rows.columns.count_learned()),
        truncated_lines=rows.truncated_lines,
        dropped_lines=rows.dropped_lines,
        answers=dict(sorted(answers.items())),
    )


def _distribution(values: Integers) -> Distribution | None:
    if not len(values):
        return None
    least, most = int(values.min()), int(values.max())
    width = max(1, -(-(most - least + 1) // _BINS))
    edges = range(least, most + width + 1, width)
    counts, _ = numpy.histogram(values, bins=list(edges))
    return Distribution(
        minimum=least,
        median=float(numpy.median(values)),
        maximum=most,
        total=int(values.sum()),
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
