"""A rollout is driven: a bad candidate is gone within its first share, a good one moves on, faults decide nothing."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from graftline.digest import of_bytes
from graftline.errors import ConfigError, PromotionError
from graftline.registry import channel as channels
from graftline.registry.channel import ChannelChange, Entry, RolloutStep
from graftline.registry.file_store import FileStore
from graftline.registry.rollout import Hand, go_back
from graftline.serve import ADMIN_TOKENS_VARIABLE
from graftline.serve.app import AccessRules, Server
from graftline.serve.rollouts import Answered, Observed, Split
from graftline.serve.scheduler import Limits, Scheduler
from graftline.serve.served_base import Runtime
from graftline.settings.channels import Rollout, RolloutJudge
from graftline.workflow.rolling_out import Driver, drive, open_driver, rule_of
from tests.registry.people import NOW, VERDICT, People
from tests.serve.conftest import ADMIN_TOKEN, run, runtime, tiny
from tests.serve.following import make_follower, make_release, promote
from tests.serve.test_rollouts import start_rollout, wait_for
from tests.settings.documents import changed

__all__ = ["runtime", "tiny"]

ROLLOUT = Rollout(shares=(50, 80, 100), hold="30m")
NAME = ("demo", "production")


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ADMIN_TOKENS_VARIABLE, f"{ADMIN_TOKEN}, another")


class TimedStore(FileStore):
    """A store whose clock stands still until it is set."""

    time = NOW

    def now(self) -> datetime:
        return self.time


@pytest.fixture
def store(tmp_path: Path) -> TimedStore:
    return TimedStore(tmp_path / "store")


def head_of(store: FileStore) -> Entry:
    head = channels.head(store, *NAME)
    assert head is not None
    return head


def actions(store: FileStore) -> list[str]:
    return [
        change.rollout.step if (change := entry.change).rollout else change.action
        for entry in channels.read(store, *NAME).entries
    ]


@pytest.mark.slow
def test_a_bad_candidate_is_gone_within_the_first_share_and_no_request_is_lost(
    tiny: Path, runtime: Runtime, tmp_path: Path
) -> None:
    """Two releases behind a real server under real requests; the candidate begins every answer like a refusal."""
    store = FileStore(tmp_path / "store")
    follower = make_follower(store, tiny, runtime, tmp_path / "fetched")
    good, bad = (make_release(store, tiny, tmp_path, seed=seed) for seed in (1, 2))
    promote(store, *good)
    body = {"model": "demo@production", "prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0}
    statuses: list[int] = []
    stop = threading.Event()
    server = Server(
        follower.catalog,  # type: ignore[attr-defined]
        Scheduler(Limits(max_batch=8, max_waiting=256)),
        follower,
        AccessRules(admin_tokens=(ADMIN_TOKEN,)),
    )
    with run(server) as url, httpx.Client(base_url=url, timeout=60) as client:
        wait_for(lambda: follower.status()["demo@production"]["version"])
        promote(store, *bad, to="staging")
        text = {}
        for (version, _), channel in ((good, "production"), (bad, "staging")):
            watching = make_follower(store, tiny, runtime, tmp_path / f"probe-{channel}", channels=(channel,))
            watching.poll()
            probe = Server(watching.catalog, Scheduler(Limits()), watching)  # type: ignore[attr-defined]
            with run(probe) as other:
                asked = httpx.post(f"{other}/v1/completions", json=body | {"model": f"demo@{channel}"}, timeout=60)
            text[version] = asked.json()["choices"][0]["text"]
        refusal = text[bad[0]].lstrip()
        assert refusal
        assert not text[good[0]].lstrip().casefold().startswith(refusal.casefold())
        rollout = Rollout(shares=(50, 100), hold="1s", judge=RolloutJudge(window="1s", refusals=(refusal,)))
        follower.judges = {"production": rollout.judge}
        start_rollout(store, *bad)

        def users() -> None:
            number = 0
            while not stop.is_set():
                statuses.append(client.post("/v1/completions", json=body | {"user": f"{number}"}).status_code)
                number += 1

        thread = threading.Thread(target=users)
        thread.start()
        try:
            told: list[str] = []
            end = drive(Driver(store, NAME, rollout, [url]), every_seconds=0.2, tell=told.append)
            wait_for(lambda: follower.status()["demo@production"]["share"] is None)
        finally:
            stop.set()
            thread.join()
    assert end.version == good[0]
    assert [action for action in actions(store) if action != "hold"] == ["promote", "start", "rollback"]
    assert head_of(store).change.reason.startswith("refusals: refusals 1 against 0: worse than allowed")
    assert told[-1].startswith(good[0])
    assert set(statuses) == {200}


# --- with servers that only report ------------------------------------------------------------------------------------


class Reporting:
    """What a server has observed, over HTTP; ``answer`` replaces it."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.observed = Observed(lambda: self.time)
        self.answer: tuple[int, bytes] | None = None

    def follow(self, head: Entry, split: dict[str, Any] | None = None) -> None:
        """Divide the traffic as the channel's entry says."""
        step = head.change.rollout
        assert step is not None
        self.split = Split(
            channel="@".join(NAME),
            salt=step.salt,
            incumbent="demo@a",
            candidate=f"demo@{step.version}",
            share=step.share / 100,
            window_seconds=10,
            **(split or {}),
        )
        self.observed.set(self.split.channel, self.split)

    def traffic(self, num_keys: int, *, candidates_errors: float = 0.0) -> None:
        """Keys that all come and end."""
        rng = np.random.default_rng(num_keys)
        for number in range(num_keys):
            key = f"user: {self.time} {number}"
            arm = self.split.arm(key)
            watch = self.observed.begin(self.split, key, arm)
            assert watch is not None
            failed = arm == "candidate" and rng.random() < candidates_errors
            watch.end(Answered(failed=failed, seconds=None if failed else 1.0, tokens=None if failed else 100))
        self.time += 20


@contextmanager
def served(reporting: Reporting) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = reporting.answer or (200, json.dumps(reporting.observed.report()).encode())
            if self.headers["authorization"] != f"Bearer {ADMIN_TOKEN}":
                status, body = 403, b"{}"
            self.send_response(status if self.path == "/v1/rollouts" else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def started(store: TimedStore) -> Entry:
    """Production holds ``a`` and tries ``b`` on half of its keys."""
    change = ChannelChange(
        action="promote",
        version="a",
        release=of_bytes(b"a"),
        verdict=VERDICT,
        actor="ci",
        reason="nightly",
        time=NOW,
    )
    channels.append(store, channels.next_entry(channels.read(store, *NAME), change))
    step = RolloutStep(step="start", version="b", release=of_bytes(b"b"), share=50, started=2, salt="5" * 32)
    change = change.model_copy(update={"action": "rollout", "rollout": step})
    entry = channels.next_entry(channels.read(store, *NAME), change)
    channels.append(store, entry)
    return entry


def test_a_good_candidate_gets_share_after_share_each_on_evidence_of_its_own(store: TimedStore, started: Entry) -> None:
    reporting = Reporting()
    with served(reporting) as url:
        driver = Driver(store, NAME, ROLLOUT, [url])
        for step, share in (("share", 80), ("promote", None)):
            reporting.follow(head_of(store))
            reporting.traffic(30)
            before = len(channels.read(store, *NAME).entries)
            assert driver.look().told.startswith("a (")  # the time at this share is not over
            assert len(channels.read(store, *NAME).entries) == before
            store.time += timedelta(minutes=31)
            driver.look()  # too few keys: a hold is written, once
            before = len(channels.read(store, *NAME).entries)
            assert driver.look().under_way
            assert len(channels.read(store, *NAME).entries) == before
            reporting.traffic(1500)
            driver.look()
            now = head_of(store).change
            assert (now.rollout.step if now.rollout else now.action, now.rollout and now.rollout.share) == (step, share)
        end = driver.look()
    assert (end.version, end.under_way) == ("b", False)
    assert actions(store) == ["promote", "start", "hold", "share", "hold", "promote"]


def test_nothing_moves_on_before_the_hold_is_over_but_a_bad_one_goes_back_at_once(
    store: TimedStore, started: Entry
) -> None:
    reporting = Reporting()
    reporting.follow(started)
    slow = Rollout(shares=(50, 100), hold="9999d")
    with served(reporting) as url:
        driver = Driver(store, NAME, slow, [url])
        reporting.traffic(2000)
        assert driver.judge(started).decision == "on"
        assert driver.look().under_way
        assert actions(store) == ["promote", "start"]
        reporting.observed.set(reporting.split.channel, None)
        reporting.follow(started)
        reporting.traffic(400, candidates_errors=0.9)
        assert not Driver(store, NAME, slow, [url]).look().under_way
    assert actions(store)[-1] == "rollback"
    assert head_of(store).change.reason.startswith("errors: errors 0.")


def test_a_driver_whose_key_may_only_go_back_waits_for_another_to_move_on_and_goes_back(
    store: TimedStore, started: Entry, tmp_path: Path
) -> None:
    people, reporting = People(tmp_path), Reporting()
    reporting.follow(started)
    with served(reporting) as url:
        driver = Driver(store, NAME, ROLLOUT, [url], hand=Hand(people.keys, people.private_key("rob")))
        store.time += timedelta(minutes=31)
        assert driver.look().under_way  # no evidence yet: a note is not its to write either
        reporting.traffic(1500)
        assert driver.judge(started).decision == "on"
        assert driver.look().under_way
        assert actions(store) == ["promote", "start"]
        reporting.observed.set(reporting.split.channel, None)
        reporting.follow(started)
        reporting.traffic(400, candidates_errors=0.9)
        driver.keys.clear()
        assert not driver.look().under_way
    seal = head_of(store).seal
    assert (seal and seal.signer, actions(store)[-1]) == ("rob", "rollback")


def test_a_server_that_restarts_loses_no_key_that_was_reported(store: TimedStore, started: Entry) -> None:
    reporting = Reporting()
    reporting.follow(started)
    with served(reporting) as url:
        driver = Driver(store, NAME, ROLLOUT, [url, url])
        reporting.traffic(300)
        assert sum(driver.judge(started).num_keys) == 300
        reporting.observed = Observed(lambda: reporting.time)
        assert sum(driver.judge(started).num_keys) == 300
        reporting.follow(started)
        reporting.traffic(10)
        assert sum(driver.judge(started).num_keys) == 310


@pytest.mark.parametrize(
    "answer",
    [
        (500, b"oops"),
        (200, b"<html>"),
        (200, b"[]"),
        (200, b"{}"),
        (200, b'{"demo@production": {"candidate": "demo@b", "share": 0.5, "keys": [{}]}}'),
        (200, b'{"demo@production": {"candidate": "demo@b", "share": 0.5}}'),
        (200, b'{"demo@production": {"candidate": "demo@c", "share": 0.5, "keys": []}}'),
        (200, b'{"demo@production": {"candidate": "demo@b", "share": 0.05, "keys": []}}'),
    ],
)
def test_a_server_that_says_nothing_useful_decides_nothing(
    store: TimedStore, started: Entry, answer: tuple[int, bytes]
) -> None:
    reporting = Reporting()
    reporting.answer = answer
    with served(reporting) as url:
        assert Driver(store, NAME, ROLLOUT, [url, "http://127.0.0.1:9"]).judge(started).num_keys == (0, 0)


def test_a_token_that_the_server_refuses_is_explained(
    store: TimedStore, started: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ADMIN_TOKENS_VARIABLE, "wrong")
    with served(Reporting()) as url, pytest.raises(ConfigError, match=f"answers 403; set {ADMIN_TOKENS_VARIABLE}"):
        Driver(store, NAME, ROLLOUT, [url]).look()


def test_of_two_drivers_one_decides_and_the_other_sees_it(store: TimedStore, started: Entry) -> None:
    reporting = Reporting()
    reporting.follow(started)
    reporting.traffic(400, candidates_errors=0.9)
    with served(reporting) as url:
        one, two = (Driver(store, NAME, ROLLOUT, [url]) for _ in range(2))
        standing = two.judge(started)
        assert not one.look().under_way
        told = []
        two._decide, decide = (lambda head, _: decide(started, standing)), two._decide  # type: ignore[method-assign]
        two.judge = lambda head: standing  # type: ignore[method-assign]
        told.append(two.look())
    assert not told[0].under_way
    assert len(channels.read(store, *NAME).entries) == 3


def test_a_store_that_is_away_changes_nothing_and_the_next_look_goes_on(
    store: TimedStore, started: Entry, tmp_path: Path
) -> None:
    told: list[str] = []
    folder = tmp_path / "store"
    away = folder.with_name("away")
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 1:
            folder.rename(away)
        else:
            away.rename(folder)
            go_back(store, started, reason="a person's decision")

    with served(Reporting()) as url:
        end = drive(Driver(store, NAME, ROLLOUT, [url]), every_seconds=0.0, tell=told.append, pause=pause)
    assert (end.version, end.under_way) == ("a", False)
    assert "nothing was decided" in told[1]
    assert told[-1] == "rollback: a person's decision"


def test_a_channel_that_holds_nothing_or_has_no_shares_is_explained(
    store: TimedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PromotionError, match="nothing was ever promoted"):
        Driver(store, NAME, ROLLOUT, ["http://127.0.0.1:9"]).look()
    monkeypatch.chdir(tmp_path)
    Path("pipelines.yaml").write_bytes(changed())
    with pytest.raises(ConfigError, match=r"channels.production of pipelines.yaml has no `rollout`"):
        open_driver("demo", "production", ["http://127.0.0.1:9"])


def test_the_rule_has_the_margins_of_pipelines_yaml() -> None:
    rule = rule_of(ROLLOUT, 50)
    assert (rule.share, rule.num_shares, rule.alpha) == (0.5, 2, 0.05)
    assert rule.margins["slower"] == pytest.approx(1.25 / 2.25 - 0.5)
    assert rule.margins["longer"] == rule.margins["shorter"] == pytest.approx(0.1)
