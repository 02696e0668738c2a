"""Combinations of a channel's fields that cannot work, and when a channel has an anchor."""

from typing import Any

import pytest

from graftline.errors import ConfigError
from tests.settings.documents import changed, read

SMALL = {"metric": "adapter_bytes", "direction": "lower", "test": "limit", "limit": 1e9}

CHANNELS: list[tuple[dict[str, Any], str]] = [
    (
        {"channels.production.after": "canary"},
        "channels.production.after: given 'canary'; expected another channel: staging",
    ),
    ({"channels.production.after": "production"}, "expected another channel: staging"),
    ({"channels.production.served_by": "sglang"}, "given \"sglang\"; expected 'graftline' or 'vllm'"),
    (
        {"demo.base.served_by": "graftline", "channels.production.served_by": "vllm"},
        "demo.base.served_by: given graftline, but `channels.production.served_by` says vllm; expected one server",
    ),
    (
        {"channels.production.after": "staging", "channels.staging.after": "production"},
        "channels.staging.after: given 'production': staging after production after staging; nothing could ever enter",
    ),
    ({"channels.production.soak_hours": 24}, "channels.production.soak_hours: given without `after`"),
    (
        {"channels.production.reserve": True},
        "demo.data.reserve_rows: given 0 with `channels.production.reserve: on`; write how many",
    ),
    ({"demo.data.reserve_rows": 300}, "demo.data.reserve_rows: given 300, and no channel asks for them"),
    (
        {"channels.production.reserve": True, "demo.data.reserve_rows": 99},
        "demo.data.reserve_rows: given 99; expected at least 100: with fewer the gate better is inconclusive",
    ),
    (
        {"channels.production.reserve": True, "demo.data.reserve_rows": 300, "demo.gates": {"small": SMALL}},
        "demo.data.reserve_rows: given 300, and no gate judges rows; add one on accuracy",
    ),
    (
        {"channels.production.reserve": True, "demo.data.reserve_rows": 300, "demo.data.max_rows": 500},
        "demo.data.evaluation_rows: given 200 and 300 `reserve_rows`; expected less than `max_rows`, 500",
    ),
    (
        {
            "channels.production.freeze_windows": [
                {"starts": "2026-12-27T00:00:00Z", "ends": "2026-12-24T00:00:00Z", "reason": "holidays"}
            ]
        },
        "channels.production.freeze_windows.0.ends: is not after `starts`",
    ),
]


def test_a_head_for_classes_is_not_released_into_a_channel_that_vllm_serves() -> None:
    head = {"demo.train.objective": {"kind": "classify"}, "demo.package.merged": False}
    with pytest.raises(ConfigError, match=r"release\.channel: served by vllm, which loads no adapter with a head"):
        read(changed(**head, **{"channels.production.served_by": "vllm"}))


@pytest.mark.parametrize(("changes", "message"), CHANNELS)
def test_a_channel_policy_that_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(changed(**changes))

    assert message in str(caught.value)


PERSON: list[dict[str, Any]] = [{"count": 1}, {"roles": ["reviewer"]}, {"other_than_builder": True}]


@pytest.mark.parametrize(
    ("changes", "anchored"),
    [
        ({}, True),
        ({"channels.production.anchor": "off"}, False),
        *(({"channels.production.approvals": asked}, False) for asked in PERSON),
        ({"channels.production.approvals": {"count": 1}, "channels.production.anchor": "on"}, True),
        # No margin adds up where each release is compared with the base, or must be better than the one before.
        ({"demo.gates.better.against": "base"}, False),
        ({"demo.gates.better.test": "superiority"}, False),
        ({"demo.gates.better.against": "anchor", "channels.production.approvals": {"count": 1}}, True),
    ],
    ids=str,
)
def test_a_channel_that_promotes_without_a_person_has_an_anchor(changes: dict[str, Any], anchored: bool) -> None:
    config = read(changed(**({"demo.gates.better.against": "production"} | changes)))
    assert config.is_anchored("demo") == anchored


def test_a_gate_against_an_anchor_that_is_switched_off_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"gates\.better\.against: given anchor with `channels\.production\.anchor: off`"
    ):
        read(changed(**{"demo.gates.better.against": "anchor", "channels.production.anchor": "off"}))


def test_training_may_start_from_an_anchor_that_candidates_are_compared_with() -> None:
    anchored = {"demo.gates.better.against": "production", "demo.train.start_from": "anchor"}
    assert read(changed(**anchored)).pipeline("demo").train.start_from == "anchor"
    for without in ({"channels.production.anchor": "off"}, {"channels.production.approvals": {"count": 1}}):
        with pytest.raises(
            ConfigError, match=r"train\.start_from: given anchor, but no gate compares .* write production"
        ):
            read(changed(**anchored, **without))


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ({"store": "http://logs"}, "request_log.store: given 'http://logs'; expected a folder or s3://bucket/prefix"),
        ({"store": "./store/"}, "request_log.store: given the release store of demo, or a folder in it"),
        ({"store": "store/logs"}, "request_log.store: given the release store of demo, or a folder in it"),
        ({"store": "logs", "remove": ["a", "("]}, "request_log.remove.1: given '('; expected a regular expression"),
        (
            {"store": "logs", "remove": ["(?=a)b"]},
            "request_log.remove.0: given '(?=a)b'; expected a regular expression",
        ),
        ({"store": "logs", "remove": ["x*"]}, "request_log.remove.0: given 'x*', which also matches an empty text"),
        ({"store": "logs", "percent": 0}, "request_log.percent"),
        ({"store": "logs", "retention_days": 0}, "request_log.retention_days"),
        ({"percent": 5}, "request_log.store: missing"),
    ],
    ids=str,
)
def test_a_request_log_that_could_leak_or_not_work_is_refused(log: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read(changed(**{"demo.release.store": "store", "channels.production.request_log": log}))
    assert message in str(refused.value)


def test_a_request_log_is_kept_below_the_project_s_folder() -> None:
    config = read(changed(**{"channels.production.request_log": {"store": "store-logs", "remove": [r"\d{4}"]}}))
    log = config.request_log("production")
    assert log is not None
    assert log.store == str(config.root / "store-logs")
    assert config.request_log("staging") is None
