"""The check of the fetched rows, before anything is computed with them."""

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from graftline import settings
from graftline.data.checks import Check, Side, check_dropped, check_texts
from graftline.data.columns import open_columns
from graftline.data.encoding import Kept, encode_file, fit_declared, publish
from graftline.data.mixing import Span
from graftline.data.preparation import ENCODED, EVALUATION, RESERVE, TRAINING
from graftline.data.profile import read_suite
from graftline.data.row_file import RowFile
from graftline.data.rows import Row, read_rows
from graftline.data.validation import ValidationReport, validate
from graftline.evaluate.extraction import JsonSchema
from graftline.logs import Reporter
from graftline.plan.base_limits import model_limits
from graftline.plan.experts import check_experts
from graftline.plan.served import check_served
from graftline.weights.model_folder import load_tokenizer, read_config
from graftline.workflow.workspace import channel_of

logger = logging.getLogger("graftline")


def place_of_lines(record: Mapping[str, Any]) -> Callable[[int], str]:
    """Where to look for a line of the source: of one file its number, of several the file and the line in it.

    ``record``: what the fetch stage wrote.
    """
    spans = [Span(**each) for each in record.get("files_of_lines", ())]
    return lambda line: next((span.place(line) for span in spans if line <= span.last), str(line))


def check_json(rows: Sequence[Row], schema: JsonSchema) -> Check:
    """Whether the answers of rows, by which a model's are judged as JSON, meet the schema themselves."""
    wrong = [(line, row) for line, row in enumerate(rows, start=1) if schema.parse(row.answer) is None]
    about = f"{schema.path.name}, such as {wrong[0][1].answer.strip()[:80]!r}" if wrong else schema.path.name
    detail = f"{len(wrong)} of {len(rows)} answers are not JSON that meets {about}" if wrong else f"all meet {about}"
    return Check("answers meet the JSON Schema", "evaluation", not wrong, detail, tuple(line for line, _ in wrong))


def in_colours(report: ValidationReport) -> str:
    """The report's sample with what is learned in green on a terminal, in ⟦ ⟧ elsewhere and with NO_COLOR."""
    if not sys.stderr.isatty() or os.environ.get("NO_COLOR"):
        return report.sample
    return "".join(f"\033[32m{text}\033[0m" if learned else text for text, learned in report.sample_parts)


def _screened(pipeline: settings.Pipeline, left_out: Mapping[str, Any], rows: Path, root: Path) -> list[Check]:
    """Checks of what was left out when the rows were fetched, of answers against their schema, and of the reserve."""
    checks = [*check_dropped(left_out["dropped"], left_out["near"], place=place_of_lines(left_out))]
    if pipeline.evaluate.answers and pipeline.evaluate.answers.json_schema:
        schema = JsonSchema.read(root / pipeline.evaluate.answers.json_schema)
        checks.append(check_json(RowFile(rows / EVALUATION), schema))
    return [*checks, *_check_reserve(pipeline, rows / RESERVE, root)]


def _check_reserve(pipeline: settings.Pipeline, folder: Path, root: Path) -> list[Check]:
    """Whether the rows that only promotions look at can be scored and judged; lines are those of their file."""
    if not folder.is_dir():
        return []
    rows, data, answers = read_rows(folder / EVALUATION), pipeline.data, pipeline.evaluate.answers
    found = check_texts(
        "evaluation", rows, labels=data.labels, duplicates=data.duplicates, contradictions=data.contradictions
    )
    if answers and answers.json_schema:
        found.append(check_json(rows, JsonSchema.read(root / answers.json_schema)))
    return [replace(each, name=f"{each.name} (rows kept back for promotions)") for each in found]


def check_rows(
    pipeline: settings.Pipeline,
    *,
    base: Path,
    rows: Path,
    cache: Path,
    out: Path,
    root: Path,
) -> None:
    """Check both splits against the template, the declared expectations and each other; write the report and Data Docs.

    Args:
        pipeline: its ``data`` and its template are used.
        base: folder with the tokenizer.
        rows: folder with train.jsonl, evaluation.jsonl and data.json.
        root: the project's root, with the file of ``evaluate.answers.json_schema``, which answers must meet.
        cache: where encodings lie by content; a killed one is continued there.
        out: folder for report.json, data_docs/ and encoded/, the columns of both sides (`graftline.data.columns`).

    Raises:
        DataError: a check failed.
        ConfigError: the server in ``base.served_by`` cannot serve the base, or the adapter; or the base has experts,
            and a setting is not for them.
    """
    check_experts(pipeline, read_config(base))
    check_served(pipeline, read_config(base), channel=channel_of(pipeline, root))
    tokenizer = load_tokenizer(base)
    left_out = json.loads((rows / "data.json").read_text(encoding="utf-8"))
    files: dict[Side, RowFile] = {"training": RowFile(rows / TRAINING), "evaluation": RowFile(rows / EVALUATION)}

    def encode(side: Side) -> Kept:
        made = encode_file(
            files[side],
            tokenizer,
            pipeline.data,
            template=pipeline.base.template,
            cache=cache,
            on_progress=Reporter(f"encode {side}", "rows"),
        )
        publish(made, out / ENCODED / side)
        return fit_declared(open_columns(made), pipeline.data)

    data = pipeline.data
    if data.suite:
        data = data.replace(checks=(*data.checks, *read_suite(root / data.suite)))
    report = validate(
        files["training"],
        files["evaluation"],
        tokenizer=tokenizer,
        data=data,
        template=pipeline.base.template,
        limits=model_limits(pipeline, base, tokenizer),
        out=out,
        screened=_screened(pipeline, left_out, rows, root),
        encode=encode,
    )
    if pipeline.package.show_texts:
        logger.info("the first row to train on, what is learned marked:\n%s", in_colours(report))
    tokens = report.training.supervised_tokens
    logger.info("%d checks passed; %d supervised tokens to train on", len(report.checks), tokens.total if tokens else 0)
