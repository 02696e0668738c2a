"""Two versions under traffic: keys keep theirs, answers are counted for the right one, a bad one is gone soon."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from graftline.digest import Digest
from graftline.registry import channel as channels
from graftline.registry.channel import ChannelChange, RolloutStep
from graftline.registry.file_store import FileStore
from graftline.registry.rollout import go_back, move
from graftline.serve.app import AccessRules, Server
from graftline.serve.follower import Follower
from graftline.serve.rollouts import Answered, Observed, Split, key_of, merged
from graftline.serve.scheduler import Limits, Scheduler
from graftline.serve.served_base import Runtime
from graftline.settings.channels import Rollout, RolloutJudge
from tests.serve.conftest import ADMIN_TOKEN, run
from tests.serve.following import make_follower, make_release, promote

SPLIT = Split(channel="demo@production", salt="0" * 32, incumbent="demo@a", candidate="demo@b", share=0.25)
ADMIN = {"authorization": f"Bearer {ADMIN_TOKEN}"}


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def observed(clock: Clock) -> Observed:
    made = Observed(clock, max_keys=50)
    made.set(SPLIT.channel, SPLIT)
    return made


def ask(observed: Observed, key: str, answered: Answered, split: Split = SPLIT) -> None:
    watch = observed.begin(split, key, split.arm(key))
    assert watch is not None
    watch.end(answered)


def keys(observed: Observed, channel: str = SPLIT.channel) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = observed.report()[channel]["keys"]
    return found


def test_a_share_is_what_it_says_and_a_larger_one_only_adds_keys() -> None:
    names = [f"user: {number}" for number in range(20_000)]
    small = {name for name in names if SPLIT.arm(name) == "candidate"}
    larger = Split(**{**vars(SPLIT), "share": 0.5})
    assert len(small) / len(names) == pytest.approx(0.25, abs=0.02)
    assert small < {name for name in names if larger.arm(name) == "candidate"}
    other = Split(**{**vars(SPLIT), "salt": "1" * 32})
    both = sum(other.arm(name) == "candidate" for name in small) / len(small)
    assert both == pytest.approx(0.25, abs=0.03)


def test_mirrored_keys_are_some_of_the_incumbents() -> None:
    split = Split(**{**vars(SPLIT), "mirror": 0.4})
    names = [f"user: {number}" for number in range(20_000)]
    mirrored = [name for name in names if split.is_mirrored(name)]
    assert all(split.arm(name) == "incumbent" for name in mirrored)
    assert len(mirrored) / sum(split.arm(name) == "incumbent" for name in names) == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"user": "ada", "prompt_cache_key": "x"}, "user: ada"),
        ({"user": "ada", "safety_identifier": "s"}, "safety_identifier: s"),
        ({"prompt_cache_key": "x", "user": None}, "prompt_cache_key: x"),
        ({"user": ""}, "text: a\nb"),
        ({}, "text: a\nb"),
    ],
)
def test_a_key_is_the_user_or_the_conversation(fields: dict[str, Any], key: str) -> None:
    assert key_of(fields, ["a", "b"]) == key


def test_a_key_counts_once_with_the_means_of_its_requests(observed: Observed, clock: Clock) -> None:
    for seconds, tokens, failed in ((1.0, 9, False), (4.0, 99, False), (None, None, True)):
        ask(observed, "ada", Answered(seconds=seconds, tokens=tokens, failed=failed))
    ask(observed, "eve", Answered(seconds=1.0, tokens=0, refused=True, ended=False))
    assert keys(observed) == []  # their windows are not over
    clock.now += 601
    (ada, eve) = keys(observed)
    assert (ada["errors"], ada["seconds"], ada["tokens"]) == (1 / 3, pytest.approx(2.0), pytest.approx(1000**0.5))
    assert (eve["refusals"], eve["unended"], eve["tokens"], eve["feedback"]) == (1.0, 1.0, 1.0, 0.5)
    assert "ada" not in json.dumps(observed.report())


def test_what_has_not_ended_when_the_window_is_over_did_not_end(observed: Observed, clock: Clock) -> None:
    watch = observed.begin(SPLIT, "ada", "incumbent")
    clock.now += 301
    assert observed.begin(SPLIT, "ada", "incumbent") is None  # it may have no time left to end
    clock.now += 300
    assert watch is not None
    watch.end(Answered(seconds=601.0, tokens=5))
    assert [(key["unended"], key["seconds"], key["errors"]) for key in keys(observed)] == [(1.0, None, 0.0)]


def test_a_clock_that_jumps_back_ends_the_windows_of_keys_from_the_future(observed: Observed, clock: Clock) -> None:
    ask(observed, "ada", Answered(seconds=1.0, tokens=1))
    clock.now -= 5000
    assert observed.begin(SPLIT, "ada", "incumbent") is None
    assert len(keys(observed)) == 1


def test_another_share_begins_with_no_keys_and_a_hold_keeps_them(observed: Observed, clock: Clock) -> None:
    ask(observed, "ada", Answered(seconds=1.0, tokens=1))
    clock.now += 601
    observed.set(SPLIT.channel, Split(**vars(SPLIT)))
    assert len(keys(observed)) == 1
    observed.set(SPLIT.channel, Split(**{**vars(SPLIT), "share": 0.5}))
    assert keys(observed) == []
    assert observed.begin(SPLIT, "eve", "incumbent") is None  # chosen under the share before
    observed.set(SPLIT.channel, None)
    assert observed.report() == {}


def test_keys_beyond_the_bound_are_not_kept(observed: Observed, clock: Clock) -> None:
    for number in range(50):
        ask(observed, f"{number}", Answered())
    assert observed.begin(SPLIT, "one more", "incumbent") is None
    assert observed.begin(SPLIT, "7", "incumbent") is not None
    clock.now += 601
    assert len(keys(observed)) == 50


def test_feedback_counts_once_an_answer_and_spam_moves_one_key_only(observed: Observed, clock: Clock) -> None:
    for user in ("ada", "eve"):
        for number in range(2):
            ask(observed, user, Answered(seconds=1.0, tokens=1))
            observed.can_be_rated(SPLIT, user, f"{user}-{number}")
    for _ in range(1000):
        assert observed.rate("ada-0", "bad")
    assert observed.rate("ada-1", "bad")
    assert observed.rate("eve-0", "good")
    assert observed.rate("eve-0", "bad")  # changed their mind: the last one counts
    assert not observed.rate("never given", "bad")
    clock.now += 601
    assert not observed.rate("eve-1", "bad")  # too late
    assert [key["feedback"] for key in keys(observed)] == [1.0, 0.75]


def test_reports_of_several_servers_are_one_row_of_keys_in_the_order_of_arrival() -> None:
    def key(name: str, first: float, errors: float) -> dict[str, Any]:
        rest = {"seconds": None, "tokens": 2.0, "refusals": 0.0, "unended": 0.0, "feedback": 0.5}
        return {"key": name, "first": first, "candidate": name == "b", "errors": errors} | rest

    figures, is_candidate = merged(
        [{"keys": [key("a", 2.0, 0.5), key("b", 3.0, 1.0)]}, {"keys": [key("a", 1.0, 0.0), key("c", 0.5, 0.0)]}]
    )
    assert figures["errors"].tolist() == [0.0, 0.0, 1.0]
    assert is_candidate.tolist() == [False, False, True]
    assert np.isnan(figures["seconds"]).all()
    assert merged([])[0]["errors"].shape == (0,)


# --- lived ------------------------------------------------------------------------------------------------------------


def start_rollout(store: FileStore, version: str, digest: Digest, *, share: int = 50, mirror: int = 0) -> None:
    log = channels.read(store, "demo", "production")
    assert log.head is not None
    step = RolloutStep(
        step="start",
        version=version,
        release=digest,
        share=share,
        mirror=mirror,
        started=log.head.number + 1,
        salt="5" * 32,
    )
    change = log.head.change.model_copy(update={"action": "rollout", "rollout": step})
    channels.append(store, channels.next_entry(log, ChannelChange.model_validate(dict(change))))


@pytest.fixture
def follower(store: FileStore, tiny: Path, runtime: Runtime, tmp_path: Path) -> Follower:
    made = make_follower(store, tiny, runtime, tmp_path / "fetched")
    made.judges = {"production": RolloutJudge(window="2s")}
    return made


@pytest.fixture
def releases(store: FileStore, tiny: Path, tmp_path: Path, follower: Follower) -> list[tuple[str, Digest]]:
    """Two releases; production holds the first."""
    made = [make_release(store, tiny, tmp_path, seed=seed) for seed in (1, 2)]
    promote(store, *made[0])
    follower.poll()
    return made


@pytest.fixture
def url(follower: Follower, releases: list[tuple[str, Digest]]) -> Iterator[str]:
    access = AccessRules(admin_tokens=(ADMIN_TOKEN,))
    catalog = follower.catalog  # type: ignore[attr-defined]
    with run(Server(catalog, Scheduler(Limits(max_batch=8, max_waiting=256)), follower, access)) as address:
        yield address


def wait_for(store_has: Any) -> None:
    deadline = time.monotonic() + 30
    while not store_has():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def complete(client: httpx.Client, user: str, **more: Any) -> httpx.Response:
    body = {"model": "demo@production", "prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "user": user} | more
    return client.post("/v1/completions", json=body)


def share_of(follower: Follower) -> float | None:
    share: float | None = follower.status()["demo@production"]["share"]
    return share


def test_users_keep_their_version_and_no_request_is_lost_when_a_candidate_comes_and_goes(
    url: str, follower: Follower, store: FileStore, releases: list[tuple[str, Digest]]
) -> None:
    """Users ask all the time, streamed and whole, while the rollout starts and is ended."""
    start_rollout(store, *releases[1])
    wait_for(lambda: share_of(follower) == 0.5)
    seen: dict[str, set[str]] = {}
    statuses: Counter[int] = Counter()
    stop, ended = threading.Event(), threading.Event()

    def users(first: int) -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            number = first
            while not stop.is_set():
                user, is_after = f"{number % 40}", ended.is_set()
                answer = complete(client, user, stream=number % 3 == 0)
                statuses[answer.status_code] += 1
                text = answer.text.partition("data: ")[2].partition("\n")[0] or answer.text
                if is_after == ended.is_set():  # what began before the end may be answered as before
                    seen.setdefault(user, set()).add(json.loads(text)["system_fingerprint"])
                number += 2

    threads = [threading.Thread(target=users, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(seen) == 40)
    assert all(len(versions) == 1 for versions in seen.values()), "a user met two versions"
    assert {version for versions in seen.values() for version in versions} == {f"demo@{one[0]}" for one in releases}
    head = channels.head(store, "demo", "production")
    assert head is not None
    go_back(store, head, reason="looks bad")
    wait_for(lambda: share_of(follower) is None)
    ended.set()
    seen.clear()
    wait_for(lambda: len(seen) == 40)
    stop.set()
    for thread in threads:
        thread.join()
    assert {version for versions in seen.values() for version in versions} == {f"demo@{releases[0][0]}"}
    assert statuses.keys() == {200}


def test_versions_are_counted_apart_and_reported_to_administrators_only(
    url: str, follower: Follower, store: FileStore, releases: list[tuple[str, Digest]]
) -> None:
    start_rollout(store, *releases[1], mirror=100)
    wait_for(lambda: share_of(follower) == 0.5)
    with httpx.Client(base_url=url, timeout=60) as client:
        answers = [complete(client, f"{number}").json() for number in range(20)]
        rated = client.post("/v1/feedback", json={"id": answers[0]["id"], "rating": "bad"}).json()
        assert rated == {"id": answers[0]["id"], "counted": True}
        for wrong in ({"id": "x"}, {"id": "x", "rating": "ugly"}, {"id": "x", "rating": "bad", "user": 1}):
            assert client.post("/v1/feedback", json=wrong).status_code == 400
        assert client.get("/v1/rollouts").status_code == 403
        wait_for(lambda: len(client.get("/v1/rollouts", headers=ADMIN).json()["demo@production"]["keys"]) == 20)
        found = client.get("/v1/rollouts", headers=ADMIN).json()["demo@production"]
        metrics = client.get("/metrics").text
    assert {answer["model"] for answer in answers} == {"demo@production"}
    by_version = Counter(answer["system_fingerprint"] for answer in answers)
    assert sum(key["candidate"] for key in found["keys"]) == by_version[f"demo@{releases[1][0]}"]
    assert sum(key["feedback"] == 1.0 for key in found["keys"]) == 1
    for role, version in (("incumbent", releases[0][0]), ("candidate", releases[1][0])):
        line = (
            f'graftline_rollout_requests_total{{channel="demo@production",outcome="answered",role="{role}",'
            f'version="demo@{version}"}} {by_version[f"demo@{version}"]:.1f}'
        )
        assert line in metrics
    assert f'outcome="answered",role="shadow",version="demo@{releases[1][0]}"' in metrics


def test_a_candidate_that_cannot_be_served_gets_no_traffic(
    follower: Follower, store: FileStore, tiny: Path, tmp_path: Path, releases: list[tuple[str, Digest]]
) -> None:
    broken = make_release(store, tiny, tmp_path, seed=3, has_answers=False)
    start_rollout(store, *broken)
    follower.poll()
    state = follower.status()["demo@production"]
    assert (state["version"], state["candidate"], state["share"]) == (releases[0][0], None, None)
    assert "no recorded answers" in state["error"]
    assert follower.observed.split("demo@production") is None


def test_the_last_share_serves_the_candidate_to_everybody(
    follower: Follower, store: FileStore, releases: list[tuple[str, Digest]]
) -> None:
    start_rollout(store, *releases[1])
    follower.poll()
    split = follower.observed.split("demo@production")
    assert split is not None
    for _ in range(2):  # a hold changes nothing, and the store being away neither
        head = channels.head(store, "demo", "production")
        assert head is not None
        move(store, head, Rollout(shares=(50, 100)), on=False, reason="not decided")
        follower.poll()
        assert follower.observed.split("demo@production") == split
    head = channels.head(store, "demo", "production")
    assert head is not None
    move(store, head, Rollout(shares=(50, 100)), on=True, reason="not worse")
    follower.poll()
    state = follower.status()["demo@production"]
    assert (state["version"], state["candidate"], state["error"]) == (releases[1][0], None, None)
    assert follower.observed.split("demo@production") is None
