"""What a training will take, before anything is spent: coverage, rows, checks, memory, time, who can serve it.

No stage of the line: it writes nothing, and no weights are loaded. Rows and base are those that were fetched; before
that, ``--config`` gives the base's config.json, and every row is taken to be as long as ``data.max_tokens`` allows.

    graftline plan wordnet-category
    graftline plan wordnet-category --config config.json --json
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from graftline.adapters.attach import plan_layers
from graftline.data.checks import Check, check_encoded
from graftline.data.template import Encoded, EncodedRows
from graftline.data.validation import marked_text
from graftline.errors import ConfigError
from graftline.export.targets import Compatibility, Target, check_planned
from graftline.plan.preflight import Plan, plan
from graftline.weights.config import read_config
from graftline.weights.quant.load import load_tokenizer
from graftline.weights.quant.plan import plan_of
from graftline.workflow import stage
from graftline.workflow.base import original_base
from graftline.workflow.rows import encode, model_limits, training_rows
from graftline.workflow.stage import Context


@dataclass(frozen=True)
class FetchedRows:
    """What the fetched rows look like as tokens."""

    truncated: int
    dropped: int
    checks: tuple[Check, ...]
    sample: str
    """The first row decoded, with ⟦ ⟧ around what is learned."""


@dataclass(frozen=True)
class PipelinePlan:
    """Everything that is known of a pipeline's training before it starts."""

    training: Plan
    fetched: FetchedRows | None
    """None: nothing was fetched, and the rows are assumed."""
    targets: tuple[Compatibility, ...]

    def text(self) -> str:
        """For a terminal."""
        lines = [self.training.text(), ""]
        if self.fetched is None:
            lines.append("rows are not fetched: each is taken to have data.max_tokens tokens, all supervised")
        else:
            lines.append(f"rows cut short: {self.fetched.truncated}, left out: {self.fetched.dropped}")
            lines += [f"{'✓' if check.passed else '✗'} {check.name}: {check.detail}" for check in self.fetched.checks]
            lines.append(f"one row, with what is learned in brackets:\n{self.fetched.sample}")
        lines.append("")
        for found in self.targets:
            lines.append(f"{found.target}: {found.command if found.loads else 'no: ' + '; '.join(found.reasons)}")
        return "\n".join(lines)

    def document(self) -> dict[str, Any]:
        """As JSON."""
        targets = [{"loads": found.loads, **asdict(found)} for found in self.targets]
        return {
            "format": 1,
            **self.training.document(),
            "fetched": self.fetched and asdict(self.fetched),
            "targets": targets,
        }


def make(context: Context, *, config_file: Path | None = None) -> PipelinePlan:
    """Plan a pipeline's training.

    Args:
        context: the pipeline.
        config_file: a config.json to plan with in place of the fetched base.

    Raises:
        ConfigError: nothing was fetched and no ``config_file`` is given, or it is none.
        DataError, AdapterError, TrainError: what the training would stop at.
    """
    pipeline, spec = context.pipeline, context.pipeline.adapter
    is_quantized = pipeline.quantize.method != "none"
    config, found = base_config(context, config_file), None if config_file else _encode(context)
    training = plan(
        config,
        found[0].encoded if found else assumed_rows(context),
        settings=context.pipeline.train,
        adapter=spec,
        # Of a mixture the largest scheme: the plan is then on the safe side.
        quantization=plan_of(pipeline.quantize).default if is_quantized else None,
    )
    with torch.device("meta"):
        layers = plan_layers(AutoModelForCausalLM.from_config(config), spec)
    targets = [check_planned(spec, layers, is_quantized=is_quantized, target=target) for target in get_args(Target)]
    return PipelinePlan(training, found[1] if found else None, tuple(targets))


def base_config(context: Context, config_file: Path | None) -> PretrainedConfig:
    """The fetched base's configuration, or that of a file.

    Raises:
        ConfigError: neither is there, or the file is none.
    """
    if config_file is None:
        if not (context.folder("fetch") / "base.json").is_file():
            raise ConfigError(
                f"{context.name} has not been fetched; run `graftline fetch {context.name}`, or give the base's "
                "config.json with --config"
            )
        return read_config(original_base(context))
    try:
        document = json.loads(config_file.read_bytes())
        if not isinstance(document, dict) or "model_type" not in document:
            raise ValueError("a JSON object with model_type is expected")
        return AutoConfig.from_pretrained(config_file, trust_remote_code=False)
    except Exception as error:  # each class has checks of its own, and their errors have no nearer common root
        raise ConfigError(f"{config_file} cannot be read as a model's config.json: {error}") from error


def _encode(context: Context) -> tuple[EncodedRows, FetchedRows]:
    tokenizer = load_tokenizer(original_base(context))
    rows = encode(context, training_rows(context)[0], tokenizer)
    limits = model_limits(context, tokenizer)
    checks = check_encoded("training", rows, tokenizer, template=context.pipeline.base.template, limits=limits)
    sample = marked_text(rows.encoded[0], tokenizer)
    return rows, FetchedRows(len(rows.truncated_lines), len(rows.dropped_lines), tuple(checks), sample)


def assumed_rows(context: Context) -> list[Encoded]:
    """Rows as long as the pipeline allows, all supervised: before any are fetched."""
    data, train = context.pipeline.data, context.pipeline.train
    row = Encoded([0] * data.max_tokens, [False] + [True] * (data.max_tokens - 1))
    return [row] * (data.max_rows or train.batch_size * train.gradient_accumulation)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m graftline.workflow.plan", description=make.__doc__)
    parser.add_argument("pipeline", help="a name from pipelines.yaml")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a config.json in place of the fetched base")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    args = parser.parse_args()

    def show(context: Context) -> None:
        made = make(context, config_file=args.config)
        print(json.dumps(made.document(), ensure_ascii=False, indent=2) if args.json else made.text())

    stage.run_guarded("plan", args.pipeline, show, measure=False)


if __name__ == "__main__":
    main()
