"""Combinations of fields that cannot work together, and settings that nothing would read."""

from typing import Any

import pytest

from graftline.errors import ConfigError
from graftline.settings import Config
from tests.settings.documents import REMOVE, changed, read

SHA = "0" * 64
DATA = {"source": "path:rows.jsonl", "evaluation_rows": 200, "max_tokens": 64, "labels": ["cat", "dog"]}
TWO: list[dict[str, Any]] = [{"source": "path:a.jsonl"}, {"source": "s3://bucket/b-*.jsonl"}]
SEVERAL = {key: value for key, value in DATA.items() if key != "source"} | {"sources": TWO}
FROZEN = {"source": "path:judge.jsonl", "sha256": SHA}
NF4 = {"method": "nf4"}
LIMIT = {"metric": "adapter_bytes", "direction": "lower", "test": "limit", "limit": 1e9}
RATE = {"metric": "option_stop_rate", "direction": "higher", "test": "limit"}
FORGETTING = {"source": "path:text", "prepare": "text.py"}
JUDGED = {"max_new_tokens": 8, "judge": {"address": "http://localhost/v1", "model": "m", "rubric": "rubric.md"}}

BROKEN: list[tuple[dict[str, Any], str, str]] = [
    # changes, place, message
    ({"train.epochs": 1}, "train.epochs", "given together with `steps`"),
    ({"train.steps": REMOVE}, "train", "neither `steps` nor `epochs` is given"),
    ({"train.warmup_steps": 11}, "train.warmup_steps", "given 11; expected at most `steps`, 10"),
    ({"train.patience": 3}, "train.patience", "given 3 without `evaluate_every`"),
    (
        {"train.start_from": "production", "adapter.method": "full", "adapter.rank": REMOVE},
        "train.start_from",
        "leaves its base as it is",
    ),
    (
        {
            "train.start_from": "production",
            "adapter.method": "loftq",
            "quantize": {"method": "nf4", "init": {"kind": "loftq", "weighting": "full"}},
        },
        "train.start_from",
        "given production with `adapter.method: loftq` and `quantize.init: loftq`; expected an adapter",
    ),
    ({"train.start_from": "base"}, "train.start_from", "expected production, anchor or a release's version"),
    ({"train.sharding": True}, "train.sharding", "given true with one process"),
    (
        {"train.sharding": True, "train.processes": 2, "adapter.method": "full"},
        "adapter.method",
        "given full with `train.sharding: true`; expected an adapter that leaves the base's weights as they are",
    ),
    (
        {"train.sharding": True, "train.processes": 2, "adapter": {"method": "pissa"}},
        "adapter.method",
        "given pissa with `train.sharding: true`",
    ),
    (
        {"train.sharding": True, "train.processes": 2, "adapter.bias": "all"},
        "adapter.bias",
        "given all with `train.sharding: true`; a sharded base is not trained",
    ),
    ({"train.offload_activations": True}, "train.offload_activations", "without `gradient_checkpointing: true`"),
    ({"train.evaluate_every": 5}, "train.held_out_rows", "missing; `evaluate_every` needs rows"),
    ({"train.held_out_rows": 9}, "train.held_out_rows", "given 9 without `evaluate_every`"),
    (
        {"train.evaluate_every": 5, "train.held_out_rows": 9, "train.sharding": True, "train.processes": 2},
        "train.evaluate_every",
        "a sharded base cannot be looked at",
    ),
    ({"train.device": "cpu", "train.precision": "fp16"}, "train.precision", "given fp16 with `device: cpu`"),
    (
        {"train.device": "cpu", "resources": {"train": {"gpus": 1}}},
        "resources.train.gpus",
        "given 1 with `train.device: cpu`; write 0",
    ),
    (
        {"train.device": "cuda", "resources": {"train": {"gpus": 0}}},
        "resources.train.gpus",
        "given 0 with `train.device: cuda`",
    ),
    (
        {"train.processes": 3, "resources": {"train": {"gpus": 2}}},
        "resources.train.gpus",
        "given 2 for 3 processes; expected one GPU a process: write `train.processes: 2`",
    ),
    (
        {"train.threads": 4, "resources": {"train": {"cores": 2}}},
        "resources.train.cores",
        "given 2; expected at least `train.threads`, 4",
    ),
    ({"train.ray_address": "auto"}, "train.ray_address", "given, but only engine ray reads it, not torchrun"),
    ({"train.checkpoints": "gs://bucket/x"}, "train.checkpoints", "expected a folder or s3://bucket/prefix"),
    ({"train.checkpoints": "s3://key:secret@bucket/x"}, "train.checkpoints", "credentials go into the environment"),
    (
        {"train.checkpoints": "kept", "train.checkpoint_every": 0},
        "train.checkpoints",
        "given with `checkpoint_every: 0`, which writes none",
    ),
    ({"quantize": NF4, "adapter": {"method": "full"}}, "adapter.method", "quantized weights cannot be trained"),
    *(
        ({"train.objective": {"kind": "classify"}, "package.merged": False} | changes, place, message)
        for changes, place, message in (
            ({"package.merged": True}, "package.merged", "has no place for the head"),
            ({"data.labels": REMOVE}, "data.labels", "objective classify chooses among a fixed list"),
            ({"data.overlength": "truncate"}, "data.overlength", "cuts a row's label off"),
            ({"adapter": {"method": "full"}}, "adapter.method", "whose head goes with an adapter"),
            ({"train.sharding": True, "train.processes": 2}, "train.sharding", "whole in each process"),
            ({"evaluate.forgetting": FORGETTING}, "evaluate.forgetting", "only chooses labels; remove it"),
            ({"evaluate.answers": {"max_new_tokens": 8}}, "evaluate.answers", "only chooses labels; remove it"),
            ({"evaluate.latency_tokens": 8}, "evaluate.latency_tokens", "only chooses labels; remove it"),
            ({"evaluate.uniform_labels": True}, "evaluate.uniform_labels", "learns the labels' prior"),
            ({"base.served_by": "vllm"}, "base.served_by", "loads no adapter with a head for classes"),
            ({"gates.better.metric": "nll", "gates.better.direction": "lower"}, "gates.better.metric", "not measured"),
            (
                {"data.format": "preference", "data.labels": REMOVE},
                "train.objective.kind",
                "given classify with preference pairs; write dpo, orpo or supervised",
            ),
        )
    ),
    ({"gates.better.metric": "macro_f1", "gates.better.slice": {"a": 1}}, "gates.better.slice", "no value a row"),
    ({"train.objective": {"kind": "dpo"}}, "train.objective.kind", "given dpo, which needs pairs"),
    ({"train.objective": {"beta": 0.2}}, "train.objective.beta", "only kinds dpo, orpo and kto read it"),
    ({"data.format": "preference", "data.labels": ["a", "b"]}, "data.labels", "whose rows have two answers"),
    (
        {"data.format": "preference", "train.objective": {"kind": "dpo"}, "adapter": {"method": "full"}},
        "train.objective.kind",
        "given dpo with `adapter.method: full`, without whose adapter there is no base",
    ),
    (
        {"data.format": "preference", "train.objective": {"kind": "dpo"}, "adapter.modules_to_save": ["lm_head"]},
        "adapter.modules_to_save",
        "given with objective dpo, which compares with the base",
    ),
    (
        {"data.format": "preference", "train.objective": {"kind": "orpo"}, "train.packing": True},
        "train.packing",
        "given with objective orpo, which does not take it",
    ),
    ({"adapter": {"method": "loftq"}}, "adapter.method", "given loftq without a quantized base"),
    (
        {"quantize": NF4, "adapter": {"method": "loftq"}},
        "quantize.init",
        "given plain with `adapter.method: loftq`; expected loftq",
    ),
    (
        {"quantize": NF4, "adapter": {"method": "pissa"}},
        "quantize.init",
        "given plain with `adapter.method: pissa`; expected qpissa",
    ),
    (
        {"quantize": {"method": "nf4", "init": "qpissa"}},
        "quantize.init",
        "given qpissa with `adapter.method: lora`; expected plain",
    ),
    (
        {
            "quantize": {"method": "nf4", "init": {"kind": "qpissa", "weighting": "full"}},
            "adapter": {"method": "pissa"},
        },
        "quantize.init.weighting",
        "given full with kind qpissa, but only kind loftq reads it",
    ),
    (
        {"quantize": {"method": "nf4", "init": {"kind": "loftq", "weighting": "diagonal"}}},
        "quantize.init",
        "given loftq with `adapter.method: lora`; expected plain",
    ),
    (
        {"quantize": {"method": "none", "double_quant": True}},
        "quantize.double_quant",
        "`quantize.method: none` does not",
    ),
    ({"quantize": {"method": "none", "init": "loftq"}}, "quantize.init", "`quantize.method: none` does not read it"),
    ({"package.requantize": True}, "package.requantize", "only a quantized base reads it"),
    ({"package.merge_into": "both"}, "package.merge_into", "only a quantized base reads it"),
    (
        {"quantize": NF4, "package.rounding": "nearest"},
        "package.rounding",
        "only `package.requantize: true` reads it; remove it",
    ),
    (
        {"quantize": NF4, "package": {"merged": False, "requantize": True}},
        "package.requantize",
        "`package.merged: false` does not read it",
    ),
    (
        {
            "quantize": {"method": "nf4", "init": "loftq"},
            "adapter": {"method": "loftq"},
            "package.merge_into": "original",
        },
        "package.merge_into",
        "given original with `quantize.init: loftq`; expected dequantized",
    ),
    (
        {"quantize": {"method": "mixed", "bits": {"0-1": 4}}, "package.requantize": True},
        "package.requantize",
        "given true with `quantize.method: mixed`",
    ),
    ({"quantize": {"method": "mixed"}}, "quantize.bits", "missing; `mixed` needs layers and their bits"),
    (
        {"quantize": {"method": "fp8", "double_quant": False}},
        "quantize.double_quant",
        "one scale a row in fp32; remove",
    ),
    ({"quantize": {"method": "fp8", "block_size": 64}}, "quantize.block_size", "one scale a row in fp32; remove it"),
    ({"train.fp8_products": True}, "train.fp8_products", "`quantize.method: none`; expected a base in fp8"),
    (
        {"quantize": {"method": "fp8"}, "train.fp8_products": True, "train.precision": "fp32"},
        "train.fp8_products",
        "given true with `precision: fp32`; expected bf16",
    ),
    ({"quantize": {"method": "nf3", "bits": {"0-3": 4}}}, "quantize.bits", "only `quantize.method: mixed` reads it"),
    (
        {"quantize": {"method": "nf4", "loftq_iterations": 2}},
        "quantize.loftq_iterations",
        "only `quantize.init: loftq`",
    ),
    ({"adapter": {"method": "full", "rank": 8}}, "adapter.rank", "method full does not read it"),
    ({"adapter": {"method": "vera", "alpha": 8}}, "adapter.alpha", "method vera does not read it"),
    ({"adapter": {"method": "lora", "svd": "fast"}}, "adapter.svd", "only pissa, loftq; remove it"),
    ({"adapter": {"method": "dora", "experts": "shared_a"}}, "adapter.experts", "only lora, rslora; remove it"),
    ({"adapter": {"method": "lora", "projection_seed": 1}}, "adapter.projection_seed", "only vera; remove it"),
    (
        {"adapter": {"method": "houlsby"}},
        "package.merged",
        "given true with method houlsby: a bottleneck cannot be folded into the base; write false",
    ),
    ({"data.labels": REMOVE}, "data.labels", "missing; metric accuracy scores a fixed list of labels"),
    ({"data.labels": ["cat", "dog", "cat"]}, "data.labels", "cat is given more than once"),
    ({"data.labels": [" cat", "dog"]}, "data.labels", "given ' cat'; expected no blanks around a label"),
    ({"data.labels": ["cat", "cat\n"]}, "data.labels", "given 'cat\\n'; expected no blanks"),
    ({"gates.size": RATE | {"limit": 1.0}}, "gates.size.limit", "given 1; expected less than 1: no sample shows"),
    (
        {"gates.size": RATE | {"limit": 1.5}},
        "gates.size.limit",
        "given 1.5; expected at most 1: option_stop_rate is nev",
    ),
    (
        {"gates.size": RATE | {"limit": 0.99}},
        "gates.size.limit",
        "given 0.99, which 200 items cannot show, however they come out; expected 299 items",
    ),
    (
        {"gates.size": RATE | {"limit": 0.98, "alpha": 0.01}},
        "gates.size.limit",
        "which 200 items cannot show, however they come out; expected 228 items",
    ),
    (
        {"gates.better.test": "equivalence", "gates.better.margin": 0.01},
        "gates.better.margin",
        "given 0.01, which 200 items cannot show, however they come out; expected 299 items",
    ),
    ({"gates.better.test": "superiority", "gates.better.margin": 1.0}, "gates.better.margin", "expected less than 1"),
    (
        {"gates.size": RATE | {"metric": "rouge_l", "limit": 1.0}, "evaluate.answers": {"max_new_tokens": 8}},
        "gates.size.limit",
        "given 1; expected less than 1: no sample shows",
    ),
    ({"gates.size": LIMIT | {"metric": "nll", "limit": 0}}, "gates.size.limit", "given 0; expected more than 0"),
    ({"gates.size": LIMIT | {"metric": "leaked_rows", "limit": -1}}, "gates.size.limit", "expected at least 0"),
    ({"data.max_rows": 200}, "data.evaluation_rows", "given 200; expected less than `max_rows`, 200"),
    ({"data.evaluation_rows": 50}, "gates.better.min_items", "given 100, but accuracy has 50 items"),
    ({"gates.better.direction": "lower"}, "gates.better.direction", "given lower; expected higher for accuracy"),
    (
        {"gates.better.metric": "forgetting_nll", "gates.better.direction": "lower"},
        "gates.better.metric",
        "given forgetting_nll, which is not measured; set `evaluate.forgetting`",
    ),
    ({"gates.better.margin": REMOVE}, "gates.better.margin", "missing; expected: In the metric's unit"),
    ({"gates.better.against": REMOVE}, "gates.better.against", "missing; expected: `base`, `production`"),
    ({"gates.better.against": None}, "gates.better.against", "missing; expected: `base`, `production`"),
    ({"gates.better.limit": 0.5}, "gates.better.limit", "test non-inferiority does not read it"),
    ({"gates.better.metric": "accuracyy"}, "gates.better.metric", "did you mean accuracy?"),
    ({"gates.better.metric": "package_bytes"}, "gates.better.metric", "docs/gates.md describes them"),
    ({"gates.better.metric": "leaked_rows"}, "gates.better.metric", "write `test: limit`, it is one number"),
    ({"gates.better.metric": "rouge_l"}, "gates.better.metric", "which is not measured; set `evaluate.answers`"),
    ({"gates.better.metric": "stop_rate"}, "gates.better.metric", "which is not measured; set `evaluate.answers`"),
    ({"gates.better.metric": "general_accuracy"}, "gates.better.metric", "not measured; set `evaluate.harness`"),
    (
        {"gates.size": LIMIT | {"metric": "engine_nll_difference"}},
        "gates.size.metric",
        "given engine_nll_difference, which is not measured; set `evaluate.engine`",
    ),
    ({"gates.size": LIMIT | {"direction": "higher"}}, "gates.size.direction", "expected lower for adapter_bytes"),
    ({"gates.size": LIMIT | {"metric": "adapter_byte"}}, "gates.size.metric", "did you mean adapter_bytes?"),
    (
        {"gates.size": LIMIT | {"metric": "forbidden_answers"}, "evaluate.answers": {"max_new_tokens": 8}},
        "gates.size.metric",
        "given forbidden_answers, which is not measured; set `evaluate.answers.forbidden`",
    ),
    ({"gates.size": LIMIT | {"metric": "latency_ratio"}}, "gates.size.metric", "set `evaluate.latency_tokens`"),
    ({"gates.size": LIMIT | {"metric": "miub"}}, "gates.size.metric", "set `evaluate.miub_rows`"),
    (
        {"gates.size": LIMIT | {"metric": "merged_failures"}, "package.merged": False},
        "gates.size.metric",
        "given merged_failures, which is not measured; set `package.merged`",
    ),
    (
        {"gates.better.metric": "f1", "evaluate.answers": {"max_new_tokens": 8, "max_rows": 60}},
        "gates.better.min_items",
        "given 100, but f1 has 60 items",
    ),
    (
        {"gates.better.against": "20261124T000000Z-abc"},
        "gates.better.against",
        "given '20261124T000000Z-abc', which is not scored; expected one of base, production, anchor: add it",
    ),
    (
        {"gates.better.slice": {"language": "de"}},
        "gates.better.slice",
        "given 'language'; expected one of `data.slices`",
    ),
    (
        {"gates.size": LIMIT | {"slice": {"language": "de"}}, "data.slices": ["language"]},
        "gates.size.slice",
        "given for adapter_bytes, which has no value a row",
    ),
    ({"evaluate.metric": "f1"}, "evaluate.answers", "missing; metric f1 compares free answers"),
    (
        {"evaluate.metric": "field_f1", "evaluate.answers": {"max_new_tokens": 8}},
        "evaluate.answers.json_schema",
        "missing; metric field_f1 needs a JSON Schema",
    ),
    (
        {"evaluate.answers": {"max_new_tokens": 8, "scores": {"nll": "own.py"}}},
        "evaluate.answers.scores.nll",
        "given nll, which is measured anyway; rename it",
    ),
    ({"evaluate.uniform_labels": True, "data.labels": REMOVE}, "evaluate.uniform_labels", "without `data.labels`"),
    (
        {"gates.better.metric": "json_valid", "evaluate.answers": {"max_new_tokens": 8}},
        "gates.better.metric",
        "not measured; set `evaluate.answers.json_schema`",
    ),
    ({"gates.better.metric": "judge", "evaluate.answers": JUDGED}, "gates.better.metric", "human_labels"),
    (
        {"evaluate.answers": {"max_new_tokens": 8, "forbidden": ["(bomb"]}},
        "evaluate.answers.forbidden",
        "given '(bomb'; expected a regular expression",
    ),
    ({"evaluate.miub_rows": 300}, "evaluate.miub_rows", "given 300; expected at most `data.evaluation_rows`, 200"),
    (
        {"evaluate.miub_rows": 50, "adapter": {"method": "full"}},
        "evaluate.miub_rows",
        "method full adds nothing to a layer's output",
    ),
    ({"evaluate.references": ["unquantized"]}, "evaluate.references", "expected a quantized base and init plain"),
    (
        {
            "evaluate.references": ["unquantized"],
            "quantize": {"method": "nf4", "init": "loftq"},
            "adapter": {"method": "loftq"},
        },
        "evaluate.references",
        "expected a quantized base and init plain",
    ),
    ({"evaluate.references": ["base"]}, "evaluate.references", "given base, which is scored anyway"),
    ({"gates.better.test": "equivalence", "gates.better.margin": 0}, "gates.better.margin", "expected more than 0"),
    (
        {"gates.size": {k: v for k, v in LIMIT.items() if k != "limit"}},
        "gates.size.limit",
        "missing; test limit needs the worst value",
    ),
    ({"gates.size": LIMIT | {"margin": 0.1}}, "gates.size.margin", "given, but test limit compares with nothing"),
    ({"gates.size": LIMIT | {"against": "base"}}, "gates.size.against", "given, but test limit compares with nothing"),
    ({"adapter.targets": "(q_proj"}, "adapter.targets", "given '(q_proj'; expected a regular expression: missing )"),
    ({"adapter.targets": "[[a]"}, "adapter.targets", "expected a regular expression: Possible nested set"),
    ({"adapter.rank_pattern": {"*": 4}}, "adapter.rank_pattern", "expected a regular expression: nothing to repeat"),
    ({"adapter.alpha_pattern": {"a(": 4}}, "adapter.alpha_pattern", "expected a regular expression"),
    ({"quantize": {"method": "mixed", "bits": {"7-0": 4}}}, "quantize.bits", "expected the smaller number first"),
    ({"quantize": {"method": "mixed", "bits": {"(": 4}}}, "quantize.bits", "expected a regular expression"),
    ({"base.source": "rows/base"}, "base.source", "for a file on this machine write path:rows/base"),
    ({"base.source": "hf:org/name"}, "base.source", "a revision is missing"),
    ({"base.source": "https://h.example/m.gguf"}, "base.sha256", "needs the SHA-256"),
    ({"data": DATA | {"sources": TWO}}, "data.sources", "given together with `source`; expected one of them"),
    ({"data": SEVERAL | {"sha256": SHA}}, "data.sha256", "given beside `sources`, each of which has its own"),
    ({"data": SEVERAL | {"sources": []}}, "data.source", "missing; expected the address of the rows, or several"),
    (
        {"data": SEVERAL | {"sources": [TWO[0], TWO[0]]}},
        "data.sources",
        "given path:a.jsonl more than once; its rows would count twice",
    ),
    (
        {"data": SEVERAL | {"sources": [TWO[0] | {"share": 0.5}, TWO[1]]}},
        "data.sources",
        "1 of 2 have a `share`; give every one of them a share, or none",
    ),
    (
        {"data": SEVERAL | {"sources": [TWO[0] | {"share": 0.5}, TWO[1] | {"share": 0.4}]}},
        "data.sources",
        "the shares add up to 0.9; expected 1",
    ),
    ({"data": SEVERAL | {"sources": [{"source": "npm:a@1/x"}]}}, "data.sources.0.sha256", "needs the SHA-256"),
    ({"data.evaluation_rows": 0}, "data.evaluation_rows", "given 0; expected at least 1, or rows of another source"),
    (
        {"data": DATA | {"evaluation": FROZEN, "evaluation_rows": 0, "split": "newest"}},
        "data.split",
        "given newest with `evaluation_rows: 0`; nothing is split",
    ),
    ({"data.source": "pypi:rows==1/rows.jsonl"}, "data.sha256", "needs the SHA-256"),
    ({"data.source": "npm:rows@1/../secret", "data.sha256": SHA}, "data.source", "without `..`"),
    ({"data.source": "http://h.example/x", "data.sha256": SHA}, "data.source", "is not encrypted"),
    ({"evaluate.forgetting": {"source": "ftp://x/y"}}, "evaluate.forgetting.source", "expected path:FILE"),
    ({"release.channel": "prod"}, "release.channel", "given 'prod'; expected one of `channels`: staging, production"),
    ({"release.store": "gs://bucket/x"}, "release.store", "expected a folder or s3://bucket/prefix"),
    ({"release.store": "s3://key:secret@bucket/x"}, "release.store", "credentials go into the environment"),
]

SOURCES: list[dict[str, Any]] = [
    {"data.source": "s3://bucket/rows.jsonl"},
    {"data.source": "https://h.example/rows.jsonl"},
    {"data": SEVERAL},
    {"data": SEVERAL | {"sources": [TWO[0] | {"share": 0.3333333}, TWO[1] | {"share": 0.6666667}]}},
    {"data": DATA | {"evaluation": FROZEN}},
    {"data": DATA | {"evaluation": FROZEN, "evaluation_rows": 0}},
    {"data": DATA | {"split": "newest"}},
    {"evaluate.forgetting": {"source": "s3://b-k/text"}},
]

REACHABLE: list[dict[str, Any]] = [
    {"gates.size": RATE | {"limit": 0.985}},
    {"gates.size": RATE | {"limit": 0.0}},
    {"gates.size": LIMIT | {"metric": "leaked_rows", "limit": 0}},
    {"gates.size": LIMIT | {"metric": "merged_nll_change", "limit": -0.1}},
    {"gates.size": LIMIT | {"metric": "merged_argmax_agreement", "direction": "higher", "limit": 1}},
    {"gates.better.test": "equivalence", "gates.better.margin": 0.02},
    {"gates.better.test": "superiority", "gates.better.margin": 0.9},
]


def read_demo(**changes: Any) -> Config:
    return read(changed(**{f"demo.{place}": value for place, value in changes.items()}))


@pytest.mark.parametrize("changes", REACHABLE)
def test_a_gate_that_some_candidate_could_pass_is_accepted(changes: dict[str, Any]) -> None:
    read_demo(**changes)


@pytest.mark.parametrize("changes", SOURCES)
def test_rows_may_move_come_from_several_sources_and_be_judged_by_others(changes: dict[str, Any]) -> None:
    read_demo(**changes)


@pytest.mark.parametrize(("changes", "place", "message"), BROKEN, ids=lambda value: str(value)[:50])
def test_a_combination_that_cannot_work_is_refused(changes: dict[str, Any], place: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_demo(**changes)

    assert f"pipelines.demo.{place}: " in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"quantize": NF4},
        {"quantize": NF4, "adapter": {"method": "dora"}},
        {"quantize": NF4, "adapter": {"method": "vera", "rank": 256, "projection_seed": 3}},
        {"quantize": NF4, "adapter": {"method": "pfeiffer"}, "package.merged": False},
        {"quantize": {"method": "nf2", "init": "loftq", "loftq_iterations": 3}, "adapter": {"method": "loftq"}},
        {"quantize": {"method": "nf4", "init": "qpissa"}, "adapter": {"method": "pissa", "svd": "exact"}},
        {"quantize": {"method": "mixed", "bits": {"0-3": 4, r".*down_proj": 2}}},
        {"adapter": {"method": "full"}},
        {"adapter": {"method": "pissa"}},
        {"train.steps": REMOVE, "train.epochs": 0.5},
        {"gates.size": LIMIT},
        {"gates.better.test": "equivalence"},
        {
            "gates.better.metric": "nll",
            "gates.better.direction": "lower",
            "gates.better.against": "20261124T000000Z-abc",
            "evaluate.references": ["20261124T000000Z-abc"],
        },
        {
            "quantize": NF4,
            "evaluate.references": ["unquantized"],
            "gates.better.against": "unquantized",
            "evaluate.latency_tokens": 8,
            "gates.size": LIMIT | {"metric": "latency_ratio"},
        },
        {
            "data.labels": REMOVE,
            "evaluate": {"metric": "rouge_l", "answers": {"max_new_tokens": 32, "forbidden": ["^as an ai"]}},
            "gates.better.metric": "rouge_l",
            "gates.safe": LIMIT | {"metric": "forbidden_answers", "limit": 0},
        },
        {"evaluate.harness": {"tasks": ["arc_easy"]}, "gates.better.metric": "general_accuracy"},
        {"evaluate.miub_rows": 50, "gates.size": LIMIT | {"metric": "miub", "direction": "higher"}},
        {"gates.size": LIMIT | {"metric": "merged_bytes"}},
        {"adapter.targets": r".*\.(q|v)_proj", "adapter.rank_pattern": {"q_proj": 4}},
        {"release.store": "s3://bucket/prefix"},
        {"train.checkpoints": "s3://bucket/prefix", "train.engine": "ray", "train.ray_address": "head:6379"},
        {"release.store": "file:///srv/store"},
        {
            "evaluate.forgetting": FORGETTING,
            "gates.kept": {
                "metric": "forgetting_nll",
                "direction": "lower",
                "test": "non-inferiority",
                "margin": 0.05,
                "against": "base",
            },
        },
    ],
    ids=str,
)
def test_a_combination_that_works_is_accepted(changes: dict[str, Any]) -> None:
    assert read_demo(**changes).names == ("demo",)
