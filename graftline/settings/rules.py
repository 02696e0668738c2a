"""Rules across several fields: combinations that cannot work, and settings that nothing would read."""

import posixpath
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from graftline.address import mask_secrets, parse
from graftline.errors import SourceError
from graftline.settings.channels import Channel, Document, RequestLog
from graftline.settings.classify import classify_problems
from graftline.settings.data import Data
from graftline.settings.gate_metrics import (
    ALWAYS_SCORED,
    ANCHOR,
    GENERATED,
    JSON,
    MANY,
    METRICS,
    UNQUANTIZED,
    gate_problems,
    is_anchored,
    is_of_rows,
)
from graftline.settings.model import Gate, Pipeline, Quantize
from graftline.settings.tree import Path

_LOW_RANK = ("lora", "rslora", "dora", "pissa", "loftq")
_BOTTLENECK = ("houlsby", "pfeiffer")
_ADDED = (*_LOW_RANK, "vera", *_BOTTLENECK)
_READ_BY: dict[str, tuple[str, ...]] = {
    "rank": _ADDED,
    "alpha": _LOW_RANK,
    "dropout": _ADDED,
    "targets": _ADDED,
    "rank_pattern": _ADDED,
    "alpha_pattern": _LOW_RANK,
    "bias": _ADDED,
    "experts": ("lora", "rslora"),
    "modules_to_save": _ADDED,
    "svd": ("pissa", "loftq"),
    "projection_seed": ("vera",),
}
"""Adapter field to the methods that read it."""

_ROUNDING = 1e-6
"""Tolerance of a sum of shares that should be 1, such as three times 0.3333333."""


@dataclass(frozen=True)
class Problem:
    """One problem: where it is, what was given, what was expected and what to do."""

    path: Path
    message: str


def find_problems(document: Document) -> list[Problem]:
    """Every violated rule of a document whose fields are valid one by one."""
    problems = [problem for name, channel in document.channels.items() for problem in _channel(name, channel, document)]
    for name, pipeline in document.pipelines.items():
        found = [
            *_sources(pipeline),
            *_quantize(pipeline),
            *_adapter(pipeline),
            *_train(pipeline),
            *_start(pipeline),
            *_number_types(pipeline),
            *_train_place(pipeline),
            *_objective(pipeline),
            *_data(pipeline),
            *_evaluate(pipeline),
            *_gates(pipeline),
            *_package(pipeline),
            *_release(pipeline, document),
            *_resources(pipeline),
            *(Problem(path, message) for path, message in classify_problems(pipeline, document)),
        ]
        problems += [Problem(("pipelines", name, *problem.path), problem.message) for problem in found]
    return problems


def _sources(pipeline: Pipeline) -> Iterator[Problem]:
    data, forgetting = pipeline.data, pipeline.evaluate.forgetting
    places: list[tuple[Path, str, str | None]] = [(("base",), pipeline.base.source, pipeline.base.sha256)]
    if data.source is not None:
        places.append((("data",), data.source, data.sha256))
    places += [(("data", "sources", at), each.source, each.sha256) for at, each in enumerate(data.sources)]
    if data.evaluation:
        places.append((("data", "evaluation"), data.evaluation.source, data.evaluation.sha256))
    if forgetting:
        places.append((("evaluate", "forgetting"), forgetting.source, forgetting.sha256))
    for path, text, sha256 in places:
        try:
            source = parse(text)
        except SourceError as error:
            yield Problem((*path, "source"), str(error))
            continue
        is_needed = source.needs_sha256 if path == ("base",) else not source.may_move
        if is_needed and not sha256:
            yield Problem(
                (*path, "sha256"),
                f"missing; source {source.masked} needs the SHA-256 of what is downloaded, 64 hex digits",
            )
    yield from _several(data)


def _several(data: Data) -> Iterator[Problem]:
    path: Path = ("data", "sources")
    if data.source is None and not data.sources:
        yield Problem(("data", "source"), "missing; expected the address of the rows, or several in `sources`")
    if data.source is not None and data.sources:
        yield Problem(path, "given together with `source`; expected one of them: put that address into `sources` too")
    if data.source is None:
        for field in sorted({"sha256", "prepare", "format"} & data.model_fields_set):
            yield Problem(("data", field), "given beside `sources`, each of which has its own; move it there")
    given = [(each.source, each.prepare) for each in data.sources]
    for address in sorted({each[0] for each in given if given.count(each) > 1}):
        yield Problem(path, f"given {mask_secrets(address)} more than once; its rows would count twice: name it once")
    shares = [each.share for each in data.sources if each.share is not None]
    if shares and len(shares) < len(data.sources):
        yield Problem(
            path, f"{len(shares)} of {len(data.sources)} have a `share`; give every one of them a share, or none"
        )
    elif shares and abs(sum(shares) - 1) > _ROUNDING:
        yield Problem(path, f"the shares add up to {sum(shares):g}; expected 1")


def _quantize(pipeline: Pipeline) -> Iterator[Problem]:
    quantize, method = pipeline.quantize, pipeline.adapter.method
    given = quantize.model_fields_set
    if quantize.method == "none":
        for field in sorted(given - {"method"}):
            yield Problem(
                ("quantize", field), "given, but `quantize.method: none` does not read it; remove it or choose nf4"
            )
        if method == "loftq":
            yield Problem(
                ("adapter", "method"),
                "given loftq without a quantized base; write `quantize.method: nf4` or another method",
            )
        return
    if method == "full":
        yield Problem(
            ("adapter", "method"), "given full: quantized weights cannot be trained; write `quantize.method: none`"
        )
    if quantize.method == "mixed" and not quantize.bits:
        yield Problem(("quantize", "bits"), "missing; `mixed` needs layers and their bits, such as {0-7: 4, 8-29: 2}")
    for layers in quantize.bits:
        first, _, last = layers.partition("-")
        if not (first.isdecimal() and last.isdecimal()):
            yield from _pattern(("quantize", "bits"), layers)
        elif int(first) > int(last):
            yield Problem(("quantize", "bits"), f"given layers {layers}; expected the smaller number first")
    expected = {"loftq": "loftq", "pissa": "qpissa"}.get(method, "plain")
    if quantize.init_kind != expected:
        message = f"given {quantize.init_kind} with `adapter.method: {method}`; expected {expected}"
        yield Problem(("quantize", "init"), f"{message}, because base and first adapter are made together")
    yield from _unread_quantize(quantize)


def _unread_quantize(quantize: Quantize) -> Iterator[Problem]:
    given = quantize.model_fields_set
    if quantize.method != "mixed" and "bits" in given:
        yield Problem(
            ("quantize", "bits"), f"given, but only `quantize.method: mixed` reads it, not {quantize.method}; remove it"
        )
    if quantize.method == "fp8":
        for field in sorted(given & {"block_size", "double_quant"}):
            yield Problem(
                ("quantize", field), "given, but `quantize.method: fp8` has one scale a row in fp32; remove it"
            )
    if quantize.weighting != "none" and quantize.init_kind != "loftq":
        yield Problem(
            ("quantize", "init", "weighting"),
            f"given {quantize.weighting} with kind {quantize.init_kind}, but only kind loftq reads it; remove it",
        )
    if quantize.init_kind != "loftq" and "loftq_iterations" in given:
        yield Problem(("quantize", "loftq_iterations"), "given, but only `quantize.init: loftq` reads it; remove it")


def _adapter(pipeline: Pipeline) -> Iterator[Problem]:
    method = pipeline.adapter.method
    for field in sorted(pipeline.adapter.model_fields_set & _READ_BY.keys()):
        if method not in _READ_BY[field]:
            yield Problem(
                ("adapter", field),
                f"given, but method {method} does not read it, only {', '.join(_READ_BY[field])}; remove it",
            )
    adapter = pipeline.adapter
    if isinstance(adapter.targets, str) and adapter.targets != "all-linear":
        yield from _pattern(("adapter", "targets"), adapter.targets)
    for field, patterns in (("rank_pattern", adapter.rank_pattern), ("alpha_pattern", adapter.alpha_pattern)):
        for pattern in patterns:
            yield from _pattern(("adapter", field), pattern)
    if method in _BOTTLENECK and pipeline.package.merged:
        yield Problem(
            ("package", "merged"),
            f"given true with method {method}: a bottleneck cannot be folded into the base; write false",
        )


def _pattern(path: Path, pattern: str) -> Iterator[Problem]:
    try:
        with warnings.catch_warnings(action="error"):  # re warns about nested sets
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError, Warning) as error:
        yield Problem(path, f"given {pattern[:80]!r}; expected a regular expression: {error}")


def _train(pipeline: Pipeline) -> Iterator[Problem]:
    train = pipeline.train
    if train.steps is None and train.epochs is None:
        yield Problem(("train",), "neither `steps` nor `epochs` is given; expected exactly one")
    if train.steps is not None and train.epochs is not None:
        yield Problem(("train", "epochs"), "given together with `steps`; expected exactly one of them; remove one")
    if train.steps is not None and train.warmup_steps > train.steps:
        yield Problem(("train", "warmup_steps"), f"given {train.warmup_steps}; expected at most `steps`, {train.steps}")
    if train.patience and not train.evaluate_every:
        yield Problem(
            ("train", "patience"), f"given {train.patience} without `evaluate_every`, whose measurements it counts"
        )
    if train.evaluate_every and not train.held_out_rows:
        yield Problem(("train", "held_out_rows"), "missing; `evaluate_every` needs rows to look at, such as 100")
    if train.held_out_rows and not train.evaluate_every:
        yield Problem(
            ("train", "held_out_rows"), f"given {train.held_out_rows} without `evaluate_every`, which would use them"
        )
    if train.offload_activations and not train.gradient_checkpointing:
        yield Problem(
            ("train", "offload_activations"),
            "given true without `gradient_checkpointing: true`, whose kept activations it moves; write both, or false",
        )
    if train.sharding and train.processes == 1:
        yield Problem(("train", "sharding"), "given true with one process; write how many in `processes`, or false")
    if train.evaluate_every and train.sharding:
        yield Problem(
            ("train", "evaluate_every"), "given with `sharding: true`; a sharded base cannot be looked at: write 0"
        )
    yield from _changes_sharded(pipeline)


def _changes_sharded(pipeline: Pipeline) -> Iterator[Problem]:
    """What trains or changes the base's own weights needs each of them whole."""
    adapter = pipeline.adapter
    if not pipeline.train.sharding:
        return
    if adapter.method == "full" or (adapter.method == "pissa" and pipeline.quantize.method == "none"):
        yield Problem(
            ("adapter", "method"),
            f"given {adapter.method} with `train.sharding: true`; expected an adapter that leaves the base's weights "
            "as they are, such as lora: change one of them",
        )
    if adapter.bias != "none":
        yield Problem(
            ("adapter", "bias"),
            f"given {adapter.bias} with `train.sharding: true`; a sharded base is not trained: none",
        )


def _start(pipeline: Pipeline) -> Iterator[Problem]:
    start, method, init = pipeline.train.start_from, pipeline.adapter.method, pipeline.quantize.init_kind
    path: Path = ("train", "start_from")
    if start is None:
        return
    if method in ("full", "pissa", "loftq") or init != "plain":
        yield Problem(
            path,
            f"given {start} with `adapter.method: {method}` and `quantize.init: {init}`; expected an adapter that "
            "leaves its base as it is, such as lora: remove it, or change the method",
        )
    if start == "base":
        yield Problem(
            path, f"given {start}; expected production, anchor or a release's version (`graftline releases list`)"
        )


def _number_types(pipeline: Pipeline) -> Iterator[Problem]:
    train, base = pipeline.train, pipeline.quantize.method
    if train.device == "cpu" and train.precision == "fp16":
        yield Problem(("train", "precision"), "given fp16 with `device: cpu`; expected fp32, bf16 or auto")
    if train.fp8_products and base != "fp8":
        message = f"given true with `quantize.method: {base}`; expected a base in fp8: write that, or false"
        yield Problem(("train", "fp8_products"), message)
    if train.fp8_products and train.precision not in ("bf16", "auto"):
        yield Problem(("train", "fp8_products"), f"given true with `precision: {train.precision}`; expected bf16")


def _objective(pipeline: Pipeline) -> Iterator[Problem]:
    train, data, adapter = pipeline.train, pipeline.data, pipeline.adapter
    kind = train.objective.kind
    path: Path = ("train", "objective")
    if data.holds_pairs and data.labels is not None:
        yield Problem(("data", "labels"), "given with `format: preference`, whose rows have two answers; remove it")
    if "preference" in data.formats and not data.holds_pairs:
        yield Problem(
            ("data",), "some sources have `format: preference` and some have not; expected it for all of them or none"
        )
    if not train.objective.on_pairs:
        if "beta" in train.objective.model_fields_set:
            yield Problem((*path, "beta"), "given, but only kinds dpo, orpo and kto read it; remove it")
        return
    if not data.holds_pairs:
        yield Problem(
            (*path, "kind"), f"given {kind}, which needs pairs; write `data.format: preference`, for every source"
        )
    if train.objective.has_reference and adapter.method in ("full", "pissa", "loftq"):
        yield Problem(
            (*path, "kind"),
            f"given {kind} with `adapter.method: {adapter.method}`, without whose adapter there is no base to compare "
            "with; write lora, rslora, dora or vera, or `kind: orpo`",
        )
    for field in ("bias", "modules_to_save"):
        if train.objective.has_reference and getattr(adapter, field) not in ("none", ()):
            yield Problem(("adapter", field), f"given with objective {kind}, which compares with the base; remove it")
    if kind == "kto" and train.batch_size == 1:
        yield Problem(
            ("train", "batch_size"),
            "given 1 with objective kto, which needs the answers of another pair; write 2 or more",
        )
    for field in ("packing", "sharding", "evaluate_every"):
        if getattr(train, field):
            yield Problem(("train", field), f"given with objective {kind}, which does not take it; remove it")


def _train_place(pipeline: Pipeline) -> Iterator[Problem]:
    train = pipeline.train
    if train.ray_address is not None and train.engine != "ray":
        yield Problem(("train", "ray_address"), f"given, but only engine ray reads it, not {train.engine}; remove it")
    if train.checkpoints is not None:
        yield from _place(("train", "checkpoints"), train.checkpoints)
        if not train.checkpoint_every:
            yield Problem(("train", "checkpoints"), "given with `checkpoint_every: 0`, which writes none; remove one")


def _data(pipeline: Pipeline) -> Iterator[Problem]:
    data, labels = pipeline.data, pipeline.data.labels
    if pipeline.evaluate.metric == "accuracy" and not data.options:
        yield Problem(("data", "labels"), "missing; metric accuracy scores a fixed list of labels")
    if labels is not None and len(set(labels)) < len(labels):
        twice = sorted({label for label in labels if labels.count(label) > 1})
        yield Problem(("data", "labels"), f"{', '.join(twice)} is given more than once; keep one")
    blank = [label for label in labels or () if label != label.strip()]
    if blank:
        yield Problem(
            ("data", "labels"),
            f"given {', '.join(map(repr, blank))}; expected no blanks around a label: those of a row are kept anyway",
        )
    if not data.evaluation_rows and data.evaluation is None:
        yield Problem(
            ("data", "evaluation_rows"), "given 0; expected at least 1, or rows of another source in `data.evaluation`"
        )
    if not data.evaluation_rows and data.split == "newest":
        yield Problem(("data", "split"), "given newest with `evaluation_rows: 0`; nothing is split: remove it")
    kept_back = data.evaluation_rows + data.reserve_rows
    if data.max_rows is not None and kept_back >= data.max_rows:
        also = f" and {data.reserve_rows} `reserve_rows`" if data.reserve_rows else ""
        yield Problem(
            ("data", "evaluation_rows"),
            f"given {data.evaluation_rows}{also}; expected less than `max_rows`, {data.max_rows}",
        )


def _evaluate(pipeline: Pipeline) -> Iterator[Problem]:
    evaluate, method = pipeline.evaluate, pipeline.adapter.method
    rows = MANY if pipeline.data.evaluation else pipeline.data.evaluation_rows
    if evaluate.metric in GENERATED and evaluate.answers is None:
        yield Problem(
            ("evaluate", "answers"),
            f"missing; metric {evaluate.metric} compares free answers, such as max_new_tokens: 64",
        )
    if evaluate.answers and evaluate.metric in JSON and not evaluate.answers.json_schema:
        yield Problem(
            ("evaluate", "answers", "json_schema"),
            f"missing; metric {evaluate.metric} needs a JSON Schema, a file, which may hold {{}}",
        )
    for name in sorted((evaluate.answers.scores if evaluate.answers else {}).keys() & METRICS.keys()):
        yield Problem(("evaluate", "answers", "scores", name), f"given {name}, which is measured anyway; rename it")
    if evaluate.uniform_labels and pipeline.data.labels is None:
        yield Problem(("evaluate", "uniform_labels"), "given true without `data.labels`, whose prior it is about")
    for pattern in evaluate.answers.forbidden if evaluate.answers else ():
        yield from _pattern(("evaluate", "answers", "forbidden"), pattern)
    if evaluate.miub_rows is not None and evaluate.miub_rows > rows:
        yield Problem(
            ("evaluate", "miub_rows"), f"given {evaluate.miub_rows}; expected at most `data.evaluation_rows`, {rows}"
        )
    if evaluate.miub_rows is not None and method not in (*_LOW_RANK, "vera"):
        yield Problem(
            ("evaluate", "miub_rows"), f"given, but method {method} adds nothing to a layer's output; remove it"
        )
    if UNQUANTIZED in evaluate.references and (
        pipeline.quantize.method == "none" or pipeline.quantize.init_kind != "plain"
    ):
        yield Problem(
            ("evaluate", "references"),
            f"given {UNQUANTIZED} with `quantize.method: {pipeline.quantize.method}` and `quantize.init: "
            f"{pipeline.quantize.init_kind}`; expected a quantized base and init plain: with another the adapter "
            "belongs to its base alone",
        )
    for name in evaluate.references:
        if name in ALWAYS_SCORED or evaluate.references.count(name) > 1:
            yield Problem(("evaluate", "references"), f"given {name}, which is scored anyway; name each model once")


def _gates(pipeline: Pipeline) -> Iterator[Problem]:
    for name, gate in pipeline.gates.items():
        for key, message in (*_as_written(gate), *needs(gate), *gate_problems(gate, pipeline)):
            yield Problem(("gates", name, key), message)


def _as_written(gate: Gate) -> Iterator[tuple[str, str]]:
    given = gate.model_fields_set
    if gate.test == "limit":
        for key in sorted({"margin", "against"} & given):
            yield key, "given, but test limit compares with nothing; remove it"
        return
    if "margin" not in given:
        yield "margin", _missing("margin")
    if gate.limit is not None:
        yield "limit", f"given, but test {gate.test} does not read it; remove it or write `test: limit`"


def needs(gate: Gate) -> Iterator[tuple[str, str]]:
    """Reasons why a gate cannot be judged, as key and message. `graftline.evaluate.gates.judge` refuses it, too."""
    if gate.test == "limit" and gate.limit is None:
        yield "limit", "missing; test limit needs the worst value that passes"
    if gate.test != "limit" and gate.against is None:
        yield "against", _missing("against")
    if gate.test == "equivalence" and gate.margin == 0:
        yield "margin", "given 0; expected more than 0 for test equivalence"


def _missing(key: str) -> str:
    return f"missing; expected: {' '.join((Gate.model_fields[key].description or '').split())}"


def _package(pipeline: Pipeline) -> Iterator[Problem]:
    package, quantize = pipeline.package, pipeline.quantize
    for field in sorted({"merge_into", "requantize"} & package.model_fields_set):
        if not package.merged:
            yield Problem(("package", field), "given, but `package.merged: false` does not read it; remove it")
        elif quantize.method == "none":
            yield Problem(("package", field), "given, but only a quantized base reads it; remove it")
    if package.merge_into != "dequantized" and quantize.init_kind != "plain":
        message = f"given {package.merge_into} with `quantize.init: {quantize.init_kind}`; expected dequantized"
        yield Problem(("package", "merge_into"), f"{message}, because base and first adapter are made together")
    if "rounding" in package.model_fields_set and not package.requantize:
        yield Problem(("package", "rounding"), "given, but only `package.requantize: true` reads it; remove it")
    if package.requantize and quantize.method == "mixed":
        yield Problem(
            ("package", "requantize"), "given true with `quantize.method: mixed`; expected nf4, nf3, nf2 or fp8"
        )


def _release(pipeline: Pipeline, document: Document) -> Iterator[Problem]:
    release = pipeline.release
    if release.channel not in document.channels:
        known = ", ".join(document.channels)
        yield Problem(("release", "channel"), f"given {release.channel!r}; expected one of `channels`: {known}")
    yield from _place(("release", "store"), release.store)
    policy = document.channels.get(release.channel)
    if policy and pipeline.base.served_by not in (None, policy.served_by or pipeline.base.served_by):
        yield Problem(
            ("base", "served_by"),
            f"given {pipeline.base.served_by}, but `channels.{release.channel}.served_by` says {policy.served_by}; "
            "expected one server: leave one of them out",
        )
    yield from _reserve(pipeline, document)
    if pipeline.train.start_from == ANCHOR and policy is not None and not is_anchored(policy, pipeline.gates):
        yield Problem(
            ("train", "start_from"),
            f"given {ANCHOR}, but no gate compares candidates with the anchor of channel {release.channel}, which "
            f"therefore never differs from production; write production, or `channels.{release.channel}.anchor: on`",
        )
    for name, gate in pipeline.gates.items():
        if gate.against == ANCHOR and policy is not None and policy.anchor is False:
            yield Problem(
                ("gates", name, "against"),
                f"given {ANCHOR} with `channels.{release.channel}.anchor: off`; switch the anchor on, or compare with "
                "production",
            )


def _reserve(pipeline: Pipeline, document: Document) -> Iterator[Problem]:
    """Rows are kept back where a channel asks for them, and there are gates to judge by them."""
    kept, path = pipeline.data.reserve_rows, ("data", "reserve_rows")
    own = document.channels.get(pipeline.release.channel)
    if own is not None and own.reserve and not kept:
        asked = f"`channels.{pipeline.release.channel}.reserve: on`"
        yield Problem(path, f"given 0 with {asked}; write how many rows only promotions look at, such as 300")
    if kept and not any(channel.reserve for channel in document.channels.values()):
        yield Problem(
            path, f"given {kept}, and no channel asks for them; write `reserve: on` in the channel that is to look"
        )
    judging = {name: gate for name, gate in pipeline.gates.items() if is_of_rows(gate, pipeline)}
    if kept and not judging:
        yield Problem(
            path, f"given {kept}, and no gate judges rows; add one on {pipeline.evaluate.metric}, or keep back none"
        )
    for name, gate in judging.items() if kept else ():
        if kept < gate.min_items:
            yield Problem(
                path, f"given {kept}; expected at least {gate.min_items}: with fewer the gate {name} is inconclusive"
            )


def _place(path: Path, address: str) -> Iterator[Problem]:
    """An output address must be a folder or a prefix of a bucket."""
    is_s3 = re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]+(/[^?#]*)?", address)
    if "://" in address and not is_s3 and not address.startswith("file:///"):
        yield Problem(
            path,
            f"given {mask_secrets(address)!r}; expected a folder or s3://bucket/prefix; credentials go into the "
            "environment",
        )


def _resources(pipeline: Pipeline) -> Iterator[Problem]:
    asked, train = pipeline.resources.get("train"), pipeline.train
    if asked is None:
        return
    path: Path = ("resources", "train")
    if asked.gpus and train.device == "cpu":
        yield Problem((*path, "gpus"), f"given {asked.gpus} with `train.device: cpu`; write 0, or another device")
    elif asked.gpus and train.processes % asked.gpus:
        yield Problem(
            (*path, "gpus"),
            f"given {asked.gpus} for {train.processes} processes; expected one GPU a process: write "
            f"`train.processes: {asked.gpus}` (on several machines: GPUs of one machine, processes of all of them)",
        )
    if asked.gpus == 0 and train.device == "cuda":
        yield Problem((*path, "gpus"), "given 0 with `train.device: cuda`; write how many, or `train.device: cpu`")
    if asked.cores and train.threads and asked.cores < train.threads:
        yield Problem(
            (*path, "cores"),
            f"given {asked.cores}; expected at least `train.threads`, {train.threads}: results follow it",
        )


def _way_back(name: str, document: Document) -> list[str]:
    """The channels that a release must pass before it enters ``name``, up to the first that repeats."""
    way: list[str] = []
    after = document.channels[name].after
    while after in document.channels and after not in way:
        way.append(after)
        after = document.channels[after].after
    return way


def _channel(name: str, channel: Channel, document: Document) -> Iterable[Problem]:
    path: Path = ("channels", name)
    if channel.after is not None and (channel.after not in document.channels or channel.after == name):
        known = ", ".join(other for other in document.channels if other != name) or "none"
        yield Problem((*path, "after"), f"given {channel.after!r}; expected another channel: {known}")
    elif name in (way := _way_back(name, document)):
        circle = " after ".join([name, *way[: way.index(name) + 1]])
        yield Problem(
            (*path, "after"), f"given {channel.after!r}: {circle}; nothing could ever enter: let one be first"
        )
    if channel.soak_hours > 0 and channel.after is None:
        yield Problem((*path, "soak_hours"), "given without `after`, the channel in which the release must have stayed")
    if (rollout := channel.rollout) is not None:
        shares, given = rollout.shares, ", ".join(map(str, rollout.shares))
        if list(shares) != sorted(set(shares)) or shares[-1] != 100:
            message = f"given {given}; expected rising percentages of which the last is 100, such as 5, 25, 100"
            yield Problem((*path, "rollout", "shares"), message)
    if channel.request_log is not None:
        yield from _request_log((*path, "request_log"), channel.request_log, document)
    for index, window in enumerate(channel.freeze_windows):
        if window.ends <= window.starts:
            yield Problem((*path, "freeze_windows", index, "ends"), "is not after `starts`; exchange them")


def _request_log(path: Path, log: RequestLog, document: Document) -> Iterable[Problem]:
    yield from _place((*path, "store"), log.store)
    for name, pipeline in document.pipelines.items():
        kept, released = (posixpath.normpath(place) + "/" for place in (log.store, pipeline.release.store))
        if kept.startswith(released):
            yield Problem(
                (*path, "store"),
                f"given the release store of {name}, or a folder in it; expected another place: whoever fetches a "
                "release could read what users wrote",
            )
    if not log.remove:
        return
    # Imported here: it takes a tenth of a second, which most projects need not wait for.
    from pyarrow import ArrowInvalid, compute

    for index, pattern in enumerate(log.remove):
        try:
            matches_nothing = compute.match_substring_regex([""], pattern)[0].as_py()
        except (ArrowInvalid, UnicodeError) as error:
            reason = str(error).removeprefix("Invalid regular expression: ")
            yield Problem((*path, "remove", index), f"given {pattern[:80]!r}; expected a regular expression: {reason}")
            continue
        if matches_nothing:
            yield Problem(
                (*path, "remove", index), f"given {pattern[:80]!r}, which also matches an empty text; narrow it"
            )
