"""Stage validate: the rows against declared expectations, the template, labels, leakage between the two sides.

Writes ``report.json`` and ``data_docs/index.html``. A failing check names its rows and stops the line.
"""

import json

from graftline.data.checks import check_dropped
from graftline.data.expectations import Expectation
from graftline.data.rows import read_rows
from graftline.data.validation import ValidationSettings, validate
from graftline.progress import Reporter
from graftline.weights.quant.load import load_tokenizer
from graftline.workflow import stage
from graftline.workflow.base import original_base
from graftline.workflow.stage import Context


def run(context: Context) -> None:
    """Check the rows before anything is spent on them."""
    data, fetched = context.pipeline.data, context.folder("fetch")
    settings = ValidationSettings(
        template=context.pipeline.base.template,
        max_tokens=data.max_tokens,
        overlength=data.overlength,
        labels=data.labels,
        expectations=tuple(Expectation(check.expectation, check.arguments) for check in data.checks),
        duplicates=data.duplicates,
        contradictions=data.contradictions,
    )
    left_out = json.loads((fetched / "data.json").read_text(encoding="utf-8"))
    report = validate(
        read_rows(fetched / "train.jsonl"),
        read_rows(fetched / "evaluation.jsonl"),
        tokenizer=load_tokenizer(original_base(context)),
        settings=settings,
        out=context.folder("validate"),
        screened=check_dropped(left_out["dropped"], left_out["near"]),
        on_progress=Reporter("encode", "rows"),
    )
    tokens = report.training.supervised_tokens
    stage.logger.info(
        "%d checks passed; %d supervised tokens to train on", len(report.checks), tokens.total if tokens else 0
    )


def main() -> None:
    """Command line."""
    stage.main("validate", run)


if __name__ == "__main__":
    main()
