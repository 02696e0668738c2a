"""Which adapter, rank, bits and learning rate to take for a pipeline: the first of the study's that fits the budget.

No stage of the line: it writes nothing, and no weights are loaded. Base and rows are found as for ``graftline plan``.

    graftline recommend wordnet-category
    graftline recommend wordnet-category --memory 4 --minutes 30
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftline.data.template import Encoded
from graftline.plan.evidence import Arm, Evidence, read_evidence, yaml_lines
from graftline.plan.preflight import duration
from graftline.plan.recommend import Budget, Look, Nearest, Recommendation, document, recommend
from graftline.settings import Adapter, Channel, Pipeline, Quantize
from graftline.settings.model import Document
from graftline.settings.rules import find_problems
from graftline.weights.quant.load import load_tokenizer
from graftline.workflow import stage
from graftline.workflow.base import original_base
from graftline.workflow.plan import assumed_rows, base_config
from graftline.workflow.rows import encode, training_rows
from graftline.workflow.stage import Context

_BASIS = {
    "measured": "by a step of two of its blocks, measured on this {device} now",
    "relation": "rough: by a small Llama's step on this {device}, as two of its blocks are too large to try",
}


@dataclass(frozen=True)
class Advice:
    """A recommendation for one pipeline."""

    name: str
    """The pipeline's."""
    made: Recommendation
    evidence: Evidence
    differences: tuple[str, ...]
    """What the pipeline says otherwise than the choice, a key each."""
    is_fetched: bool
    """False: the rows are assumed."""

    def text(self) -> str:
        """One page for a terminal."""
        made = self.made
        lines = [*self._headline(), "", *self._budget(), ""]
        if made.choice:
            lines += [*self._why(made.choice.arm), ""]
        if made.passed_over:
            lines += ["passed over", *[f"  {look.arm.name}: {look.against}" for look in made.passed_over], ""]
        if made.not_looked_at:
            lines += [f"less preferred, not looked at: {', '.join(arm.name for arm in made.not_looked_at)}", ""]
        arm = made.choice.arm if made.choice else made.nearest.look.arm if made.nearest else None
        if arm:
            lines += [f"in pipelines.yaml, {self.name} (the other keys of train: stay)", *snippet(arm), ""]
            lines += [
                f"what {self.name} says now",
                *[f"  {difference}" for difference in self.differences or ["the same"]],
            ]
        return "\n".join(lines).rstrip()

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {"pipeline": self.name, **document(self.made, self.evidence), "differences": list(self.differences)}

    def _headline(self) -> Iterator[str]:
        made = self.made
        if made.choice:
            yield f"{self.name}: take {made.choice.arm.name} ({made.choice.arm.describe()})"
            yield from self._cost(made.choice)
            return
        yield f"{self.name}: nothing that the study tried fits"
        if made.nearest is None:
            yield "  none of it goes on this base"
            return
        yield f"  nearest: {made.nearest.look.arm.name} ({made.nearest.look.arm.describe()})"
        yield from self._cost(made.nearest.look)
        yield from self._changes(made.nearest)

    def _cost(self, look: Look) -> Iterator[str]:
        if look.memory:
            total = look.memory.total
            low, expected, high = (f"{value / 1e9:.3f}" for value in (total.low, total.expected, total.high))
            yield f"  memory  expected {expected} GB (low {low}, high {high})"
        if look.time:
            work = f"{self.made.num_steps} steps of about {self.made.tokens_per_step:.0f} tokens"
            yield f"  time    {look.time.text()} for {work}"
            yield f"          ({_BASIS[look.time.basis].format(device=self.made.device)})"
        elif look.against is None:
            yield "  time    unknown: this machine has no memory for a short step that would tell"

    def _changes(self, nearest: Nearest) -> Iterator[str]:
        if nearest.changes:
            yield f"  {'it comes closer' if nearest.missing else 'it fits'} with {'; '.join(nearest.changes)}"
        if nearest.missing:
            yield f"  {nearest.missing}"
        elif nearest.look.memory and nearest.memory != nearest.look.memory.total:
            yield f"  it then takes {nearest.memory.expected / 1e9:.3f} GB"

    def _budget(self) -> Iterator[str]:
        made, budget = self.made, self.made.budget
        memory = f"free on this {made.device} now (--memory GB for another)"
        if budget.memory_bytes is not None:
            is_more = made.memory_limit > made.free_bytes
            memory = f"--memory{f'; only {made.free_bytes / 1e9:.3f} GB are free here now' if is_more else ''}"
        time = "no limit (--minutes M for one)" if budget.seconds is None else f"{duration(budget.seconds)}: --minutes"
        yield "budget"
        yield f"  memory  {made.memory_limit / 1e9:.3f} GB: {memory}"
        yield f"  time    {time}"
        if not self.is_fetched:
            yield "  rows    not fetched: each is taken to have data.max_tokens tokens, all supervised"

    def _why(self, arm: Arm) -> Iterator[str]:
        yield f"why {arm.name}"
        yield f"  {arm.found}"
        tried = ", ".join(f"{rate:g}" for rate in arm.learning_rates_tried)
        yield f"  learning rate {arm.learning_rate:g}: {f'the best of {tried}' if tried else 'no other was compared'}"
        yield from (f"  {link}" for link in self.evidence.links(arm))


def snippet(arm: Arm) -> list[str]:
    """An arm's sections as they stand in pipelines.yaml, below a pipeline's name."""
    return [
        line
        for name, section in arm.sections().items()
        for line in (f"    {name}:", *[f"      {line}" for line in yaml_lines(section)])
    ]


def make(context: Context, *, budget: Budget, config_file: Path | None = None) -> Advice:
    """Recommend what to train for a pipeline.

    Args:
        context: the pipeline.
        budget: what its training may take.
        config_file: a config.json to plan with in place of the fetched base.

    Raises:
        ConfigError: nothing was fetched and no ``config_file`` is given, or it is none.
        DataError, TrainError: what any training would stop at, or evidence that cannot be read.
    """
    evidence = read_evidence()
    made = recommend(
        base_config(context, config_file),
        assumed_rows(context) if config_file else _fetched_rows(context),
        evidence=evidence,
        settings=context.pipeline.train,
        budget=budget,
        barred=dict(_barred(context.pipeline, evidence)),
    )
    look = made.choice or (made.nearest and made.nearest.look)
    differences = tuple(_differences(context.pipeline, look.arm)) if look else ()
    return Advice(context.name, made, evidence, differences, is_fetched=config_file is None)


def with_arm(pipeline: Pipeline, arm: Arm) -> Pipeline:
    """The pipeline as it would be with an arm's sections."""
    sections = arm.sections()
    return pipeline.model_copy(
        update={
            "quantize": Quantize(**sections["quantize"]),
            "adapter": arm.adapter,
            "train": pipeline.train.model_copy(update=sections["train"]),
        }
    )


def _barred(pipeline: Pipeline, evidence: Evidence) -> Iterator[tuple[str, str]]:
    """Arms that the rest of the pipeline would not accept, with the first thing that it says."""
    for arm in evidence.arms:
        document = Document(pipelines={"it": with_arm(pipeline, arm)}, channels={pipeline.release.channel: Channel()})
        for problem in find_problems(document)[:1]:
            yield arm.name, f"{'.'.join(map(str, problem.path[2:]))}: {problem.message}"


def _fetched_rows(context: Context) -> list[Encoded]:
    return list(encode(context, training_rows(context)[0], load_tokenizer(original_base(context))).encoded)


def _differences(pipeline: Pipeline, arm: Arm) -> Iterator[str]:
    changed = with_arm(pipeline, arm)
    now: tuple[Quantize | Adapter, ...] = (pipeline.quantize, pipeline.adapter)
    for name, before, after in zip(("quantize", "adapter"), now, (changed.quantize, changed.adapter), strict=True):
        for key, value in before.model_dump().items():
            new = getattr(after, key)
            if value != new:
                left_out = "" if key in after.model_fields_set else " (by default: leave the key out)"
                yield f"{name}.{key}: {_shown(value)}, recommended {_shown(new)}{left_out}"
    if pipeline.train.learning_rate != arm.learning_rate:
        yield f"train.learning_rate: {pipeline.train.learning_rate:g}, recommended {arm.learning_rate:g}"


def _shown(value: object) -> str:
    return str(value) if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m graftline.workflow.recommend", description=make.__doc__)
    parser.add_argument("pipeline", help="a name from pipelines.yaml")
    parser.add_argument("--memory", type=float, metavar="GB", help="10^9 bytes; by default what is free now")
    parser.add_argument("--minutes", type=float, metavar="M", help="by default no limit")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a config.json in place of the fetched base")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    args = parser.parse_args()

    def show(context: Context) -> None:
        memory_bytes = None if args.memory is None else 1e9 * args.memory
        seconds = None if args.minutes is None else 60 * args.minutes
        made = make(context, budget=Budget(memory_bytes=memory_bytes, seconds=seconds), config_file=args.config)
        print(json.dumps(made.document(), ensure_ascii=False, indent=2) if args.json else made.text())
        if made.made.choice is None:
            sys.exit(1)

    stage.run_guarded("recommend", args.pipeline, show, measure=False)


if __name__ == "__main__":
    main()
