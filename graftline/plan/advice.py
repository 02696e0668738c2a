"""Which adapter, rank, bits and learning rate a pipeline should use: the study's first that fits the budget."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from graftline.data.template import Encoded
from graftline.plan.evidence import Arm, Evidence, read_evidence, yaml_lines
from graftline.plan.pipeline import assumed_rows
from graftline.plan.preflight import duration
from graftline.plan.recommend import ArmAssessment, Budget, NearestMiss, Recommendation, document, recommend
from graftline.settings import Adapter, Channel, Pipeline, Quantize
from graftline.settings.channels import Document
from graftline.settings.rules import find_problems

_BASIS = {
    "measured": "by a step of two of its blocks, measured on this {device} now",
    "relation": "rough: by a small Llama's step on this {device}, as two of its blocks are too large to try",
}


@dataclass(frozen=True)
class PipelineAdvice:
    """A recommendation for one pipeline."""

    name: str
    """The pipeline's."""
    made: Recommendation
    evidence: Evidence
    differences: tuple[str, ...]
    """The keys in which the pipeline differs from the choice."""
    is_fetched: bool
    """False: the rows are assumed."""

    def text(self) -> str:
        """The recommendation for a terminal."""
        made = self.made
        lines = [*self._headline(), "", *self._budget(), ""]
        if made.choice:
            lines += [*self._why(made.choice.arm), ""]
        if made.passed_over:
            lines += [
                "passed over",
                *[f"  {assessment.arm.name}: {assessment.against}" for assessment in made.passed_over],
                "",
            ]
        if made.not_looked_at:
            lines += [f"less preferred, not looked at: {', '.join(arm.name for arm in made.not_looked_at)}", ""]
        arm = made.choice.arm if made.choice else made.nearest.assessment.arm if made.nearest else None
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
            yield "  nothing of it fits this base"
            return
        yield f"  nearest: {made.nearest.assessment.arm.name} ({made.nearest.assessment.arm.describe()})"
        yield from self._cost(made.nearest.assessment)
        yield from self._changes(made.nearest)

    def _cost(self, assessment: ArmAssessment) -> Iterator[str]:
        if assessment.memory:
            total = assessment.memory.total
            low, expected, high = (f"{value / 1e9:.3f}" for value in (total.low, total.expected, total.high))
            yield f"  memory  expected {expected} GB (low {low}, high {high})"
        if assessment.time:
            work = f"{self.made.num_steps} steps of about {self.made.tokens_per_step:.0f} tokens"
            yield f"  time    {assessment.time.text()} for {work}"
            yield f"          ({_BASIS[assessment.time.basis].format(device=self.made.device)})"
        elif assessment.against is None:
            yield "  time    unknown: this machine has no memory for a short step that would tell"

    def _changes(self, nearest: NearestMiss) -> Iterator[str]:
        if nearest.changes:
            yield f"  {'it comes closer' if nearest.missing else 'it fits'} with {'; '.join(nearest.changes)}"
        if nearest.missing:
            yield f"  {nearest.missing}"
        elif nearest.assessment.memory and nearest.memory != nearest.assessment.memory.total:
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
    """An arm's sections as lines of pipelines.yaml, below a pipeline's name."""
    return [
        line
        for name, section in arm.sections().items()
        for line in (f"    {name}:", *[f"      {line}" for line in yaml_lines(section)])
    ]


def advise(
    name: str,
    pipeline: Pipeline,
    config: PretrainedConfig,
    rows: Sequence[Encoded] | None,
    *,
    budget: Budget,
) -> PipelineAdvice:
    """Recommend what to train for a pipeline; without ``rows``, each is assumed to be as long as allowed.

    Raises:
        DataError, TrainError: any training would be refused, or the evidence cannot be read.
    """
    evidence = read_evidence()
    made = recommend(
        config,
        assumed_rows(pipeline) if rows is None else rows,
        evidence=evidence,
        settings=pipeline.train,
        budget=budget,
        barred=dict(_barred(pipeline, evidence)),
    )
    assessment = made.choice or (made.nearest and made.nearest.assessment)
    differences = tuple(_differences(pipeline, assessment.arm)) if assessment else ()
    return PipelineAdvice(name, made, evidence, differences, is_fetched=rows is not None)


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
    """Arms that do not go with the rest of the pipeline, and why."""
    for arm in evidence.arms:
        document = Document(pipelines={"it": with_arm(pipeline, arm)}, channels={pipeline.release.channel: Channel()})
        for problem in find_problems(document)[:1]:
            yield arm.name, f"{'.'.join(map(str, problem.path[2:]))}: {problem.message}"


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
