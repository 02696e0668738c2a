"""What objective ``classify`` cannot be combined with, each with the way out."""

from collections.abc import Iterator

from graftline.settings.channels import Document
from graftline.settings.model import Pipeline
from graftline.settings.tree import Path

WRITING = ("answers", "forgetting", "harness", "latency_tokens", "engine")
"""Parts of an evaluation that ask a model for text, or for likelihoods of text."""


def classify_problems(pipeline: Pipeline, document: Document) -> Iterator[tuple[Path, str]]:
    """Reasons why an adapter with a head for classes could not be trained, judged or served, as place and message."""
    if not pipeline.train.objective.classifies:
        return
    data, train, adapter = pipeline.data, pipeline.train, pipeline.adapter
    if data.labels is None and not data.holds_pairs:
        yield ("data", "labels"), "missing; objective classify chooses among a fixed list of labels"
    if data.holds_pairs:
        yield ("train", "objective", "kind"), "given classify with preference pairs; write dpo, orpo or supervised"
    if data.overlength == "truncate":
        yield ("data", "overlength"), "given truncate, which cuts a row's label off; write drop or error"
    if adapter.method == "full":
        yield ("adapter", "method"), "given full with objective classify, whose head goes with an adapter; write lora"
    if train.sharding:
        yield ("train", "sharding"), "given true with objective classify, whose head is whole in each process; false"
    yield from _evaluated(pipeline)
    yield from _served(pipeline, document)


def _evaluated(pipeline: Pipeline) -> Iterator[tuple[Path, str]]:
    evaluate = pipeline.evaluate
    if evaluate.metric != "accuracy":
        yield ("evaluate", "metric"), f"given {evaluate.metric} with objective classify, which writes no text: accuracy"
    for name in WRITING:
        if getattr(evaluate, name) is not None:
            yield ("evaluate", name), "given with objective classify, whose adapter only chooses labels; remove it"
    if evaluate.uniform_labels:
        yield ("evaluate", "uniform_labels"), "given true with objective classify, which learns the labels' prior: off"


def _served(pipeline: Pipeline, document: Document) -> Iterator[tuple[Path, str]]:
    if pipeline.package.merged:
        yield (
            ("package", "merged"),
            "given true with objective classify: a merged model is a language model and has no place for the head, and "
            "neither have GGUF and compressed layouts; write false and serve base and adapter (graftline serve)",
        )
    policy = document.channels.get(pipeline.release.channel)
    channel: Path = ("release", "channel")
    for path, server in ((("base", "served_by"), pipeline.base.served_by), (channel, policy and policy.served_by)):
        if server == "vllm":
            yield path, "served by vllm, which loads no adapter with a head for classes; serve it with graftline serve"
