"""What a training will take, before anything is spent: coverage, supervised tokens, memory, time, who can serve it.

No stage of the line: it writes nothing. Rows and base must have been fetched, weights are not loaded.

    graftline plan wordnet-category
"""

from pathlib import Path
from typing import get_args

from transformers import AutoConfig

from graftline.adapters.attach import plan_layers
from graftline.adapters.spec import AdapterSpec
from graftline.data.rows import read_rows
from graftline.data.template import encode_rows
from graftline.data.validation import marked_text
from graftline.export.targets import Target, check_planned
from graftline.quant.load import load_skeleton, load_tokenizer
from graftline.train.preflight import plan
from tasks import stage
from tasks.base import original_base
from tasks.init import quantization_plan
from tasks.stage import Context
from tasks.train import train_settings


def run(context: Context) -> None:
    """Print the plan of a training."""
    pipeline, base = context.pipeline, original_base(context)
    tokenizer, data = load_tokenizer(base), pipeline.data
    rows = encode_rows(
        read_rows(context.folder("fetch") / "train.jsonl"),
        tokenizer,
        template=pipeline.base.template,
        max_tokens=data.max_tokens,
        overlength=data.overlength,
    )
    spec = AdapterSpec(**pipeline.adapter.model_dump())
    quantized = pipeline.quantize.method != "none"
    made = plan(
        AutoConfig.from_pretrained(base),
        rows.encoded,
        settings=train_settings(context),
        adapter=spec,
        # Of a mixture the largest scheme: the plan is then on the safe side.
        quantization=quantization_plan(pipeline.quantize).default if quantized else None,
    )
    print(made.text())
    print(f"\nrows cut short: {len(rows.truncated_lines)}, left out: {len(rows.dropped_lines)}")
    print(f"one row, with what is learned in brackets:\n{marked_text(rows.encoded[0], tokenizer)}\n")
    _print_targets(base, spec, quantized=quantized)


def _print_targets(base: Path, spec: AdapterSpec, *, quantized: bool) -> None:
    layers = plan_layers(load_skeleton(base), spec)
    for target in get_args(Target):
        found = check_planned(spec, layers, is_quantized=quantized, target=target)
        print(f"{target}: {found.command if found.loads else 'no: ' + '; '.join(found.reasons)}")


def main() -> None:
    """Command line."""
    stage.main("plan", run, measure=False)


if __name__ == "__main__":
    main()
