"""vLLM's replicas follow channels behind a router: aliases move, nothing is lost, what vLLM refuses is told."""

import json
import math
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from graftline.cli.following import follow
from graftline.digest import Digest
from graftline.errors import ConfigError, PromotionError, ServingError
from graftline.registry import channel as channels
from graftline.registry.file_store import FileStore
from graftline.registry.rollout import go_back
from graftline.serve import smoke
from graftline.serve.follower import ChannelRef
from graftline.serve.replicas import UnreachableError, VllmClient, divergence
from graftline.serve.tally import Tally
from graftline.serve.vllm_follower import VllmFollowing, assemble, exporter
from graftline.settings.channels import RolloutJudge
from tests.ports import free_port
from tests.serve.conftest import ADMIN_TOKEN, make_adapter
from tests.serve.following import make_release, promote
from tests.serve.test_rollouts import start_rollout, wait_for
from tests.serve.vllm_stand_in import Process, StandIn

pytestmark = pytest.mark.slow

ADMIN = {"authorization": f"Bearer {ADMIN_TOKEN}"}
NAME = "demo@production"


class Site:
    """Two replicas, the router, and the store that they follow."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.base, self.folder, self.store = base, folder, FileStore(folder / "store")
        self.vllm = [StandIn(base, api_key="vllm-key") for _ in range(2)]
        self.processes = [Process(one.app) for one in self.vllm]
        following = VllmFollowing(
            channels=(ChannelRef("demo", "production"),),
            folder=folder / "shared",
            export=exporter(base),
            judges={"production": RolloutJudge(window="4s")},
            token="vllm-key",
            poll_seconds=0.1,
        )
        app, self.follower = assemble(
            self.store, [one.url for one in self.processes], following, admin_tokens=(ADMIN_TOKEN,)
        )
        self.app = app
        self.router: Process | None = None
        self.made = 0

    def release(self, **options: Any) -> tuple[str, Digest]:
        self.made += 1
        return make_release(self.store, self.base, self.folder, seed=self.made, **options)

    def start(self) -> httpx.Client:
        self.router = Process(self.app)
        headers = {"authorization": "Bearer vllm-key"}
        return httpx.Client(base_url=self.router.url, headers=headers, timeout=60)

    def stop(self) -> None:
        self.follower.stop()  # a router that is ended at once does not: its thread would poll through all later tests
        for one in ([self.router] if self.router else []) + self.processes:
            one.stop(at_once=True)

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = self.follower.status()[NAME]
        return found

    def names(self) -> list[set[str]]:
        return [set(one.loaded) for one in self.vllm]


@pytest.fixture
def site(tiny: Path, tmp_path: Path) -> Iterator[Site]:
    made = Site(tiny, tmp_path)
    yield made
    made.stop()


def ask(client: httpx.Client, **more: Any) -> httpx.Response:
    return client.post("/v1/completions", json={"model": NAME, "prompt": [5, 6, 7]} | more)


def test_a_promotion_is_loaded_on_every_replica_and_the_alias_moves_while_requests_finish(site: Site) -> None:
    first, second, third = (site.release() for _ in range(3))
    promote(site.store, *first)
    with site.start() as client:
        assert ask(client).json()["model"] == f"demo@{first[0]}"
        assert site.names() == [{f"demo@{first[0]}"}] * 2
        listed = client.get("/v1/models").json()["data"]
        assert {one["id"] for one in listed} == {"tiny", f"demo@{first[0]}", NAME}
        for one in site.vllm:
            one.delay_seconds, one.words = 0.1, 20
        with client.stream("POST", "/v1/completions", json={"model": NAME, "prompt": [1], "stream": True}) as slow:
            lines = slow.iter_lines()
            assert first[0] in next(lines)
            for release in (second, third):
                promote(site.store, *release)
                wait_for(lambda release=release: site.state()["version"] == release[0])
            assert f"demo@{first[0]}" in site.names()[0] | site.names()[1]  # a request is under way
            rest = [line for line in lines if line.startswith("data: {")]
            assert len(rest) == 19
            assert all(first[0] in line for line in rest)
        wait_for(lambda: site.names() == [{f"demo@{second[0]}", f"demo@{third[0]}"}] * 2)
        assert ask(client, stream=True).text.count(third[0]) == 20 * 3  # id, model and text of every event
        assert site.state()["error"] is None


def test_a_replica_that_was_restarted_gets_what_it_lost_and_no_request_is_lost(site: Site) -> None:
    promote(site.store, *site.release())
    statuses: list[int] = []
    stop = threading.Event()
    with site.start() as client:

        def users() -> None:
            while not stop.is_set():
                statuses.append(ask(client).status_code)

        threads = [threading.Thread(target=users) for _ in range(3)]
        for thread in threads:
            thread.start()
        name = f"demo@{site.state()['version']}"

        def has(number: int) -> bool:
            return name in client.get("/ready").json()["replicas"][number]["models"]

        site.vllm[0].loaded.clear()  # it has begun anew between two polls
        wait_for(lambda: name in site.vllm[0].loaded and has(0))
        site.processes[1].stop(at_once=True)
        site.vllm[1].loaded.clear()
        time.sleep(0.3)
        site.processes[1].start()
        wait_for(lambda: has(1) and site.state()["error"] is None)
        before = site.vllm[1].asked[name]
        wait_for(lambda: site.vllm[1].asked[name] > before + 1)
        stop.set()
        for thread in threads:
            thread.join()
    assert len(statuses) > 10
    assert set(statuses) == {200}


def test_replicas_that_refuse_the_key_are_told_and_the_reason_is_an_administrator_s_to_read(site: Site) -> None:
    promote(site.store, *site.release())
    for one in site.vllm:
        one.api_key = "another"
    with site.start() as client:
        wait_for(lambda: site.state()["error"])
        state = client.get("/ready", headers=ADMIN).json()
        assert "/v1/models answers 401" in state["channels"][NAME]["error"]
        assert state["replicas"][0]["url"] == site.processes[0].url
        assert state["unsigned"]
        assert str(site.processes[0].port) not in client.get("/ready").text
        for one in site.vllm:
            one.api_key = "vllm-key"
        wait_for(lambda: site.state()["version"] and not site.state()["error"])


def test_without_any_replica_the_client_is_told_to_try_again(site: Site) -> None:
    promote(site.store, *site.release())
    with site.start() as client:
        for process in site.processes:
            process.stop(at_once=True)
        answer = ask(client)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert NAME in answer.json()["error"]["message"]
        assert client.get("/v1/models").status_code == 503
        for process in site.processes:
            process.start()
        wait_for(lambda: ask(client).status_code == 200)


@pytest.mark.parametrize(
    ("method", "reason"),
    [("dora", "vLLM has no DoRA"), ("houlsby", "it has no houlsby bottlenecks")],
)
def test_an_adapter_that_vllm_cannot_serve_is_not_loaded_and_the_way_out_is_told(
    site: Site, method: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = site.release()
    promote(site.store, *good)
    monkeypatch.setattr(
        "tests.serve.following.make_adapter",
        lambda base, folder, *, seed: make_adapter(base, folder, seed=seed, method=method),
    )
    promote(site.store, *site.release())
    with site.start() as client:
        wait_for(lambda: site.state()["error"])
        assert reason in site.state()["error"]
        assert "a release with package.merged: true as a model" in site.state()["error"]
        assert site.names() == [set(), set()]
        assert ask(client).status_code == 404  # the name has never been served: vLLM says that it does not exist
        assert client.get("/ready").status_code == 503


def test_what_a_replica_refuses_leaves_the_alias_where_it_is(site: Site) -> None:
    good = site.release()
    promote(site.store, *good)
    with site.start() as client:
        for one in site.vllm:
            one.max_lora_rank = 1
        promote(site.store, *site.release())
        wait_for(lambda: site.state()["error"])
        assert "LoRA rank 4 is greater than max_lora_rank 1." in site.state()["error"]
        assert ask(client).json()["model"] == f"demo@{good[0]}"


def test_an_adapter_that_loads_and_answers_as_the_base_is_not_served(site: Site) -> None:
    good, other = site.release(), site.release()
    promote(site.store, *good)
    with site.start() as client:
        site.vllm[1].serves_the_base = True
        promote(site.store, *other)
        wait_for(lambda: site.state()["error"])
        assert "vLLM does not run the model that was judged" in site.state()["error"]
        assert "nats a token away" in site.state()["error"]
        assert ask(client).json()["model"] == f"demo@{good[0]}"
        site.vllm[1].serves_the_base = False
        wait_for(lambda: site.state()["version"] == other[0])


def test_a_release_that_was_changed_or_a_store_that_is_away_moves_nothing(site: Site) -> None:
    good = site.release()
    promote(site.store, *good)
    with site.start() as client:
        version, digest = site.release()
        file = next((site.folder / "store").rglob(f"{version}/adapter/adapter_model.safetensors"))
        file.chmod(0o644)
        file.write_bytes(file.read_bytes()[:-1] + b"x")
        promote(site.store, version, digest)
        wait_for(lambda: site.state()["error"])
        store = site.folder / "store"
        store.rename(site.folder / "away")
        time.sleep(0.3)
        assert ask(client).json()["model"] == f"demo@{good[0]}"
        (site.folder / "away").rename(store)


def test_adapters_cannot_be_loaded_through_the_router_and_other_names_are_passed_on(site: Site) -> None:
    promote(site.store, *site.release())
    with site.start() as client:
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            assert client.post(path, json={"lora_name": "x", "lora_path": "/"}).status_code == 403
            assert client.post(path, json={"lora_name": "x"}, headers=ADMIN).status_code == 403
        assert ask(client, model="tiny").json()["model"] == "tiny"
        assert ask(client, model="nobody").json()["error"]["message"] == "The model `nobody` does not exist."
        assert ask(client, headers=None, model=7).status_code in (404, 500)
        assert httpx.post(f"{client.base_url}/v1/completions", json={"model": NAME}).status_code == 401
        assert client.get("/v1/nothing").status_code == 404
        assert client.get("/health").status_code == 200


def test_a_rollout_is_split_by_key_counted_and_gone_back_from(site: Site) -> None:
    first, second = site.release(), site.release()
    promote(site.store, *first)
    with site.start() as client:
        start_rollout(site.store, *second)
        wait_for(lambda: site.state()["share"] == 0.5)
        seen: dict[str, set[str]] = {}
        for number in range(60):
            answer = ask(client, user=f"{number % 20}", stream=number % 2 == 0)
            line = answer.text.partition("data: ")[2].partition("\n")[0] or answer.text
            seen.setdefault(f"{number % 20}", set()).add(json.loads(line)["model"])
        assert all(len(models) == 1 for models in seen.values())
        assert {model for models in seen.values() for model in models} == {f"demo@{first[0]}", f"demo@{second[0]}"}
        rated = client.post("/v1/feedback", json={"id": ask(client, user="x").json()["id"], "rating": "bad"})
        assert rated.json()["counted"]
        assert client.post("/v1/feedback", json={"id": 1}).status_code == 400
        assert client.get("/v1/rollouts").status_code == 403
        wait_for(lambda: len(client.get("/v1/rollouts", headers=ADMIN).json()[NAME]["keys"]) == 21)
        keys = client.get("/v1/rollouts", headers=ADMIN).json()[NAME]["keys"]
        assert all(key["tokens"] == pytest.approx(4.0) and key["errors"] == 0 for key in keys)
        assert sum(key["feedback"] == 1.0 for key in keys) == 1
        metrics = client.get("/metrics").text
        assert f'role="candidate",version="demo@{second[0]}"' in metrics
        head = channels.head(site.store, "demo", "production")
        assert head is not None
        go_back(site.store, head, reason="bad")
        wait_for(lambda: site.state()["share"] is None)
        assert {ask(client, user=f"{number}").json()["model"] for number in range(20)} == {f"demo@{first[0]}"}
        wait_for(lambda: site.names() == [{f"demo@{first[0]}"}] * 2)


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "url", "message"),
    [
        ("nowhere", "http://127.0.0.1:1", "--base nowhere was given"),
        (".", "10.0.0.5:8000", "expected an address such as"),
        (".", "", "--vllm, --base and --folder are needed"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_anything_starts(base: str, url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        follow(["demo"], [url] if url else None, Path(base), Path("shared"))


def test_divergence_is_over_the_tokens_that_both_give_and_the_rest() -> None:
    p = {1: math.log(0.5), 2: math.log(0.3)}
    q = {1: math.log(0.4), 3: math.log(0.4)}
    expected = 0.5 * math.log(0.5 / 0.4) + 0.5 * math.log(0.5 / 0.6)
    assert divergence(p, q) == pytest.approx(expected)
    assert divergence(p, p) == 0
    assert divergence({1: 0.0}, {1: math.log(0.5)}) == pytest.approx(math.log(2), abs=1e-6)


def test_recorded_answers_are_matched_and_a_server_without_logprobs_is_explained(site: Site) -> None:
    site.release()
    package = site.folder / "package-1"
    samples = smoke.read(package)
    assert all(len(sample.top) == len(sample.answer) and len(sample.top[0]) == 20 for sample in samples)
    client = VllmClient(site.processes[0].url, "vllm-key")
    client.load("demo@v", package / "adapter")
    client.load("demo@v", package / "adapter")  # already there
    found = client.try_answers("demo@v", samples)
    assert (found.top1, found.num_tokens) == (1.0, sum(len(sample.answer) for sample in samples))
    assert found.mean_kl is not None
    assert found.mean_kl < 1e-5
    site.vllm[0].gives_logprobs = False
    with pytest.raises(ServingError, match=r"gives no log-probabilities of a prompt .*; is --max-logprobs at least 20"):
        client.check("demo@v", samples)
    with pytest.raises(PromotionError, match="has no recorded answers"):
        client.check("demo@v", [])
    client.unload("demo@v")
    client.unload("demo@v")
    with pytest.raises(ServingError, match="The model `demo@v` does not exist"):
        client.check("demo@v", samples)
    with pytest.raises(ServingError, match="No adapter found"):
        client.load("demo@w", site.folder / "nowhere")
    with pytest.raises(ServingError, match="401"):
        VllmClient(site.processes[0].url).models()
    with pytest.raises(UnreachableError, match="does not answer"):
        VllmClient(f"http://127.0.0.1:{free_port()}").models()


def test_a_client_reads_the_machine_s_certificates_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    made, make = list[ssl.SSLContext](), ssl.create_default_context

    def making(*given: Any, **named: Any) -> ssl.SSLContext:
        made.append(make(*given, **named))
        return made[-1]

    monkeypatch.setattr(ssl, "create_default_context", making)
    client = VllmClient(site.processes[0].url, "vllm-key")
    assert client.models() == client.models()
    assert len(made) <= 1


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_tally_reads_events_however_they_are_cut(size: int) -> None:
    events = [{"id": "a", "choices": [{"delta": {"content": word}, "finish_reason": None}]} for word in ("I'm ", "é")]
    events.append({"id": "a", "choices": [{"delta": {}, "finish_reason": "length"}]})
    text = "".join(f"data: {json.dumps(one, ensure_ascii=False)}\n\n" for one in events) + "data: [DONE]\n\n"
    data, tally = text.encode(), Tally(is_stream=True)
    for at in range(0, len(data), size):
        tally.feed(data[at : at + size])
    tally.end()
    assert (tally.id, tally.beginning, tally.finish_reason, tally.tokens) == ("a", "I'm é", "length", 2)


@pytest.mark.parametrize("data", [b"", b"<html>", b"[]", b'{"choices": 3}', b'{"usage": {}}', b"[" * 100_000])
def test_a_tally_of_nonsense_knows_nothing(data: bytes) -> None:
    for is_stream in (False, True):
        tally = Tally(is_stream=is_stream)
        tally.feed(b"data: " + data + b"\n\n" if is_stream else data)
        tally.end()
        assert (tally.finish_reason, tally.tokens, tally.beginning) == (None, None, "")


def test_an_error_within_a_stream_is_a_failure() -> None:
    tally = Tally(is_stream=True)
    tally.feed(b'data: {"error": {"message": "out of memory"}}\n\n')
    tally.end()
    assert tally.failed
