"""Fields that are wrong one by one: each names its place, what was given, and what was expected."""

from typing import Any

import pytest

from graftline.errors import ConfigError
from tests.settings.documents import REMOVE, changed, read

SHA = "0" * 64

WRONG: list[tuple[str, Any, str]] = [
    # place, value, what the message must say after the place
    ("demo.adapter.rank", 0, "given 0; expected greater than or equal to 1"),
    ("demo.adapter.rank", -8, "given -8; expected greater than or equal to 1"),
    ("demo.adapter.rank", 8.5, "given 8.5; expected a whole number"),
    ("demo.adapter.rank", "8", 'given "8"; expected a whole number'),
    ("demo.adapter.rank", True, "given true; expected a whole number"),
    ("demo.adapter.rank", None, "given null; expected a whole number"),
    ("demo.adapter.rank", [8], "given [8]; expected a whole number"),
    ("demo.adapter.rank", 10**30, "expected less than or equal to 65536"),
    ("demo.adapter.alpha", 0, "given 0; expected greater than 0"),
    ("demo.adapter.alpha", -1.5, "given -1.5; expected greater than 0"),
    ("demo.adapter.alpha", 1e300, "given 1e+300; expected less than or equal to"),
    ("demo.adapter.dropout", 1.0, "given 1.0; expected less than 1"),
    ("demo.adapter.dropout", -0.1, "given -0.1; expected greater than or equal to 0"),
    ("demo.adapter.method", "lroa", "given \"lroa\"; expected 'full', 'houlsby'"),
    ("demo.adapter.method", "qlora", "given \"qlora\"; expected 'full', 'houlsby'"),
    ("demo.adapter.targets", [], "given []; expected text or at least 1 of them"),
    ("demo.adapter.targets", "", 'given ""; expected'),
    ("demo.adapter.targets", 3, "given 3; expected text or a list"),
    ("demo.adapter.targets", {"q_proj": 1}, "expected text or a list"),
    ("demo.adapter.rank_pattern", {"q_proj": 0}, "given 0; expected greater than or equal to 1"),
    ("demo.adapter.rank_pattern", ["q_proj"], 'given ["q_proj"]; expected a mapping'),
    ("demo.adapter.alpha_pattern", {"q_proj": "x"}, 'given "x"; expected a number'),
    ("demo.adapter.bias", "lora_only", "given \"lora_only\"; expected 'none', 'all' or 'adapter_only'"),
    ("demo.base.source", "", 'given ""; expected'),
    ("demo.base.source", 5, "given 5; expected text"),
    ("demo.base.source", REMOVE, "missing; expected: Address of the base model"),
    ("demo.base.sha256", "abc", 'given "abc"; expected text of the form ^[0-9a-f]{64}$'),
    ("demo.base.sha256", SHA.replace("0", "A"), "expected text of the form ^[0-9a-f]{64}$"),
    ("demo.base.dtype", "int8", "given \"int8\"; expected 'float32', 'bfloat16' or 'float16'"),
    ("demo.base.template", REMOVE, "missing; expected: Chat template"),
    ("demo.base.template", "alpaca", "given \"alpaca\"; expected 'none', 'tokenizer' or 'chatml'"),
    ("demo.base", "path:x", 'given "path:x"; expected a mapping (key: value lines)'),
    ("demo.data.evaluation_rows", -1, "given -1; expected greater than or equal to 0"),
    ("demo.data.sources", [{"source": "path:a", "share": 0.0}], "given 0.0; expected greater than 0"),
    ("demo.data.sources", [{"source": "path:a", "share": 1.5}], "given 1.5; expected less than or equal to 1"),
    ("demo.data.evaluation", {"source": "path:a"}, "missing; expected: SHA-256 of the file"),
    ("demo.data.evaluation_rows", REMOVE, "missing; expected: Rows set aside"),
    ("demo.data.max_tokens", 1, "given 1; expected greater than or equal to 8"),
    ("demo.data.max_tokens", REMOVE, "missing; expected: Longest row"),
    ("demo.data.max_rows", -1, "given -1; expected greater than or equal to 1"),
    ("demo.data.format", "csv", "given \"csv\"; expected 'auto', 'prompt-completion'"),
    ("demo.data.overlength", "split", "given \"split\"; expected 'error', 'drop' or 'truncate'"),
    ("demo.data.labels", ["cat"], "expected at least 2 of them"),
    ("demo.data.labels", "cat, dog", 'given "cat, dog"; expected a list'),
    ("demo.data.labels", ["cat", 5], "given 5; expected text"),
    ("demo.data.prepare", "prepare.sh", 'given "prepare.sh"; expected text of the form'),
    ("demo.data.prepare", "/etc/rows.py", 'given "/etc/rows.py"; expected text of the form'),
    ("demo.data.seed", -1, "given -1; expected greater than or equal to 0"),
    ("demo.data.seed", 2**32, "expected less than 4294967296"),
    ("demo.data.checks", {"expectation": "x"}, "expected a list"),
    ("demo.data.checks", [{"column": "prompt"}], "missing; expected: Name of the expectation"),
    ("demo.data.checks", [{"expectation": "not_null"}], 'given "not_null"; expected text of the form ^expect_'),
    ("demo.quantize.method", "int8", "given \"int8\"; expected 'none', 'nf4'"),
    ("demo.quantize.method", REMOVE, "missing; expected: Code book"),
    ("demo.quantize.block_size", 48, "given 48; expected 32, 64, 128"),
    ("demo.quantize.double_quant", "yes", 'given "yes"; expected true or false'),
    ("demo.quantize.bits", {"0-3": 8}, "given 8; expected less than or equal to 4"),
    ("demo.quantize.init", "pissa", "given \"pissa\"; expected 'plain', 'loftq' or 'qpissa'"),
    ("demo.train.batch_size", 0, "given 0; expected greater than or equal to 1"),
    ("demo.train.batch_size", REMOVE, "missing; expected: Rows a forward pass"),
    ("demo.train.learning_rate", 0, "given 0; expected greater than 0"),
    ("demo.train.learning_rate", "5e-4x", 'given "5e-4x"; expected a number'),
    ("demo.train.learning_rate", REMOVE, "missing; expected: Largest step size"),
    ("demo.train.steps", 0, "given 0; expected greater than or equal to 1"),
    ("demo.train.steps", 10**12, "expected less than or equal to 1000000000"),
    ("demo.train.scheduler", "cosinus", "given \"cosinus\"; expected 'constant', 'linear' or 'cosine'"),
    ("demo.train.optimizer", "sgd", 'given "sgd"; expected'),
    ("demo.train.device", "tpu", "given \"tpu\"; expected 'auto', 'cpu' or 'cuda'"),
    ("demo.train.precision", "int8", "given \"int8\"; expected 'auto', 'fp32', 'bf16' or 'fp16'"),
    ("demo.train.threads", 0, "given 0; expected greater than or equal to 1"),
    ("demo.train.max_grad_norm", -1, "given -1; expected greater than or equal to 0"),
    ("demo.train.warmup_steps", -1, "given -1; expected greater than or equal to 0"),
    ("demo.train.checkpoint_every", -1, "given -1; expected greater than or equal to 0"),
    ("demo.train.lr_ratio_b", 0, "given 0; expected greater than 0"),
    ("demo.train.packing", "true", 'given "true"; expected true or false'),
    ("demo.evaluate.metric", "bleu", 'given "bleu"; expected'),
    ("demo.evaluate.batch_tokens", 0, "given 0; expected greater than or equal to 1"),
    ("demo.gates", {}, "given {}; expected at least 1 of them"),
    ("demo.gates.better.margin", REMOVE, "missing; expected: In the metric's unit"),
    ("demo.gates.better.margin", -0.1, "given -0.1; expected greater than or equal to 0"),
    ("demo.gates.better.alpha", 0.5, "given 0.5; expected less than 0.5"),
    ("demo.gates.better.metric", "Accuracy %", 'given "Accuracy %"; expected text of the form'),
    ("demo.gates.better.limit", 1e300, "expected less than or equal to"),
    ("demo.gates.better.direction", "up", "given \"up\"; expected 'higher' or 'lower'"),
    (
        "demo.gates.better.test",
        "t-test",
        "given \"t-test\"; expected 'non-inferiority', 'superiority', 'equivalence' or 'limit'",
    ),
    ("demo.gates.better.against", REMOVE, "missing; expected: `base`, `production`"),
    ("demo.package.merged", 1, "given 1; expected true or false"),
    ("demo.package.merged", REMOVE, "missing; expected: Also hold the base"),
    ("demo.release.store", "", 'given ""; expected'),
    ("demo.release.channel", "Production", 'given "Production"; expected text of the form'),
    ("demo.prices", {"currency": "EUR"}, "expected `gpu_hour`, `kilowatt_hour` or both beside `currency`"),
    ("demo.prices", {"gpu_hour": 1.0}, "missing; expected: Three capital letters"),
    ("demo.prices", {"currency": "euro", "gpu_hour": 1.0}, 'given "euro"; expected text of the form'),
    ("demo.prices", {"currency": "EUR", "gpu_hour": -1.0}, "given -1.0; expected greater than or equal to 0"),
    ("channels", {}, "given {}; expected at least 1 of them"),
    ("channels.production.webhooks", [{}], "missing; expected: Address that messages are posted to"),
    ("demo.evaluate.engine", {"url": "https://a/v1"}, "missing; expected: Name under which the server has the"),
    ("demo.evaluate.engine", {"model": "m", "url": "a:8000"}, "expected text of the form ^https?://"),
    ("demo.evaluate.engine", {"model": "m", "url": "https:///v1"}, "expected an address with a host"),
    ("demo.evaluate.engine", {"model": "m", "url": "http://[::1/v1"}, "expected an address with a host"),
    (
        "demo.evaluate.engine",
        {"model": "m", "url": "https://a/v1?key=k"},
        "expected an address with a host and no query",
    ),
    ("demo.evaluate.engine", {"model": "m", "url": "https://u:p@a/v1"}, "expected no user name or password"),
    ("demo.evaluate.engine", {"model": "", "url": "https://a/v1"}, 'given ""; expected'),
    ("demo.evaluate.engine", {"model": "m", "url": "https://a/v1", "concurrency": 0}, "greater than or equal to 1"),
    ("channels.production.webhooks", [{"url": "hooks.example.org"}], "expected text of the form ^https?://"),
    ("channels.production.webhooks", [{"url": "https:///x"}], "expected an address with a host"),
    ("channels.production.webhooks", [{"url": "https://[::1/x"}], "expected an address with a host"),
    ("channels.production.webhooks", [{"url": "https://a:99999/x"}], "expected an address with a host"),
    ("channels.production.webhooks", [{"url": "https://u:p@a/x"}], "expected no user name or password"),
    ("channels.production.webhooks", [{"url": "https://a/x", "secret": "whsec_aa"}], "of the form ^GRAFTLINE_WEBHOOK_"),
    ("channels.production.verdicts", [], "expected at least 1 of them"),
    ("channels.production.verdicts", ["fail"], "given \"fail\"; expected 'pass' or 'inconclusive'"),
    ("channels.production.soak_hours", -1, "given -1; expected greater than or equal to 0"),
    ("channels.production.approvals", {"count": -1}, "given -1; expected greater than or equal to 0"),
    ("channels.production.approvals", {"valid_hours": 0}, "given 0; expected greater than 0"),
    ("channels.production.approvals", {"other_than_builder": 1}, "given 1; expected true or false"),
    (
        "channels.production.freeze_windows",
        [{"starts": "2026-12-24T00:00:00", "ends": "2026-12-27T00:00:00Z", "reason": "holidays"}],
        "expected have timezone info",
    ),
    ("pipelines", {}, "given {}; expected at least 1 of them"),
    ("pipelines", "demo", 'given "demo"; expected a mapping'),
]


@pytest.mark.parametrize(("place", "value", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_value_is_refused_with_its_place_and_what_was_expected(place: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(changed(**{place: value}))

    shown = f"pipelines.{place}" if place.startswith("demo") else place
    assert f"{shown}" in str(caught.value)
    assert message in str(caught.value)
    assert "pipelines.yaml:" in str(caught.value)


def test_there_are_at_least_80_cases() -> None:
    assert len(WRONG) >= 80


@pytest.mark.parametrize(
    "section", ["base", "data", "quantize", "adapter", "train", "evaluate", "gates", "package", "release"]
)
def test_every_section_is_required_because_dvc_tracks_it(section: str) -> None:
    with pytest.raises(ConfigError, match=rf"pipelines\.demo\.{section}: missing; expected: "):
        read(changed(**{f"demo.{section}": REMOVE}))


@pytest.mark.parametrize("name", ["Demo", "my_task", "a.b", "-a", "a--b", "ü", "", "a" * 61])
def test_a_pipeline_name_of_other_letters_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="as a name; expected small letters, digits and single hyphens"):
        read(changed(**{"pipelines": {name: {}}}))
