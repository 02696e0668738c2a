import json
from pathlib import Path
from typing import Any

import pytest

from graftline.errors import ConfigError
from graftline.settings import Pipeline, load, schema
from graftline.settings.loader import ALIASES
from tests.settings.documents import REMOVE, changed, read

TEXT = """\
pipelines:
  demo:
    base: {source: "path:base", template: none}
    data:
      source: path:rows.jsonl
      evaluation_rows: 200
      max_tokens: 64
      labels: [cat, dog]
    quantize: {method: none}
    adapter: &adapter
      method: lora
      rank: 8
    train: {steps: 10, batch_size: 4, learning_rate: 5e-4}
    evaluate: {metric: accuracy}
    gates:
      better: {metric: accuracy, direction: higher, test: superiority, margin: 0, against: base}
    package: {merged: true}
    release: {store: store, channel: production}
channels:
  production: {}
"""


def test_a_right_file_is_read_into_frozen_models(tmp_path: Path) -> None:
    file = tmp_path / "pipelines.yaml"
    file.write_text(TEXT)

    config = load(file)

    pipeline = config.pipeline("demo")
    assert (config.names, config.root, pipeline.adapter.rank) == (("demo",), tmp_path, 8)
    assert pipeline.data.labels == ("cat", "dog")
    with pytest.raises(ValueError, match="frozen"):
        pipeline.adapter.rank = 3


def test_a_missing_file_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*pipelines\.yaml: No such file.*graftline init"):
        load(tmp_path / "pipelines.yaml")


def test_a_folder_instead_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load(tmp_path)


def test_a_missing_pipeline_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"pipeline 'dmeo' is not in .*; expected one of demo; did you mean demo\?"):
        read(TEXT.encode()).pipeline("dmeo")


def test_a_message_gives_file_and_line() -> None:
    with pytest.raises(ConfigError, match=r"^pipelines\.yaml:12: pipelines\.demo\.adapter\.rank: given 0; expected"):
        read(TEXT.replace("rank: 8", "rank: 0").encode())


def test_all_problems_are_told_at_once_in_the_order_of_the_file() -> None:
    text = TEXT.replace("rank: 8", "rank: 0").replace("max_tokens: 64", "max_token: 64").replace("merged: true", "")

    with pytest.raises(ConfigError) as caught:
        read(text.encode())

    lines = str(caught.value).splitlines()
    assert lines[0] == "4 problems"
    places = [line.split(": ")[1] for line in lines[1:]]
    assert places == [
        f"pipelines.demo.{key}" for key in ("data.max_tokens", "data.max_token", "adapter.rank", "package.merged")
    ]


def test_a_problem_in_an_aliased_section_is_told_once_per_pipeline_with_the_line_that_holds_it() -> None:
    text = TEXT.replace("  rank: 8", "  rank: 0\n").replace("channels:", "  other:\n    adapter: *adapter\nchannels:")

    with pytest.raises(ConfigError) as caught:
        read(text.encode())

    assert "pipelines.yaml:12: pipelines.demo.adapter.rank" in str(caught.value)
    assert "pipelines.yaml:12: pipelines.other.adapter.rank" in str(caught.value)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("demo.adapter.rnak", "unknown key; did you mean `rank`?"),
        ("demo.train.learning_rte", "did you mean `learning_rate`?"),
        ("demo.gates.better.magrin", "did you mean `margin`?"),
        ("demo.evaluate.forgeting", "did you mean `forgetting`?"),
        ("demo.trainz", "did you mean `train`?"),
        ("channels.production.approvalls", "did you mean `approvals`?"),
        ("demo.base.rank", "it belongs to the section `adapter`"),
        ("demo.rank", "it belongs to the section `adapter`"),
        ("demo.release.zzz", "expected one of store, channel"),
        ("pipeline", "did you mean `pipelines`?"),
    ],
)
def test_an_unknown_key_is_an_error_with_the_nearest_name(place: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(changed(**{place: 8}))

    assert message in str(caught.value)


@pytest.mark.parametrize("name", ALIASES)
def test_names_of_other_tools_say_what_to_write_here(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(changed(**{f"demo.adapter.{name}": 8}))

    assert f"{name}: unknown key; that is another tool's name; write {ALIASES[name]}" in str(caught.value)


def test_every_key_that_an_alias_names_exists() -> None:
    names = 0
    for advice in ALIASES.values():
        for quoted in advice.split("`")[1::2]:
            section, _, rest = quoted.partition(".")
            key = rest.split(":")[0]
            if section in Pipeline.model_fields:
                names += 1
                model: Any = Pipeline.model_fields[section].annotation
                assert not key or key in model.model_fields, advice

    assert names > 60


def test_show_gives_each_value_and_its_origin() -> None:
    settings = {s.key: (s.value, s.origin) for s in read(TEXT.encode()).show("demo")}

    assert settings["adapter.rank"] == (8, "pipelines.yaml:12")
    assert settings["adapter.alpha"] == (16.0, "default")
    assert settings["gates.better.margin"] == (0.0, "pipelines.yaml:16")
    assert settings["data.labels"] == (["cat", "dog"], "pipelines.yaml:8")


def test_show_masks_secrets_in_addresses() -> None:
    secret = "https://user:hunter2@host.example/rows.jsonl?X-Amz-Signature=abcdef&part=3&token=t0ps3cret"
    config = read(changed(**{"demo.data.source": secret, "demo.data.sha256": "0" * 64}))

    shown = json.dumps([str(setting) for setting in config.show("demo")])

    assert "https://***@host.example/rows.jsonl?X-Amz-Signature=***&part=3&token=***" in shown
    for word in ("hunter2", "abcdef", "t0ps3cret"):
        assert word not in shown


@pytest.mark.parametrize(
    "changes",
    [
        {"demo.base.source": "https://user:hunter2@host.example/x?token=t0ps3cret"},
        {"demo.data.sources": [{"source": "https://user:hunter2@host.example/x?token=t0ps3cret"}] * 2},
        {"demo.data.source": "http://user:hunter2@host.example/x?token=t0ps3cret", "demo.data.sha256": "0" * 64},
        {"demo.data.source": ["https://user:hunter2@host.example/x?token=t0ps3cret"]},
        {"demo.data.labels": "https://user:hunter2@host.example/x?token=t0ps3cret"},
        {"demo.release.store": "s3://user:hunter2@bucket/x?token=t0ps3cret"},
    ],
)
def test_errors_mask_secrets(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        read(changed(**changes))

    assert "hunter2" not in str(caught.value)
    assert "t0ps3cret" not in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "3", "text", "null"])
def test_a_file_that_is_no_mapping_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected the keys `pipelines` and `channels`"):
        read(text.encode())


def test_a_missing_top_level_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"pipelines\.yaml:1: channels: missing; expected: Policies"):
        read(changed(channels=REMOVE))


def test_an_expectation_keeps_its_arguments() -> None:
    check = {"expectation": "expect_column_values_to_be_in_set", "column": "label", "value_set": ["a", 1]}

    (read_check,) = read(changed(**{"demo.data.checks": [check]})).pipeline("demo").data.checks

    assert read_check.expectation == "expect_column_values_to_be_in_set"
    assert read_check.arguments == {"column": "label", "value_set": ["a", 1]}


def test_the_schema_describes_every_field() -> None:
    described = 0
    for name, model in schema()["$defs"].items():
        for key, field in model["properties"].items():
            # A field whose docstring equals that of its model has only the reference.
            assert field.get("description") or "$ref" in field, f"{name}.{key} has no docstring"
            described += 1

    assert described > 60


def test_a_stage_of_resources_that_is_none_is_named_with_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"resources\.trains: given 'trains'; expected 'fetch', .*did you mean train\?"
    ):
        read(changed(**{"demo.resources": {"trains": {"gpus": 1}}}))


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"gpus": -1}, r"resources\.train\.gpus: given -1; expected"),
        ({"gpus": 1.5}, r"resources\.train\.gpus: given 1\.5; expected a whole number"),
        ({"cores": 0}, r"resources\.train\.cores: given 0; expected"),
        ({"memory_gb": 0}, r"resources\.train\.memory_gb: given 0; expected"),
        ({"memory_gb": "8GB"}, r"resources\.train\.memory_gb: given \"8GB\"; expected a number"),
        ({"memory": 8}, r"resources\.train\.memory: unknown key; did you mean `memory_gb`\?"),
        (2, r"resources\.train: given 2; expected a mapping"),
    ],
)
def test_resources_of_a_wrong_kind_are_told_with_their_line(asked: object, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"pipelines\.yaml:\d+: pipelines\.demo\.{told}"):
        read(changed(**{"demo.resources": {"train": asked}}))
