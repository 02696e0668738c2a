"""A server while adapters are swapped, loaded and dropped: nothing may fail, nothing may mix, memory stays flat.

requests  10,000 requests and 200 swaps
channels  two channels of a store that fails, followed by the server (`studies.soak_channels`)
hour      the same for an hour with eight clients, however many requests that is

A tiny model, so that the server and not the arithmetic is exercised. Half of the requests go to a name that moves
between two adapters all the time: each answer must be wholly one's or the other's. The others go to more fixed names
than fit into the cache. Some clients leave in the middle of a stream, some read slowly, some send nonsense. Memory (of
server and clients, one process) is flat when the medians of the third and the fourth quarter differ by at most 2 %.
"""

import asyncio
import json
import random
import statistics
import time
from array import array
from pathlib import Path
from typing import Any

import httpx
import psutil

from graftline.serve.app import AccessRules, Server
from graftline.serve.catalog import Catalog
from graftline.serve.scheduler import Limits, Scheduler
from graftline.serve.served_base import Base, Runtime
from studies import soak_channels
from studies.harness import Json, Setting
from studies.load import TIMEOUT_SECONDS, percentiles, served
from studies.models import make_adapter, make_tiny_llama

QUESTION = [{"role": "user", "content": "Definition: a tall plant\nCategory:"}]
FIXED = [f"fixed-{number}" for number in range(6)]
MEMORY_SAMPLES = 200
FLAT = 0.02
"""Share of memory by which the last two quarters of a run may differ."""


def requests(setting: Setting) -> Json:
    """So many requests."""
    return _soaked(setting, num_requests=setting.size(10_000, 60), seconds=0, clients=setting.size(16, 4))


def hour(setting: Setting) -> Json:
    """So long."""
    return _soaked(setting, num_requests=0, seconds=setting.size(3600.0, 1.0), clients=setting.size(8, 2))


def _soaked(setting: Setting, *, num_requests: int, seconds: float, clients: int) -> Json:
    found = run_soak(
        setting.folder("soak"), num_requests, seconds, swap_every=setting.size(50, 10), num_clients=clients
    )
    assert not found["failed"], found["first_failure"]
    assert not found["mixed"], f"{found['mixed']} answers were of no single adapter"
    return found


def run_soak(work: Path, num_requests: int, seconds: float, *, swap_every: int, num_clients: int) -> Json:
    """Run a server and its clients until both are reached: so many requests, so many seconds."""
    base = make_tiny_llama(work / "base", num_hidden_layers=1)
    catalog = Catalog()
    catalog.add_base("base", Base(base, Runtime(graphs=work / "graphs", num_threads=1, max_adapters=4)))
    for number, name in enumerate(FIXED):
        catalog.load_adapter(name, _telling(base, work / name, seed=number))
    versions = [_telling(base, work / f"version-{number}", seed=100 + number) for number in range(2)]
    server = Server(catalog, Scheduler(Limits(max_batch=8, max_waiting=64)), None, AccessRules())
    with served(server) as url:
        load = Load(url, catalog, versions, num_requests=num_requests, seconds=seconds)
        return asyncio.run(load.run(server, swap_every=swap_every, num_clients=num_clients))


def _telling(base: Path, folder: Path, *, seed: int) -> Path:
    """An adapter whose values are large enough to change answers."""
    return make_adapter(base, folder, rank=4, seed=seed, scale=0.3)


class Load:
    """The clients, and whoever swaps."""

    def __init__(self, url: str, catalog: Any, versions: list[Path], *, num_requests: int, seconds: float) -> None:
        self.url, self.catalog, self.versions = url, catalog, versions
        self.num_requests, self.seconds = num_requests, seconds
        self.asked = self.mixed = self.refused = self.abandoned = self.slow = self.nonsense = self.swaps = 0
        self.failed: list[str] = []
        self.latencies = array("d")  # a list of an hour's numbers would grow as a leak does
        self.memory: list[int] = []
        self.expected: dict[str, set[str]] = {}
        self.random = random.Random(0)
        self.started = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the load began."""
        return time.monotonic() - self.started

    @property
    def is_done(self) -> bool:
        """Whether no more requests are to come."""
        return self.asked >= self.num_requests and self.elapsed >= self.seconds

    async def run(self, server: Any, *, swap_every: int, num_clients: int) -> dict[str, Any]:
        """Learn the right answers, then ask and swap."""
        async with httpx.AsyncClient(base_url=self.url, timeout=TIMEOUT_SECONDS) as client:
            await self._learn(client)
            self.started = time.monotonic()
            clients = [self._ask_until_done(client) for _ in range(num_clients)]
            watching = asyncio.create_task(self._watch_memory())
            await asyncio.gather(self._swap_until_done(swap_every), *clients)
            elapsed = self.elapsed
            watching.cancel()
        while server.scheduler.num_running:
            await asyncio.sleep(0.05)
        return self._counts() | {
            "adapter_loads": self.catalog.resolve("base").base.adapters.num_loads,
            "minutes": round(elapsed / 60, 1),
            "requests_per_s": round(self.asked / elapsed, 1),
            "latency_ms": percentiles(self.latencies),
            "memory_mb": memory_summary(self.memory),
            "kv_bytes_after": server.scheduler.budget.used_bytes,
        }

    def _counts(self) -> dict[str, Any]:
        return {
            "requests": self.asked,
            "swaps": self.swaps,
            "failed": len(self.failed),
            "first_failure": self.failed[0] if self.failed else None,
            "mixed": self.mixed,
            "abandoned_by_client": self.abandoned,
            "read_slowly": self.slow,
            "nonsense_refused": self.nonsense,
            "refused_with_429_and_repeated": self.refused,
        }

    async def _learn(self, client: httpx.AsyncClient) -> None:
        """The answer of every adapter, alone."""
        for name in FIXED:
            self.expected[name] = {await self._answer(client, name)}
        answers = set()
        for version in self.versions:
            await asyncio.to_thread(self._swap, version)
            answers.add(await self._answer(client, "moving"))
        assert len(answers) == 2, "the two versions must answer differently"
        self.expected["moving"] = answers

    async def _ask_until_done(self, client: httpx.AsyncClient) -> None:
        while not self.is_done:
            self.asked += 1
            name = "moving" if self.random.random() < 0.5 else self.random.choice(FIXED)
            kind = self.random.random()
            try:
                if kind < 0.02:
                    await self._leave_early(client, name)
                elif kind < 0.03:
                    await self._read_slowly(client, name)
                elif kind < 0.04:
                    await self._send_nonsense(client, name)
                else:
                    started = time.monotonic()
                    found = await self._answer(client, name)
                    self.latencies.append(time.monotonic() - started)
                    self.mixed += found not in self.expected[name]
            except (httpx.HTTPError, AssertionError) as error:
                self.failed.append(f"{name}: {error!r}")

    async def _answer(self, client: httpx.AsyncClient, name: str) -> str:
        body = {"model": name, "messages": QUESTION, "temperature": 0, "max_tokens": 4}
        while True:
            response = await client.post("/v1/chat/completions", json=body)
            if response.status_code == 429:
                self.refused += 1
                await asyncio.sleep(0.02)
                continue
            assert response.status_code == 200, response.text
            return str(response.json()["choices"][0]["message"]["content"])

    async def _leave_early(self, client: httpx.AsyncClient, name: str) -> None:
        body = {"model": name, "messages": QUESTION, "temperature": 0, "max_tokens": 300, "stream": True}
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            async for _ in response.aiter_lines():
                break
        self.abandoned += 1

    async def _read_slowly(self, client: httpx.AsyncClient, name: str) -> None:
        body = {"model": name, "messages": QUESTION, "temperature": 0, "max_tokens": 4, "stream": True}
        text = ""
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code == 429:
                self.refused += 1
                return
            async for line in response.aiter_lines():
                await asyncio.sleep(0.05)
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
        self.slow += 1
        self.mixed += text not in self.expected[name]

    async def _send_nonsense(self, client: httpx.AsyncClient, name: str) -> None:
        body = self.random.choice(
            [
                {"model": "nobody", "messages": QUESTION},
                {"model": name, "messages": QUESTION, "max_tokens": -1},
                {"model": name, "messages": "?"},
            ]
        )
        response = await client.post("/v1/chat/completions", json=body)
        assert response.status_code in (400, 404), response.text
        assert response.json()["error"]["message"]
        self.nonsense += 1

    def _swap(self, version: Path) -> None:
        """What a follower does at a promotion: make the model, then let the name mean it."""
        self.catalog.point("moving", self.catalog.make_adapter("moving", version))

    async def _swap_until_done(self, swap_every: int) -> None:
        while True:
            if self.asked < swap_every * (self.swaps + 1):
                if self.is_done:
                    return
                await asyncio.sleep(0.005)
                continue
            version = self.versions[self.swaps % 2]
            await asyncio.to_thread(self._swap, version)
            self.swaps += 1

    async def _watch_memory(self) -> None:
        process = psutil.Process()
        pause = max(0.05, self.seconds / MEMORY_SAMPLES)
        while True:
            self.memory.append(process.memory_info().rss)
            await asyncio.sleep(pause)


def memory_summary(samples: list[int]) -> dict[str, Any]:
    """Median of each quarter of the samples in MB, and whether the last two differ little."""
    size = max(1, len(samples) // 4)
    quarters = [statistics.median(samples[number * size : (number + 1) * size] or samples) for number in range(4)]
    growth = quarters[3] / quarters[2] - 1
    return {
        "quarters": [round(quarter / 2**20, 1) for quarter in quarters],
        "growth_of_the_last": round(growth, 4),
        "flat": growth <= FLAT,
    }


PARTS = {"requests": requests, "channels": soak_channels.run, "hour": hour}
