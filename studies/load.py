"""A server under load: many adapters behind a small cache, and latency as the load grows.

zipf       200 adapters (rank 8 on every linear layer) are registered, 16 fit into memory; eight clients ask adapters
           drawn from Zipf's law (exponent 1). Paired with the same number of requests to one adapter, in turns
load       requests arrive at random (Poisson) at 40, 70 and 90 % of what the server did with eight clients that wait
           for each other; p50, p95 and p99 of the whole answer and of the first token

Over HTTP, on one machine with its clients.
"""

import asyncio
import contextlib
import logging
import socket
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import numpy as np
import psutil
import torch
import uvicorn
from safetensors.torch import load_file, save_file

from graftline.serve.app import AccessRules, Server, create_app
from graftline.serve.catalog import Catalog
from graftline.serve.scheduler import Limits, Scheduler
from graftline.serve.served_base import Base, Runtime
from studies.harness import Json, Setting, ratio
from studies.models import make_adapter

NUM_ADAPTERS, CACHE, RANK, CLIENTS = 200, 16, 8, 8
PROMPT_TOKENS, NEW_TOKENS = 32, 6
LOADS = (0.4, 0.7, 0.9)
TIMEOUT_SECONDS = 900
"""Of requests and of idle connections: on a shared machine the process may be stopped for minutes, and a server that
wakes up closes idle connections before it looks whether a request has come."""


@contextlib.contextmanager
def served(server: Server) -> Iterator[str]:
    """Run a server on a free port while the context lasts; yields its address."""
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line a request would cost more than the request
    config = uvicorn.Config(create_app(server), log_level="error", timeout_keep_alive=TIMEOUT_SECONDS)
    running, listening = uvicorn.Server(config), socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=running.run, args=([listening],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join(30)


# --- many adapters, growing load ---------------------------------------------------------------------------------


def zipf(setting: Setting) -> Json:
    """The same number of requests to many adapters and to one, block by block."""
    catalog, num_adapters = _registered(setting), _num_adapters(setting)
    with served(Server(catalog, Scheduler(Limits(max_waiting=1000)), None, AccessRules())) as url:
        return asyncio.run(_zipf(url, catalog, setting, num_adapters))


def _num_adapters(setting: Setting) -> int:
    return setting.size(NUM_ADAPTERS, CLIENTS)


def _registered(setting: Setting) -> Catalog:
    """The base with all adapters by name; they are made where they are not there yet."""
    catalog, model, many = Catalog(), setting.base(), setting.folder("many")
    runtime = Runtime(graphs=setting.folder("graphs"), num_threads=setting.threads, max_adapters=CACHE)
    catalog.add_base("base", Base(model, runtime))
    for number in range(_num_adapters(setting)):
        folder = many / f"{number:03}"
        if number == 0 and not folder.exists():
            make_adapter(model, folder, rank=RANK)
        elif not folder.exists():
            _vary(many / "000", folder, seed=number)
        catalog.load_adapter(name_of(number), folder)
    return catalog


def _vary(source: Path, folder: Path, *, seed: int) -> None:
    """Another adapter of the same shape."""
    folder.mkdir()
    for name in ("adapter_config.json", "graftline.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(source / "adapter_model.safetensors")
    changed = {name: t + 0.01 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}
    save_file(changed, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def name_of(number: int) -> str:
    """The name that an adapter is asked by."""
    return f"adapter-{number:03}"


async def _zipf(url: str, catalog: Catalog, setting: Setting, num_adapters: int) -> Json:
    rng, cache = np.random.default_rng(setting.seed), catalog.resolve("base").base.adapters
    weights, num_requests = 1 / np.arange(1, num_adapters + 1), setting.size(40, 8)
    seconds: dict[str, list[float]] = {"many": [], "one": []}
    latencies: dict[str, list[float]] = {"many": [], "one": []}
    asked: list[int] = []
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_SECONDS) as client:
        await closed_loop(client, [0] * CLIENTS)
        before = cache.num_loads
        for _ in range(setting.rounds or setting.size(3, 1)):
            drawn = [int(n) for n in rng.choice(num_adapters, num_requests, p=weights / weights.sum())]
            asked += drawn
            for side, numbers in (("many", drawn), ("one", [0] * num_requests)):
                took, samples = await closed_loop(client, numbers)
                seconds[side].append(took)
                latencies[side] += samples
    loads = cache.num_loads - before
    return {
        "registered": num_adapters,
        "requests": len(asked),
        "different_adapters_asked": len(set(asked)),
        "reads_from_file": loads,
        "found_in_cache": round(1 - loads / len(asked), 3),
        "requests_per_s": {side: round(num_requests / statistics.median(took), 2) for side, took in seconds.items()},
        "many_over_one": ratio(seconds["one"], seconds["many"]),
        "latency_ms": {side: percentiles(samples) for side, samples in latencies.items()},
        "adapters_in_cache_mb": round(cache.num_bytes / 2**20, 1),
        "process_mb": psutil.Process().memory_info().rss >> 20,
    }


async def closed_loop(client: httpx.AsyncClient, numbers: list[int]) -> tuple[float, list[float]]:
    """Clients that ask one after another; returns the seconds for all and those of each answer."""
    left = list(enumerate(numbers))
    samples: list[float] = []

    async def ask_until_done() -> None:
        while left:
            samples.append((await ask(client, *left.pop()))[1])

    started = time.monotonic()
    await asyncio.gather(*(ask_until_done() for _ in range(CLIENTS)))
    return time.monotonic() - started, samples


def load(setting: Setting) -> Json:
    """Latency at several shares of the server's throughput."""
    with served(Server(_registered(setting), Scheduler(Limits(max_waiting=1000)), None, AccessRules())) as url:
        return asyncio.run(_load(url, setting))


async def _load(url: str, setting: Setting) -> Json:
    rng, found, num_requests = np.random.default_rng(setting.seed), {}, setting.size(40, 8)
    numbers = [int(number) for number in rng.integers(0, CLIENTS, num_requests)]
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_SECONDS) as client:
        await closed_loop(client, list(range(CLIENTS)))
        seconds, _ = await closed_loop(client, numbers)
        capacity = num_requests / seconds
        for share in LOADS:
            gaps = [float(gap) for gap in rng.exponential(1 / (share * capacity), num_requests)]
            tasks: list[asyncio.Task[tuple[float, float]]] = []
            for number, gap in zip(numbers, gaps, strict=True):
                await asyncio.sleep(gap)
                tasks.append(asyncio.create_task(ask(client, len(tasks), number)))
            samples = await asyncio.gather(*tasks)
            found[f"{round(100 * share)}_percent"] = {
                "requests_per_s": round(share * capacity, 2),
                "requests": num_requests,
                "answer_ms": percentiles([whole for _, whole in samples]),
                "first_token_ms": percentiles([first for first, _ in samples]),
            }
    return {"capacity_requests_per_s": round(capacity, 2), **found}


async def ask(client: httpx.AsyncClient, serial: int, number: int) -> tuple[float, float]:
    """Seconds to the first token and to the end of one answer."""
    prompt = [100 + (17 * serial + 7 * token) % 400 for token in range(PROMPT_TOKENS)]
    body = {"model": name_of(number), "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "stream": True}
    started, first = time.monotonic(), 0.0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, response.status_code
        async for line in response.aiter_lines():
            first = first or (line.startswith("data: {") and time.monotonic() - started) or 0.0
    return first, time.monotonic() - started


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 in milliseconds."""
    ordered = sorted(seconds)
    return {f"p{p}": round(1e3 * ordered[int(len(ordered) * p / 100)], 1) for p in (50, 95, 99)}


PARTS = {"zipf": zipf, "load": load}
