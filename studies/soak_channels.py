"""Two channels of one pipeline under load while their store fails: the part ``channels`` of `studies.soak`.

A follower polls two channels of a store whose reads fail (no answer) or return damaged bytes, each for a share of the
reads, while releases are promoted into both and clients ask at the same time, some in long conversations, some as a
stream. Every answer names its release, and must be that release's answer, token by token.
"""

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil

from graftline.adapters.peft_format import load_adapter
from graftline.digest import Digest, of_bytes
from graftline.errors import StoreError
from graftline.logs import OnProgress, silent
from graftline.registry import channel as channels
from graftline.registry.channel import ChannelChange
from graftline.registry.file_store import FileStore
from graftline.registry.releases import publish
from graftline.release.manifest import GateVerdict, Lineage, describe, write_manifest
from graftline.serve import smoke
from graftline.serve.app import AccessRules, Server
from graftline.serve.catalog import Catalog
from graftline.serve.follower import ChannelRef, Follower
from graftline.serve.scheduler import Limits, Scheduler
from graftline.serve.served_base import Base, Runtime
from graftline.settings import Channel
from graftline.weights.identity import read_identity
from graftline.weights.quant.linear import load_model
from studies.harness import Json, Setting
from studies.load import TIMEOUT_SECONDS, percentiles, served
from studies.models import make_adapter, make_tiny_llama

PIPELINE, CHANNELS, RELEASES = "demo", ("production", "staging"), 4
SHORT = [{"role": "user", "content": "Definition: a tall plant\nCategory:"}]
LONG = [
    {"role": role, "content": text}
    for turn in range(8)
    for role, text in (("user", f"the quick brown fox {turn}"), ("assistant", "a small animal"))
] + SHORT
LONG_SHARE, STREAM_SHARE = 0.1, 0.2
UNANSWERED, DAMAGED = 0.1, 0.1
"""Shares of the store's reads that get no answer, and of the fetched files that are damaged."""
POLL_SECONDS = 0.1
_NOTHING = of_bytes(b"")
_PASSED = GateVerdict(outcome="pass", against="base", digest=_NOTHING)


class FailingStore(FileStore):
    """A folder as a store, some of whose reads fail once ``fails`` is set."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.fails, self.faults = False, Counter[str]()
        self._random = random.Random(0)

    def get(self, key: str) -> bytes | None:
        """As in `FileStore`, or no answer."""
        self._answer(key)
        return super().get(key)

    def get_file(self, key: str, path: Path, *, on_progress: OnProgress = silent) -> Digest:
        """As in `FileStore`, or no answer, or a copy with one bit flipped."""
        self._answer(key)
        digest = super().get_file(key, path, on_progress=on_progress)
        if not self.fails or self._random.random() >= DAMAGED:
            return digest
        self.faults["damaged"] += 1
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        return of_bytes(bytes(data))

    def _answer(self, key: str) -> None:
        if self.fails and self._random.random() < UNANSWERED:
            self.faults["unanswered"] += 1
            raise StoreError(f"{key}: the store does not answer")


def run(setting: Setting) -> Json:
    """Run the part; AssertionError if a request failed, an answer was mixed, or a channel did not come back."""
    found = asyncio.run(
        _Run(setting.folder("soak-channels")).run(setting.size(10_000, 80), setting.size(200, 8), setting.size(16, 4))
    )
    assert not found["failed"], found["first_failure"]
    assert not found["mixed"], f"{found['mixed']} answers were not their release's"
    assert found["serves_the_newest_entries"]
    assert found["store_faults"]["unanswered"]
    assert found["polls_that_reported_an_error"], "store faults must be visible in the metrics"
    return found


class _Run:
    def __init__(self, work: Path) -> None:
        base = make_tiny_llama(work / "base", num_hidden_layers=1)
        self.store, self.catalog = FailingStore(work / "store"), Catalog()
        self.catalog.add_base("base", Base(base, Runtime(graphs=work / "graphs", num_threads=1, max_adapters=8)))
        self.releases = [self._release(base, work, number) for number in range(RELEASES)]
        self.newest = dict[str, str]()
        self.follower = Follower(
            self.store,
            tuple(ChannelRef(PIPELINE, name) for name in CHANNELS),
            self.catalog,
            work / "fetched",
            keys=None,
            policies={name: Channel() for name in CHANNELS},
            smoke=smoke.check,
            poll_seconds=POLL_SECONDS,
        )
        self.expected: dict[tuple[str, bool], str] = {}
        self.asked = self.mixed = self.refused = self.promoted = self.alarms = 0
        self.failed, self.latencies, self.memory = list[str](), list[float](), list[int]()
        self.by_release = Counter[str]()
        self.random = random.Random(1)

    def _release(self, base: Path, work: Path, number: int) -> tuple[str, Digest]:
        """Publish an adapter with its recorded answers; it is also served by its version, to learn its answers."""
        package = work / f"package-{number}"
        adapter = make_adapter(base, package / "adapter", rank=4, seed=number, scale=0.3)
        model = load_model(base)
        load_adapter(model, adapter, base=read_identity(base))
        smoke.record(model, [[5, 6, 7, 8], [20, 21]], package / smoke.SMOKE_FILE)
        lineage = Lineage(
            base_digest=read_identity(base).digest,
            source_digest=None,
            quantizer_digest=None,
            data_digest=_NOTHING,
            template_digest=_NOTHING,
            config_digest=_NOTHING,
            dvc_lock_digest=None,
            code_revision="soak",
            trust_remote_code=False,
        )
        created = datetime(2026, 1, 1, 0, 0, number, tzinfo=UTC)
        manifest = describe(package, pipeline=PIPELINE, created=created, lineage=lineage, verdict=_PASSED)
        write_manifest(package, manifest)
        published = publish(self.store, package)
        self.catalog.load_adapter(published.version, adapter)
        return published.version, published.digest

    def _promote(self) -> None:
        """The next release enters the channel whose turn it is."""
        to = CHANNELS[self.promoted % len(CHANNELS)]
        version, digest = self.releases[(self.promoted // len(CHANNELS) + self.promoted) % RELEASES]
        fails, self.store.fails = self.store.fails, False  # the promoter's own store does not fail
        log = channels.read(self.store, PIPELINE, to)
        change = ChannelChange(
            action="promote",
            version=version,
            release=digest,
            verdict=_PASSED,
            actor="soak",
            reason="soak",
            time=datetime.now(UTC).replace(microsecond=0),
        )
        channels.append(self.store, channels.next_entry(log, change))
        self.store.fails = fails
        self.newest[f"{PIPELINE}@{to}"] = version
        self.promoted += 1

    async def run(self, num_requests: int, num_promotions: int, num_clients: int) -> Json:
        for _ in CHANNELS:
            self._promote()
        server = Server(self.catalog, Scheduler(Limits(max_batch=8, max_waiting=64)), self.follower, AccessRules())
        with served(server) as url:
            async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_SECONDS) as client:
                for version, _ in self.releases:
                    for is_long in (False, True):
                        self.expected[version, is_long] = (await self._answer(client, version, is_long))[0]
                assert len(set(self.expected.values())) == 2 * RELEASES, "the releases must answer differently"
                self.store.fails, started = True, time.monotonic()
                clients = [self._ask_until_done(client, num_requests) for _ in range(num_clients)]
                watching = asyncio.create_task(self._watch(client))
                await asyncio.gather(self._promote_until_done(num_requests, num_promotions), *clients)
                elapsed = time.monotonic() - started
                watching.cancel()
                self.store.fails = False
                came_back = await self._come_back()
        return self._counts(elapsed) | {
            "serves_the_newest_entries": came_back,
            "kv_bytes_after": server.scheduler.budget.used_bytes,
        }

    def _counts(self, elapsed: float) -> Json:
        quarter = max(1, len(self.memory) // 4)
        last, before = self.memory[-quarter:], self.memory[-2 * quarter : -quarter] or self.memory
        return {
            "requests": self.asked,
            "promotions": self.promoted,
            "answers_by_release": sorted(self.by_release.values()),
            "failed": len(self.failed),
            "first_failure": self.failed[0] if self.failed else None,
            "mixed": self.mixed,
            "refused_with_429_and_repeated": self.refused,
            "store_faults": dict(self.store.faults),
            "polls_that_reported_an_error": self.alarms,
            "requests_per_s": round(self.asked / elapsed, 1),
            "latency_ms": percentiles(self.latencies),
            "growth_of_the_last_quarter": round(statistics.median(last) / statistics.median(before) - 1, 4),
        }

    async def _ask_until_done(self, client: httpx.AsyncClient, num_requests: int) -> None:
        while self.asked < num_requests:
            self.asked += 1
            name, is_long = f"{PIPELINE}@{self.random.choice(CHANNELS)}", self.random.random() < LONG_SHARE
            started = time.monotonic()
            try:
                text, release = await self._answer(client, name, is_long, stream=self.random.random() < STREAM_SHARE)
            except (httpx.HTTPError, AssertionError) as error:
                self.failed.append(f"{name}: {error!r}")
                continue
            self.latencies.append(time.monotonic() - started)
            version = str(release).removeprefix(f"{PIPELINE}@")
            self.by_release[version] += 1
            self.mixed += text != self.expected.get((version, is_long))

    async def _answer(
        self, client: httpx.AsyncClient, name: str, is_long: bool, *, stream: bool = False
    ) -> tuple[str, str | None]:
        """An answer's text and its release."""
        body: dict[str, Any] = {
            "model": name,
            "messages": LONG if is_long else SHORT,
            "temperature": 0,
            "max_tokens": 4,
        }
        while True:
            response = await client.post("/v1/chat/completions", json=body | {"stream": stream})
            if response.status_code == 429:
                self.refused += 1
                await asyncio.sleep(0.02)
                continue
            assert response.status_code == 200, response.text
            if not stream:
                answer = response.json()
                return str(answer["choices"][0]["message"]["content"]), answer["system_fingerprint"]
            events = [json.loads(line[6:]) for line in response.text.split("\n\n") if "{" in line]
            text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
            return text, events[0]["system_fingerprint"]

    async def _promote_until_done(self, num_requests: int, num_promotions: int) -> None:
        # A short run also waits for a fault: a read fails at last.
        while self.asked < num_requests or self.promoted < num_promotions or not self.alarms:
            if self.promoted < num_promotions and self.asked >= self.promoted * num_requests / num_promotions:
                await asyncio.to_thread(self._promote)
            await asyncio.sleep(0.01)

    async def _watch(self, client: httpx.AsyncClient) -> None:
        process = psutil.Process()
        while True:
            self.memory.append(process.memory_info().rss)
            text = (await client.get("/metrics")).text
            self.alarms += any(
                line.startswith("graftline_channel_error{") and line.endswith(" 1.0") for line in text.splitlines()
            )
            await asyncio.sleep(POLL_SECONDS)

    async def _come_back(self) -> bool:
        """Whether both channels serve their newest entry, without an alarm, soon after the store works again."""
        for _ in range(300):
            states = self.follower.status()
            if all(states[name]["version"] == one and not states[name]["error"] for name, one in self.newest.items()):
                return True
            await asyncio.sleep(0.1)
        return False
