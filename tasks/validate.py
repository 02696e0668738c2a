"""Stage validate: the rows against declared expectations, the template, labels, leakage between the two sides.

Writes ``report.json`` and ``data_docs/index.html``. A failing check names its rows and stops the line.
"""

from graftline.data.rows import read_rows
from graftline.data.validation import validate
from graftline.progress import Reporter
from graftline.weights.quant.load import load_tokenizer
from graftline.workflow import stage
from graftline.workflow.base import original_base
from graftline.workflow.stage import Context


def run(context: Context) -> None:
    """Check the rows before anything is spent on them."""
    pipeline, fetched = context.pipeline, context.folder("fetch")
    report = validate(
        read_rows(fetched / "train.jsonl"),
        read_rows(fetched / "evaluation.jsonl"),
        tokenizer=load_tokenizer(original_base(context)),
        data=pipeline.data,
        template=pipeline.base.template,
        out=context.folder("validate"),
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
