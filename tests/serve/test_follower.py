"""A promotion in the store is served; what does not verify is not, and the old one stays."""

import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from graftline.adapters.peft_format import load_adapter
from graftline.digest import of_bytes
from graftline.errors import PromotionError, StoreError
from graftline.export.onnx_session import Precision
from graftline.registry import channel as channels
from graftline.registry.file_store import FileStore
from graftline.registry.store import open_store
from graftline.serve import smoke
from graftline.serve.app import AccessRules, Server
from graftline.serve.catalog import Catalog
from graftline.serve.follower import ChannelRef, Follower
from graftline.serve.scheduler import Scheduler
from graftline.serve.served_base import Base, Runtime
from graftline.weights.identity import read_identity
from graftline.weights.quant.linear import load_model
from tests.registry.people import People
from tests.serve.conftest import ADMIN_TOKEN, make_adapter, run
from tests.serve.following import (
    PROMPTS,
    assert_refused,
    leased,
    make_follower,
    make_release,
    promote,
    releases_on_disk,
    served,
    state_of,
)
from tests.tiny import make_tiny_llama


def test_a_promotion_and_a_rollback_are_served_without_a_restart(
    follower: Follower, store: FileStore, tiny: Path, tmp_path: Path
) -> None:
    first, second = (make_release(store, tiny, tmp_path, seed=seed) for seed in (1, 2))
    promote(store, *first)
    follower.start()
    assert served(follower) == f"demo@{first[0]}"
    for version, digest in (second, first):
        promote(store, version, digest)
        deadline = time.monotonic() + 10
        while served(follower) != f"demo@{version}":
            assert time.monotonic() < deadline
            time.sleep(0.02)
    follower.stop()
    assert follower.status()["demo@production"]["error"] is None
    assert follower.status()["demo@production"]["entry"] == 3


def test_a_look_that_finds_nothing_new_costs_two_requests_and_some_read_the_listing_again(
    follower: Follower, store: FileStore, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(store, *make_release(store, tiny, tmp_path, seed=1))
    follower.poll()
    asked: list[str] = []
    original_get, original_list = store.get, store.list
    monkeypatch.setattr(store, "get", lambda key: asked.append(key) or original_get(key))
    monkeypatch.setattr(store, "list", lambda prefix: asked.append(prefix) or original_list(prefix))
    follower.poll()
    assert asked == ["channels/demo/production/0000000002.json", "channels/demo/production/0000000001.json"]
    for _ in range(20):
        follower.poll()
    assert asked.count("channels/demo/production") == 1


def test_the_served_tokens_are_those_of_the_release(
    follower: Follower, store: FileStore, tiny: Path, tmp_path: Path
) -> None:
    promote(store, *make_release(store, tiny, tmp_path, seed=1))
    follower.poll()
    model = follower.catalog.resolve("demo@production")  # type: ignore[attr-defined]
    for sample in smoke.read(tmp_path / "package-1"):
        assert smoke.greedy(model, sample.prompt, len(sample.answer)) == sample.answer


def test_a_release_whose_answers_differ_is_not_served_and_the_reason_is_told(
    follower: Follower, store: FileStore, tiny: Path, tmp_path: Path
) -> None:
    good = make_release(store, tiny, tmp_path, seed=1)
    promote(store, *good)
    follower.poll()
    other = make_adapter(tiny, tmp_path / "other", seed=9)
    promote(store, *make_release(store, tiny, tmp_path, seed=2, answers_of=other))
    follower.poll()
    assert served(follower) == f"demo@{good[0]}"
    state = follower.status()["demo@production"]
    assert state["version"] == good[0]
    assert "recorded answer 0 differs at token" in state["error"]


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_a_graph_in_fewer_bits_serves_what_was_judged_and_refuses_another(
    precision: Precision, store: FileStore, tiny: Path, runtime: Runtime, tmp_path: Path
) -> None:
    follower = make_follower(store, tiny, replace(runtime, precision=precision), tmp_path / "fetched")
    good = make_release(store, tiny, tmp_path, seed=1)
    promote(store, *good)
    follower.poll()
    assert state_of(follower)["error"] is None
    other = make_adapter(tiny, tmp_path / "other", seed=9)
    promote(store, *make_release(store, tiny, tmp_path, seed=2, answers_of=other))
    follower.poll()
    assert state_of(follower)["version"] == good[0]
    assert f"are needed in {precision}" in state_of(follower)["error"]


def test_near_ties_that_fall_otherwise_are_the_same_model_in_fewer_bits(
    tiny: Path, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All gaps together count, against the bounds of the precision."""
    catalog = Catalog()
    catalog.add_base("tiny", Base(tiny, replace(runtime, precision="fp16")))
    smoke.record(load_model(tiny), PROMPTS, tmp_path / smoke.SMOKE_FILE)
    model = catalog.resolve("tiny")
    smoke.check(model, tmp_path)
    for gaps, is_right in (([0.0] * 9 + [0.01], True), ([0.0] * 8 + [0.01] * 2, False), ([0.0] * 9 + [1.0], False)):
        monkeypatch.setattr(smoke, "_gaps", lambda model, sample, gaps=gaps: np.array(gaps))
        if is_right:
            smoke.check(model, tmp_path)
        else:
            with pytest.raises(PromotionError, match="does not run the model that was judged"):
                smoke.check(model, tmp_path)


def test_a_changed_byte_in_the_store_is_not_served(
    follower: Follower, store: FileStore, tiny: Path, tmp_path: Path
) -> None:
    good = make_release(store, tiny, tmp_path, seed=1)
    promote(store, *good)
    follower.poll()
    version, digest = make_release(store, tiny, tmp_path, seed=2)
    file = next((tmp_path / "store").rglob(f"{version}/adapter/adapter_model.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.chmod(0o644)
    file.write_bytes(bytes(data))
    promote(store, version, digest)
    follower.poll()
    assert served(follower) == f"demo@{good[0]}"
    assert follower.status()["demo@production"]["error"]


def test_a_release_of_another_base_is_not_served(
    follower: Follower, store: FileStore, tiny: Path, tmp_path: Path
) -> None:
    other = make_tiny_llama(tmp_path / "other-base", seed=8, num_hidden_layers=1)
    promote(store, *make_release(store, other, tmp_path, seed=1))
    assert_refused(follower, "was trained on the base")


@pytest.mark.parametrize("signer", [None, "mallory"])
def test_a_release_without_a_signature_that_counts_is_not_served(
    signer: str | None, store: FileStore, tiny: Path, runtime: Runtime, tmp_path: Path
) -> None:
    people = People(tmp_path)
    follower = make_follower(store, tiny, runtime, tmp_path / "fetched", people.keys)
    good = make_release(store, tiny, tmp_path, seed=1, private_key=people.private_key("bob"))
    promote(store, *good, people=people)
    follower.poll()
    assert served(follower) == f"demo@{good[0]}"
    private_key = people.private_key(signer) if signer else None
    promote(store, *make_release(store, tiny, tmp_path, seed=2, private_key=private_key), people=people)
    follower.poll()
    assert served(follower) == f"demo@{good[0]}"
    assert "role 'builder'" in follower.status()["demo@production"]["error"] or signer is None
    assert "sign" in follower.status()["demo@production"]["error"]


def test_an_entry_that_nobody_signed_is_not_served(
    store: FileStore, tiny: Path, runtime: Runtime, tmp_path: Path
) -> None:
    """Whoever can write to the bucket writes one, and names a release that a builder did sign."""
    people = People(tmp_path)
    follower = make_follower(store, tiny, runtime, tmp_path / "fetched", people.keys)
    good, other = (
        make_release(store, tiny, tmp_path, seed=seed, private_key=people.private_key("bob")) for seed in (1, 2)
    )
    promote(store, *good, people=people)
    follower.poll()
    promote(store, *other)
    follower.poll()
    assert served(follower) == f"demo@{good[0]}"
    assert "entry 2 of demo/production is not signed" in follower.status()["demo@production"]["error"]


def test_a_release_that_is_not_the_one_that_was_promoted_is_not_served(
    follower: Follower, store: FileStore, tiny: Path, tmp_path: Path
) -> None:
    version, _ = make_release(store, tiny, tmp_path, seed=1)
    promote(store, version, of_bytes(b"what was judged"))
    assert_refused(follower, "it was changed after it was promoted")


def test_a_release_without_recorded_answers_is_not_served(
    follower: Follower, store: FileStore, tiny: Path, tmp_path: Path
) -> None:
    promote(store, *make_release(store, tiny, tmp_path, seed=1, has_answers=False))
    assert_refused(follower, "no recorded answers")


def test_a_release_of_another_template_is_not_served(
    follower: Follower, store: FileStore, tiny: Path, tmp_path: Path
) -> None:
    changed = make_tiny_llama(tmp_path / "changed", num_hidden_layers=1)  # the same weights
    template = changed / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "helper"))
    promote(store, *make_release(store, changed, tmp_path, seed=1))
    assert_refused(follower, "was trained with the template")


def test_clients_get_the_old_release_and_operators_the_reason_when_a_new_one_is_refused(
    follower: Follower, store: FileStore, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = make_release(store, tiny, tmp_path, seed=1)
    promote(store, *good)
    body = {"model": "demo@production", "prompt": [5, 6, 7], "temperature": 0, "max_tokens": 4}
    access = AccessRules(admin_tokens=(ADMIN_TOKEN,))
    with run(Server(follower.catalog, Scheduler(), follower, access)) as url:  # type: ignore[attr-defined]
        before = httpx.post(f"{url}/v1/completions", json=body).json()
        assert before["system_fingerprint"] == f"demo@{good[0]}"
        other = make_adapter(tiny, tmp_path / "other", seed=9)
        promote(store, *make_release(store, tiny, tmp_path, seed=2, answers_of=other))
        deadline = time.monotonic() + 10
        admin = {"authorization": f"Bearer {ADMIN_TOKEN}"}
        while not (state := httpx.get(f"{url}/ready", headers=admin).json()["channels"]["demo@production"])["error"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert "recorded answer 0 differs at token" in state["error"]
        assert state["version"] == good[0]
        told = httpx.get(f"{url}/ready")
        assert told.status_code == 200
        assert told.json()["channels"]["demo@production"]["version"] == good[0]
        assert told.json()["alarms"]  # that something is wrong, not what
        shown = told.text + httpx.get(f"{url}/metrics").text
        assert "recorded answer" not in shown
        assert str(tmp_path) not in shown
        after = httpx.post(f"{url}/v1/completions", json=body).json()
    assert after["choices"] == before["choices"]
    assert after["system_fingerprint"] == before["system_fingerprint"]
    assert f"demo@production stays at {good[0]}: " in caplog.text


def test_a_server_whose_channel_was_never_served_is_not_ready(follower: Follower) -> None:
    with run(Server(follower.catalog, Scheduler(), follower)) as url:  # type: ignore[attr-defined]
        response = httpx.get(f"{url}/ready")
    assert response.status_code == 503
    assert response.json()["channels"]["demo@production"]["version"] is None


def test_an_unreachable_store_leaves_what_is_served(
    follower: Follower, store: FileStore, tiny: Path, tmp_path: Path
) -> None:
    good = make_release(store, tiny, tmp_path, seed=1)
    promote(store, *good)
    follower.poll()
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "store").write_text("no folder")
    follower.poll()
    assert served(follower) == f"demo@{good[0]}"


def test_the_smoke_run_of_a_promotion_needs_recorded_answers(tiny: Path, runtime: Runtime, tmp_path: Path) -> None:
    folder = tmp_path / "release"
    make_adapter(tiny, folder / "adapter")
    with pytest.raises(PromotionError, match="no recorded answers"):
        smoke.check_release(folder, base=tiny, runtime=runtime)
    model = load_model(tiny)
    load_adapter(model, folder / "adapter", base=read_identity(tiny))
    smoke.record(model, PROMPTS, folder / smoke.SMOKE_FILE)
    smoke.check_release(folder, base=tiny, runtime=runtime)


def test_a_damaged_record_of_answers_is_refused(tmp_path: Path) -> None:
    (tmp_path / smoke.SMOKE_FILE).write_text('{"format": 1, "samples": [{"prompt": "x"}]}')
    with pytest.raises(PromotionError, match="damaged"):
        smoke.read(tmp_path)


def test_two_channels_of_one_pipeline_follow_the_same_releases_one_after_the_other(
    store: FileStore, tiny: Path, runtime: Runtime, tmp_path: Path
) -> None:
    follower = make_follower(store, tiny, runtime, tmp_path / "fetched", channels=("staging", "production"))
    made = [make_release(store, tiny, tmp_path, seed=seed) for seed in (1, 2, 3, 4)]
    for version, digest in made:
        for name in ("staging", "production"):
            promote(store, version, digest, to=name)
            follower.poll()
            assert served(follower, name) == f"demo@{version}"
            assert (state_of(follower, name)["version"], state_of(follower, name)["error"]) == (version, None)
    names = {model.name for model in follower.catalog.models()}  # type: ignore[attr-defined]
    kept = {f"demo@{version}" for version, _ in made[-2:]}
    assert names == {"tiny", "demo@staging", "demo@production", *kept}


def test_a_release_that_one_channel_refuses_stays_with_the_channel_that_serves_it(
    store: FileStore, tiny: Path, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follower = make_follower(store, tiny, runtime, tmp_path / "fetched", channels=("staging", "production"))
    release = make_release(store, tiny, tmp_path, seed=1)
    promote(store, *release, to="staging")
    follower.poll()

    def refuse(model: object, folder: Path) -> None:
        raise PromotionError("a smoke run that fails once")

    monkeypatch.setattr(follower, "_smoke", refuse)
    promote(store, *release)
    follower.poll()
    assert "fails once" in state_of(follower)["error"]
    assert follower.catalog.resolve(f"demo@{release[0]}").release == served(follower, "staging")  # type: ignore[attr-defined]


def test_a_smoke_run_that_fails_once_leaves_status_name_and_lease_in_step(
    follower: Follower, store: FileStore, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [make_release(store, tiny, tmp_path, seed=seed) for seed in (1, 2, 3, 4)]
    for release in made[:2]:
        promote(store, *release)
        follower.poll()

    def refuse(model: object, folder: Path) -> None:
        raise PromotionError("a smoke run that fails once")

    with monkeypatch.context() as patched:
        patched.setattr(follower, "_smoke", refuse)
        promote(store, *made[0])  # back to the one before, which is refused
        follower.poll()
    for number, release in enumerate(made[2:], start=4):
        promote(store, *release)
        follower.poll()
        assert served(follower) == f"demo@{release[0]}"
        state = state_of(follower)
        assert (state["version"], state["entry"], state["error"]) == (release[0], number, None)
    assert leased(store) == {made[-1][0]}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("a fault of ours")])
def test_one_channel_s_error_stops_no_other_and_is_told(
    store: FileStore, tiny: Path, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    follower = make_follower(store, tiny, runtime, tmp_path / "fetched", channels=("staging", "production"))
    release = make_release(store, tiny, tmp_path, seed=1)
    for name in ("staging", "production"):
        promote(store, *release, to=name)
    original = follower._verified

    def broken(one: ChannelRef, entry: channels.Entry, *judged: Any) -> object:
        if one.channel == "staging":
            raise error
        return original(one, entry, *judged)

    monkeypatch.setattr(follower, "_verified", broken)
    follower.poll()
    assert (state_of(follower)["version"], state_of(follower)["error"]) == (release[0], None)
    assert (state_of(follower, "staging")["version"], state_of(follower, "staging")["error"]) == (None, repr(error))


@pytest.mark.parametrize("fault", ["newest", "emptied", "unmounted"])
def test_a_history_that_went_back_is_an_alarm_and_what_is_served_stays(
    store: FileStore, tiny: Path, runtime: Runtime, tmp_path: Path, fault: str
) -> None:
    follower = make_follower(store, tiny, runtime, tmp_path / "fetched")
    made = [make_release(store, tiny, tmp_path, seed=seed) for seed in (1, 2)]
    for release in made:
        promote(store, *release)
    follower.poll()
    shutil.copytree(tmp_path / "store", tmp_path / "copy")
    if fault == "newest":
        store.delete("channels/demo/production/0000000002.json")
    elif fault == "emptied":
        shutil.rmtree(tmp_path / "store" / "channels")
    else:
        shutil.rmtree(tmp_path / "store")
    server = Server(follower.catalog, Scheduler(), follower)  # type: ignore[attr-defined]
    server.scheduler.start()
    for _ in range(3):
        follower.poll()
        assert served(follower) == f"demo@{made[1][0]}"
        assert state_of(follower)["history_lost"]
        ready, told = server.readiness()
        assert ready
        assert told["alarms"][0].startswith("demo@production: ")
        assert b'graftline_channel_history_lost{channel="demo@production"} 1.0' in server.metrics.text()
        assert b'graftline_channel_error{channel="demo@production"} 1.0' in server.metrics.text()
    shutil.copytree(tmp_path / "copy", tmp_path / "store", dirs_exist_ok=True)
    follower.poll()
    assert (state_of(follower)["error"], state_of(follower)["history_lost"]) == (None, False)
    assert server.readiness()[1]["alarms"] == []
    assert b'graftline_channel_history_lost{channel="demo@production"} 0.0' in server.metrics.text()
    server.scheduler.drain()


def test_a_server_that_starts_again_knows_what_it_had_seen(tiny: Path, runtime: Runtime, tmp_path: Path) -> None:
    for num_entries in (2, 1):
        store = open_store(str(tmp_path / "store"), seen=tmp_path / "seen")
        follower = make_follower(store, tiny, runtime, tmp_path / "fetched")
        if num_entries == 2:
            for seed in (1, 2):
                promote(store, *make_release(store, tiny, tmp_path, seed=seed))
        else:
            store.delete("channels/demo/production/0000000002.json")
        follower.poll()
        assert state_of(follower)["entry"] == (2 if num_entries == 2 else None)
    assert state_of(follower)["history_lost"]


def test_after_an_error_a_look_begins_at_the_listing_again(
    follower: Follower, store: FileStore, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(store, *make_release(store, tiny, tmp_path, seed=1))
    follower.poll()
    asked: list[str] = []
    original = store.list

    def fail_once(key: str) -> bytes | None:
        monkeypatch.undo()
        monkeypatch.setattr(store, "list", lambda prefix: asked.append(prefix) or original(prefix))
        raise StoreError("the store is away")

    monkeypatch.setattr(store, "get", fail_once)
    follower.poll()
    assert state_of(follower)["error"] == "the store is away"
    follower.poll()
    assert "channels/demo/production" in asked
    assert state_of(follower)["error"] is None


def test_a_server_whose_store_is_away_at_its_start_keeps_what_lies_on_its_disk(
    follower: Follower, store: FileStore, tiny: Path, runtime: Runtime, tmp_path: Path
) -> None:
    promote(store, *make_release(store, tiny, tmp_path, seed=1))
    follower.poll()
    before = releases_on_disk(tmp_path / "fetched")
    del follower
    again = make_follower(FileStore(tmp_path / "elsewhere"), tiny, runtime, tmp_path / "fetched")
    again.poll()
    assert releases_on_disk(tmp_path / "fetched") == before


def test_a_store_that_hangs_keeps_nobody_from_the_bases(
    store: FileStore, tiny: Path, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graftline.serve.follower._FIRST_POLL_SECONDS", 0.2)
    monkeypatch.setattr("graftline.serve.follower._SILENCE_SECONDS", 0.0)
    monkeypatch.setattr("graftline.serve.follower._STOP_SECONDS", 0.2)
    answer = threading.Event()
    release = make_release(store, tiny, tmp_path, seed=1)
    promote(store, *release)
    original = store.list
    monkeypatch.setattr(store, "list", lambda prefix: answer.wait() and original(prefix))
    follower = make_follower(store, tiny, runtime, tmp_path / "fetched")
    access = AccessRules(admin_tokens=(ADMIN_TOKEN,))
    admin = {"authorization": f"Bearer {ADMIN_TOKEN}"}
    with run(Server(follower.catalog, Scheduler(), follower, access)) as url:  # type: ignore[attr-defined]
        assert httpx.get(f"{url}/health").status_code == 200
        ready = httpx.get(f"{url}/ready", headers=admin)
        assert (ready.status_code, ready.json()["channels"]["demo@production"]["version"]) == (503, None)
        assert "the store has not answered for" in ready.json()["alarms"][0]
        body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 2}
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 200
        answer.set()
        deadline = time.monotonic() + 60
        while httpx.get(f"{url}/ready").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert served(follower) == f"demo@{release[0]}"
