"""The check of the fetched rows, before anything is computed with them."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from graftline import settings
from graftline.data.checks import Side, check_dropped
from graftline.data.columns import open_columns
from graftline.data.encoding import Kept, encode_file, fit_declared, publish
from graftline.data.mixing import Span
from graftline.data.preparation import ENCODED, EVALUATION, TRAINING
from graftline.data.row_file import RowFile
from graftline.data.validation import validate
from graftline.logs import Reporter
from graftline.plan.base_limits import model_limits
from graftline.weights.model_folder import load_tokenizer

logger = logging.getLogger("graftline")


def place_of_lines(record: Mapping[str, Any]) -> Callable[[int], str]:
    """Where to look for a line of the source: of one file its number, of several the file and the line in it.

    ``record``: what the fetch stage wrote.
    """
    spans = [Span(**each) for each in record.get("files_of_lines", ())]
    return lambda line: next((span.place(line) for span in spans if line <= span.last), str(line))


def check_rows(pipeline: settings.Pipeline, *, base: Path, rows: Path, cache: Path, out: Path) -> None:
    """Check both splits against the template, the declared expectations and each other; write the report and Data Docs.

    Args:
        pipeline: its ``data`` and its template are used.
        base: folder with the tokenizer.
        rows: folder with train.jsonl, evaluation.jsonl and data.json.
        cache: where encodings lie by content; a killed one is continued there.
        out: folder for report.json, data_docs/ and encoded/, the columns of both sides (`graftline.data.columns`).

    Raises:
        DataError: a check failed.
    """
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

    report = validate(
        list(files["training"]),
        list(files["evaluation"]),
        tokenizer=tokenizer,
        data=pipeline.data,
        template=pipeline.base.template,
        limits=model_limits(pipeline, base, tokenizer),
        out=out,
        screened=check_dropped(left_out["dropped"], left_out["near"], place=place_of_lines(left_out)),
        encode=encode,
    )
    tokens = report.training.supervised_tokens
    logger.info("%d checks passed; %d supervised tokens to train on", len(report.checks), tokens.total if tokens else 0)
