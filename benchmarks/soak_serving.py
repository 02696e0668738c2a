"""Soak: a real server under load while adapters are swapped, loaded and dropped. Nothing may fail, nothing may mix.

    python benchmarks/soak_serving.py --requests 10000 --swaps 200

A tiny model made by code, so that the server and not the arithmetic is what is exercised. Half of the requests go to
a name that is moved between two adapters all the time: each answer must be wholly one adapter's or the other's. The
others go to fixed names, more of them than fit into the adapter cache. Some clients leave in the middle of a stream.
Writes ``benchmarks/results/soak_serving.json`` and ends with an error when anything failed.
"""

import argparse
import asyncio
import json
import logging
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))  # tests/ makes the model

RESULTS = Path(__file__).parent / "results" / "soak_serving.json"
QUESTION = [{"role": "user", "content": "Definition: a tall plant\nCategory:"}]
FIXED = [f"fixed-{number}" for number in range(6)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--swaps", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line a request would cost more than the request
    with tempfile.TemporaryDirectory() as work:
        report = soak(args, Path(work))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    if report["failed"] or report["mixed"]:
        sys.exit(1)


def soak(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    from graftline.serving.app import Access, Server
    from graftline.serving.base import Base, Runtime
    from graftline.serving.catalog import Catalog
    from graftline.serving.scheduler import Limits, Scheduler
    from tests.serving.conftest import make_adapter, run
    from tests.tiny import make_tiny_llama

    base = make_tiny_llama(work / "base", num_hidden_layers=1)
    catalog = Catalog()
    catalog.add_base("base", Base(base, Runtime(graphs=work / "graphs", num_threads=1, max_adapters=4)))
    for number, name in enumerate(FIXED):
        catalog.load_adapter(name, make_adapter(base, work / name, seed=number))
    versions = [make_adapter(base, work / f"version-{number}", seed=100 + number) for number in range(2)]
    server = Server(catalog, Scheduler(Limits(max_batch=8, max_waiting=64)), None, Access())
    with run(server) as url:
        return asyncio.run(Load(args, url, catalog, versions).run(server))


class Load:
    """The clients, and whoever swaps."""

    def __init__(self, args: argparse.Namespace, url: str, catalog: Any, versions: list[Path]) -> None:
        self.args, self.url, self.catalog, self.versions = args, url, catalog, versions
        self.left = args.requests
        self.failed: list[str] = []
        self.mixed = self.refused = self.abandoned = self.swaps = 0
        self.seconds: list[float] = []
        self.expected: dict[str, set[str]] = {}
        self.random = random.Random(0)

    async def run(self, server: Any) -> dict[str, Any]:
        """Learn the right answers, then ask and swap until the requests are used up."""
        process = psutil.Process()
        async with httpx.AsyncClient(base_url=self.url, timeout=120) as client:
            await self._learn(client)
            memory_before, started = process.memory_info().rss, time.monotonic()
            clients = [self._ask_until_done(client) for _ in range(self.args.clients)]
            await asyncio.gather(self._swap_until_done(), *clients)
        seconds = sorted(self.seconds)
        elapsed = time.monotonic() - started
        while server.scheduler.num_running:
            await asyncio.sleep(0.05)
        return {
            "requests": self.args.requests,
            "swaps": self.swaps,
            "failed": len(self.failed),
            "first_failure": self.failed[0] if self.failed else None,
            "mixed": self.mixed,
            "abandoned_by_client": self.abandoned,
            "refused_with_429_and_repeated": self.refused,
            "adapter_loads": self.catalog.resolve("base").base.adapters.num_loads,
            "requests_per_s": round(self.args.requests / elapsed, 1),
            "latency_ms": {f"p{p}": round(1e3 * seconds[int(len(seconds) * p / 100)], 1) for p in (50, 95, 99)},
            "memory_mb": {"before": memory_before >> 20, "after": process.memory_info().rss >> 20},
            "kv_bytes_after": server.scheduler.budget.used_bytes,
        }

    async def _learn(self, client: httpx.AsyncClient) -> None:
        """The answer of every adapter, alone."""
        for name in FIXED:
            self.expected[name] = {await self._answer(client, name)}
        answers = set()
        for version in self.versions:
            await asyncio.to_thread(self.catalog.load_adapter, "moving", version, replace=True)
            answers.add(await self._answer(client, "moving"))
        assert len(answers) == 2, "the two versions must answer differently"
        self.expected["moving"] = answers

    async def _ask_until_done(self, client: httpx.AsyncClient) -> None:
        while self.left > 0:
            self.left -= 1
            name = "moving" if self.random.random() < 0.5 else self.random.choice(FIXED)
            try:
                if self.random.random() < 0.02:
                    await self._leave_early(client, name)
                else:
                    started = time.monotonic()
                    found = await self._answer(client, name)
                    self.seconds.append(time.monotonic() - started)
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

    async def _swap_until_done(self) -> None:
        every = self.args.requests / self.args.swaps
        while self.left > 0 or self.swaps < self.args.swaps:
            if self.left > 0 and self.args.requests - self.left < every * (self.swaps + 1):
                await asyncio.sleep(0.005)
                continue
            version = self.versions[self.swaps % 2]
            await asyncio.to_thread(self.catalog.load_adapter, "moving", version, replace=True)
            self.swaps += 1


if __name__ == "__main__":
    main()
