"""The plan of a pipeline's training: coverage, rows, checks, memory, time, and what can serve the adapter.

No weights are loaded. Rows that are not on this machine are assumed to be as long as ``data.max_tokens`` allows.
"""

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from graftline.data import near, records, row_keys, rows, split
from graftline.data.checks import Check, check_encoded
from graftline.data.class_rows import class_rows
from graftline.data.columns import EncodedColumns, Integers
from graftline.data.encoding import encode_rows, fit_declared
from graftline.data.row_file import RowFile
from graftline.data.split import hold_out
from graftline.data.template import Encoded
from graftline.data.validation import marked_text
from graftline.digest import atomic_write, of_file, of_json
from graftline.export.targets import Compatibility, Target, check_planned
from graftline.logs import OnProgress, silent
from graftline.plan.base_limits import model_limits
from graftline.plan.experts import check_experts
from graftline.plan.preflight import TrainingPlan, plan
from graftline.plan.resources import STAGES, Origin, StageNeeds, needs, table, this_machine
from graftline.plan.served import check_served, layer_names, own_server
from graftline.plan.stage_memory import StageMemory, stage_memory
from graftline.settings.channels import Channel
from graftline.settings.model import Pipeline
from graftline.train.devices import free_bytes, resolve_device
from graftline.train.distributed import processes_here
from graftline.train.preferences import interleaved
from graftline.weights.quant.scheme import plan_of


@dataclass(frozen=True)
class FetchedRows:
    """The rows as tokens: fetched, or as they will be."""

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
    """None: the rows are assumed; they need not be fetched, see ``not_fetched``."""
    targets: tuple[Compatibility, ...]
    resources: tuple[StageNeeds, ...]
    """What every stage takes of this machine."""
    stages: tuple[StageMemory, ...]
    """Memory of the other stages that compute with a model."""
    free: int
    """Free memory of the device now; a stage in one process may have all of it."""
    not_fetched: str = ""
    """Where nothing is fetched: what the rows are taken from, or why they are assumed."""

    def text(self) -> str:
        """For a terminal."""
        lines = [self.training.text(), ""]
        if self.not_fetched:
            lines.append(f"rows are not fetched: {self.not_fetched}")
        if self.fetched is None:
            lines.append("each row is taken to have data.max_tokens tokens, all supervised")
        else:
            lines.append(f"rows cut short: {self.fetched.truncated}, left out: {self.fetched.dropped}")
            lines += [f"{'✓' if check.passed else '✗'} {check.name}: {check.detail}" for check in self.fetched.checks]
            lines.append(f"one row, with what is learned in brackets:\n{self.fetched.sample}")
        lines.append("")
        for found in self.targets:
            lines.append(f"{found.target}: {found.command if found.loads else 'no: ' + '; '.join(found.reasons)}")
        return "\n".join([*lines, "", *self._stages(), "", table(self.resources)])

    def _stages(self) -> list[str]:
        total, free = self.training.memory.total, self.free

        def there(one: StageMemory) -> int:
            if one.stage == "train":
                return self.training.available_bytes
            return free_bytes("cpu") if one.in_main_memory else free

        several = self.training.memory.processes > 1
        what = f"see above; each of {self.training.memory.processes} processes" if several else "see above"
        shown = [*self.stages, StageMemory("train", total.low, total.expected, what)]
        verdicts = {True: "fits", False: "does NOT fit"}
        rows = [
            f"  {one.stage:<10}{one.expected / 1e9:>9.3f}  {verdicts[one.expected <= there(one)]:<14}{one.what}"
            for one in sorted(shown, key=lambda one: STAGES.index(one.stage))
        ]
        return [f"peak of each stage, GB ({free / 1e9:.3f} free on this device)", *rows]

    def document(self) -> dict[str, Any]:
        """As JSON."""
        targets = [{"loads": found.loads, **asdict(found)} for found in self.targets]
        return {
            "format": 1,
            **self.training.document(),
            "fetched": self.fetched and self.fetched.document(),
            "not_fetched": self.not_fetched or None,
            "targets": targets,
            "resources": {one.stage: one.document() for one in self.resources},
            "stages": {
                one.stage: {"low_bytes": round(one.low), "expected_bytes": round(one.expected)} for one in self.stages
            },
        }


def plan_pipeline(
    pipeline: Pipeline,
    config: PretrainedConfig,
    fetched: FetchedRows | None,
    *,
    origin: Origin,
    not_fetched: str = "",
    channel: Channel | None = None,
) -> PipelinePlan:
    """Plan a pipeline's training.

    Args:
        pipeline: the settings.
        config: of the base.
        fetched: the rows to train on; None: they are not known, and each is taken to be as long as allowed.
        origin: where values of ``resources`` were given.
        not_fetched: where nothing is fetched: what the rows are taken from, or why they are not known.
        channel: the one that the pipeline releases into, which may say what serves it.

    Raises:
        DataError, AdapterError, TrainError: the training would be refused.
        ConfigError: the server in ``base.served_by``, or in the channel's, cannot serve this; or the base has experts,
            and a setting is not for them.
    """
    check_experts(pipeline, config)
    check_served(pipeline, config, channel=channel)
    spec, is_quantized = pipeline.adapter, pipeline.quantize.method != "none"
    training = plan(
        config,
        fetched.encoded if fetched else assumed_rows(pipeline),
        settings=pipeline.train,
        adapter=spec,
        # For a mixture the largest scheme, to be on the safe side.
        quantization=plan_of(pipeline.quantize).default if is_quantized else None,
    )
    layers = layer_names(config, spec)
    targets = [own_server(config, spec, layers)]
    targets += [check_planned(spec, layers, is_quantized=is_quantized, target=target) for target in get_args(Target)]
    on_cpu = resolve_device(pipeline.train.device) == "cpu"
    here = processes_here(pipeline.train.processes)
    training_gb = here * training.memory.total.expected / 1e9 if on_cpu else None
    taken = needs(pipeline, this_machine(), origin=origin, training_gb=training_gb)
    device = resolve_device(pipeline.train.device)
    stages = stage_memory(pipeline, config, device)
    return PipelinePlan(training, fetched, tuple(targets), tuple(taken), tuple(stages), free_bytes(device), not_fetched)


def look_at(
    pipeline: Pipeline,
    file: RowFile,
    whole: EncodedColumns,
    base: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cache: Path,
) -> FetchedRows:
    """What the rows of a file that are trained on look like as tokens of the base in a folder.

    Args:
        pipeline: the settings.
        file: the rows.
        whole: the same rows encoded.
        base: the folder.
        tokenizer: what encoded them.
        cache: where encodings lie by content.

    Raises:
        DataError: rows are too long where that is an error, or too few.
    """
    template = pipeline.base.template
    trained, _ = trained_and_held_out(pipeline, file, whole, cache=cache)
    found = fit_declared(whole.take(trained), pipeline.data).of(file.take(trained))
    encoded: Sequence[Encoded] = found.encoded
    if pipeline.train.objective.on_pairs:
        encoded = pairs_of(pipeline, file, found.columns, tokenizer)
    return FetchedRows(
        truncated=len(found.truncated_lines),
        dropped=len(found.dropped_lines),
        checks=tuple(
            check_encoded(
                "training",
                found,
                tokenizer,
                template=template,
                limits=model_limits(pipeline, base, tokenizer),
                special_tokens=pipeline.data.special_tokens,
            )
        ),
        sample=marked_text(found.encoded[0], tokenizer),
        encoded=encoded,
    )


def trained_and_held_out(
    pipeline: Pipeline, file: RowFile, whole: EncodedColumns, *, cache: Path
) -> tuple[Integers, Integers]:
    """Numbers of the rows to train on, and of those that choose the best adapter.

    All prompts are compared for the latter, once for a set of rows: the next training reads no row to know them.

    Args:
        pipeline: the settings.
        file: the rows.
        whole: the same rows encoded.
        cache: where encodings lie by content, and these numbers too.

    Raises:
        DataError: there are not so many rows.
    """
    num_rows, seed = pipeline.train.held_out_rows, pipeline.data.seed
    kept = cache / of_json(["held out", str(whole.origin), num_rows, seed, _split_code()]).hex[:32] / "held_out.npy"
    held_out: Integers | None = None
    with contextlib.suppress(OSError, ValueError, EOFError):  # made again where it cannot be read
        held_out = numpy.load(kept, allow_pickle=False)
        kept.parent.touch()  # encodings that nobody uses are removed
    if held_out is None:
        held_out = hold_out(file, num_rows, seed=seed)
        if num_rows:
            with atomic_write(kept) as stream:
                numpy.save(stream, held_out)
    return numpy.setdiff1d(numpy.arange(len(whole)), held_out, assume_unique=True), held_out


@functools.cache
def _split_code() -> list[str]:
    """The code that decides which rows are held out, to the letter."""
    return [str(of_file(Path(str(module.__file__)))) for module in (near, records, row_keys, rows, split)]


def pairs_of(
    pipeline: Pipeline,
    file: RowFile,
    chosen: EncodedColumns,
    tokenizer: PreTrainedTokenizerBase,
    on_progress: OnProgress = silent,
) -> EncodedColumns:
    """The chosen answers with the rejected one behind each; a pair of which one is dropped as too long has none.

    Raises:
        DataError: a rejected answer cannot be encoded, or is too long where that is an error.
    """
    kept = set(chosen.lines.tolist())
    rejected = encode_rows(
        [row.with_rejected for row in file if row.source_line in kept],
        tokenizer,
        template=pipeline.base.template,
        max_tokens=pipeline.data.max_tokens,
        overlength=pipeline.data.overlength,
        on_progress=on_progress,
    ).columns
    both = numpy.isin(chosen.lines, rejected.lines)
    return interleaved(chosen.take(numpy.flatnonzero(both)), rejected)


def classes_of(
    pipeline: Pipeline, file: RowFile, kept: EncodedColumns, tokenizer: PreTrainedTokenizerBase
) -> EncodedColumns:
    """The prompts of the rows ``kept`` with the class of each, in the file's order.

    Raises:
        DataError: an answer is not among `data.labels`.
    """
    lines = set(kept.lines.tolist())
    return class_rows(
        [row for row in file if row.source_line in lines],
        tokenizer,
        template=pipeline.base.template,
        labels=pipeline.data.labels or (),
    )


def assumed_rows(pipeline: Pipeline) -> list[Encoded]:
    """Rows as long as the pipeline allows, all supervised, until some are fetched; two for each pair."""
    data, train = pipeline.data, pipeline.train
    row = Encoded([0] * data.max_tokens, [False] + [True] * (data.max_tokens - 1))
    return [row] * (data.max_rows or train.batch_size * train.gradient_accumulation) * train.objective.rows_each
