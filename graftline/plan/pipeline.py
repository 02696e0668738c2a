"""The plan of a pipeline's training: coverage, rows, checks, memory, time, and what can serve the adapter.

No weights are loaded. Until rows are fetched, each is assumed to be as long as ``data.max_tokens`` allows.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from graftline.adapters.attach import plan_layers
from graftline.data.checks import Check, check_encoded
from graftline.data.columns import EncodedColumns, Integers
from graftline.data.encoding import fit_declared
from graftline.data.row_file import RowFile
from graftline.data.split import hold_out
from graftline.data.template import Encoded
from graftline.data.validation import marked_text
from graftline.export.targets import Compatibility, Target, check_planned
from graftline.plan.base_limits import model_limits
from graftline.plan.preflight import TrainingPlan, plan
from graftline.plan.resources import Origin, StageNeeds, needs, table, this_machine
from graftline.settings.model import Pipeline
from graftline.train.devices import resolve_device
from graftline.weights.quant.scheme import plan_of


@dataclass(frozen=True)
class FetchedRows:
    """The fetched rows as tokens."""

    truncated: int
    dropped: int
    checks: tuple[Check, ...]
    sample: str
    """The first row decoded, with the learned parts in ⟦ ⟧."""
    encoded: Sequence[Encoded] = field(repr=False)

    def document(self) -> dict[str, Any]:
        """As JSON, without the tokens."""
        checks = [asdict(check) for check in self.checks]
        return {"truncated": self.truncated, "dropped": self.dropped, "checks": checks, "sample": self.sample}


@dataclass(frozen=True)
class PipelinePlan:
    """What is known of a pipeline's training before it starts."""

    training: TrainingPlan
    fetched: FetchedRows | None
    """None: the rows are assumed."""
    targets: tuple[Compatibility, ...]
    resources: tuple[StageNeeds, ...]
    """What every stage takes of this machine."""

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
        return "\n".join([*lines, "", table(self.resources)])

    def document(self) -> dict[str, Any]:
        """As JSON."""
        targets = [{"loads": found.loads, **asdict(found)} for found in self.targets]
        return {
            "format": 1,
            **self.training.document(),
            "fetched": self.fetched and self.fetched.document(),
            "targets": targets,
            "resources": {one.stage: one.document() for one in self.resources},
        }


def plan_pipeline(
    pipeline: Pipeline, config: PretrainedConfig, fetched: FetchedRows | None, *, origin: Origin
) -> PipelinePlan:
    """Plan a pipeline's training.

    Args:
        pipeline: the settings.
        config: of the base.
        fetched: the rows to train on; None: none were fetched, and each is taken to be as long as allowed.
        origin: where values of ``resources`` were given.

    Raises:
        DataError, AdapterError, TrainError: the training would be refused.
    """
    spec, is_quantized = pipeline.adapter, pipeline.quantize.method != "none"
    training = plan(
        config,
        fetched.encoded if fetched else assumed_rows(pipeline),
        settings=pipeline.train,
        adapter=spec,
        # For a mixture the largest scheme, to be on the safe side.
        quantization=plan_of(pipeline.quantize).default if is_quantized else None,
    )
    with torch.device("meta"):
        layers = plan_layers(AutoModelForCausalLM.from_config(config), spec)
    targets = [check_planned(spec, layers, is_quantized=is_quantized, target=target) for target in get_args(Target)]
    on_cpu = resolve_device(pipeline.train.device) == "cpu"
    training_gb = training.memory.total.expected / 1e9 if on_cpu else None
    taken = needs(pipeline, this_machine(), origin=origin, training_gb=training_gb)
    return PipelinePlan(training, fetched, tuple(targets), tuple(taken))


def look_at(
    pipeline: Pipeline, file: RowFile, whole: EncodedColumns, base: Path, tokenizer: PreTrainedTokenizerBase
) -> FetchedRows:
    """What the rows of a file that are trained on look like as tokens of the base in a folder.

    Args:
        pipeline: the settings.
        file: the rows.
        whole: the same rows encoded.
        base: the folder.
        tokenizer: what encoded them.

    Raises:
        DataError: rows are too long where that is an error, or too few.
    """
    template = pipeline.base.template
    trained, _ = trained_and_held_out(pipeline, file)
    found = fit_declared(whole.take(trained), pipeline.data).of(file.take(trained))
    return FetchedRows(
        truncated=len(found.truncated_lines),
        dropped=len(found.dropped_lines),
        checks=tuple(
            check_encoded(
                "training", found, tokenizer, template=template, limits=model_limits(pipeline, base, tokenizer)
            )
        ),
        sample=marked_text(found.encoded[0], tokenizer),
        encoded=found.encoded,
    )


def trained_and_held_out(pipeline: Pipeline, file: RowFile) -> tuple[Integers, Integers]:
    """Numbers of the rows to train on, and of those that choose the best adapter.

    Raises:
        DataError: there are not so many rows.
    """
    held_out = hold_out(file, pipeline.train.held_out_rows, seed=pipeline.data.seed)
    return numpy.setdiff1d(numpy.arange(len(file)), held_out, assume_unique=True), held_out


def assumed_rows(pipeline: Pipeline) -> list[Encoded]:
    """Rows as long as the pipeline allows, all supervised, until some are fetched."""
    data, train = pipeline.data, pipeline.train
    row = Encoded([0] * data.max_tokens, [False] + [True] * (data.max_tokens - 1))
    return [row] * (data.max_rows or train.batch_size * train.gradient_accumulation)
