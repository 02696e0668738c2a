"""Soak: a real server under load while adapters are swapped, loaded and dropped. Nothing may fail, nothing may mix.

    python -m studies.soak_serving                            # 10,000 requests, 200 swaps
    python -m studies.soak_serving --minutes 60 --requests 0  # for an hour, however many requests that is

A tiny model made by code, so that the server and not the arithmetic is what is exercised. Half of the requests go to
a name that is moved between two adapters all the time: each answer must be wholly one adapter's or the other's. The
others go to fixed names, more of them than fit into the adapter cache. Some clients leave in the middle of a stream,
some read slowly, some send nonsense. Memory (of server and clients, one process) is looked at all the time; it is flat
when the medians of the third and the fourth quarter differ by at most 2 %.
Writes ``studies/results/soak_serving.json`` and ends with an error when anything failed.
"""

import argparse
import asyncio
import json
import logging
import random
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

RESULTS = Path(__file__).parent / "results" / "soak_serving.json"
QUESTION = [{"role": "user", "content": "Definition: a tall plant\nCategory:"}]
FIXED = [f"fixed-{number}" for number in range(6)]
MEMORY_SAMPLES = 200
FLAT = 0.02
"""Share of memory by which the last two quarters of a run may differ."""
TIMEOUT_SECONDS = 900
"""Of requests and of idle connections: on a shared machine the process may be stopped for minutes, and a server that
wakes up closes idle connections before it looks whether a request has come."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, help="end after so many, and after --minutes")
    parser.add_argument("--minutes", type=float, default=0.0, help="end after so long, and after --requests")
    parser.add_argument("--swap-every", type=int, default=50, help="requests between two swaps")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line a request would cost more than the request
    report = soak(args.requests, args.minutes, swap_every=args.swap_every, num_clients=args.clients)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    if report["failed"] or report["mixed"]:
        sys.exit(1)


def soak(num_requests: int, minutes: float, *, swap_every: int, num_clients: int) -> dict[str, Any]:
    """Run a server and its clients until both are reached: so many requests, so many minutes."""
    from graftline.serve.app import Access, Server
    from graftline.serve.base import Base, Runtime
    from graftline.serve.catalog import Catalog
    from graftline.serve.scheduler import Limits, Scheduler
    from tests.serve.conftest import make_adapter, run
    from tests.tiny import make_tiny_llama

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        base = make_tiny_llama(work / "base", num_hidden_layers=1)
        catalog = Catalog()
        catalog.add_base("base", Base(base, Runtime(graphs=work / "graphs", num_threads=1, max_adapters=4)))
        for number, name in enumerate(FIXED):
            catalog.load_adapter(name, make_adapter(base, work / name, seed=number))
        versions = [make_adapter(base, work / f"version-{number}", seed=100 + number) for number in range(2)]
        server = Server(catalog, Scheduler(Limits(max_batch=8, max_waiting=64)), None, Access())
        with run(server, keep_alive_seconds=TIMEOUT_SECONDS) as url:
            load = Load(url, catalog, versions, num_requests=num_requests, seconds=60 * minutes)
            return asyncio.run(load.run(server, swap_every=swap_every, num_clients=num_clients))


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


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 in milliseconds."""
    ordered = sorted(seconds)
    return {f"p{p}": round(1e3 * ordered[int(len(ordered) * p / 100)], 1) for p in (50, 95, 99)}


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


if __name__ == "__main__":
    main()
