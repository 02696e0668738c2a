"""A server of a real base under load: many adapters behind a small cache, and latency as the load grows.

    python -m studies.serving_load /tmp/base-fp32 --parts prepare     # 200 adapters, minutes, not measured
    python -m studies.serving_load /tmp/base-fp32 --parts zipf load   # with the same --work

zipf  200 adapters (rank 8 on every linear layer) are registered, 16 fit into memory; eight clients ask adapters drawn
      from Zipf's law (exponent 1). Paired with the same requests to one adapter, in blocks turn about: what many
      adapters cost over one
load  requests arrive at random (Poisson) at 40, 70 and 90 % of what the server did with eight clients that wait for
      each other, all of the eight most popular adapters; p50, p95 and p99 of the whole answer and of the first token

Over HTTP, prompts of 32 tokens, answers of 6. Writes ``studies/results/serving_load.json``; parts that are not run
keep their figures.
"""

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from safetensors.torch import load_file, save_file

from graftline.serve.app import Access, Server
from graftline.serve.base import Base, Runtime
from graftline.serve.catalog import Catalog
from graftline.serve.scheduler import Limits, Scheduler
from studies.serving_models import make_adapter
from studies.soak_serving import percentiles
from tests.serve.conftest import run

RESULTS = Path(__file__).parent / "results" / "serving_load.json"
NUM_ADAPTERS, CACHE, RANK, CLIENTS = 200, 16, 8, 8
PROMPT_TOKENS, NEW_TOKENS = 32, 6
LOADS = (0.4, 0.7, 0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--parts", nargs="+", choices=["prepare", "zipf", "load"], default=["prepare", "zipf", "load"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--requests", type=int, default=40, help="in a block; load: at each rate")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--work", type=Path, help="keep graphs and adapters here")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = json.loads(args.out.read_text()) if args.out.exists() else {}
    report |= {"model": args.model.name, "threads": args.threads, "clients": CLIENTS, "rank": RANK}
    report |= {"prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS}
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        catalog = registered(args.model, work, args.threads)
        if set(args.parts) == {"prepare"}:
            return
        limits = Limits(max_waiting=1000)
        with run(Server(catalog, Scheduler(limits), None, Access())) as url:
            asyncio.run(measure(url, catalog, args, report))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def registered(model: Path, work: Path, num_threads: int) -> Catalog:
    """The base with all adapters by name; they are made where they are not there yet."""
    catalog = Catalog()
    runtime = Runtime(graphs=work / "graphs", num_threads=num_threads, max_adapters=CACHE)
    catalog.add_base("base", Base(model, runtime))
    for number in range(NUM_ADAPTERS):
        folder = work / "many" / f"{number:03}"
        if number == 0 and not folder.exists():
            make_adapter(model, folder, "lora", rank=RANK)
        elif not folder.exists():
            vary(work / "many" / "000", folder, seed=number)
        catalog.load_adapter(name_of(number), folder)
    return catalog


def vary(source: Path, folder: Path, *, seed: int) -> None:
    """Another adapter of the same shape."""
    folder.mkdir()
    for name in ("adapter_config.json", "graftline.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(source / "adapter_model.safetensors")
    changed = {name: t + 0.01 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}
    save_file(changed, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def name_of(number: int) -> str:
    return f"adapter-{number:03}"


async def measure(url: str, catalog: Catalog, args: argparse.Namespace, report: dict[str, Any]) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        if "zipf" in args.parts:
            report["zipf"] = await zipf(client, catalog, args)
        if "load" in args.parts:
            report["load"] = await load(client, args)


async def zipf(client: httpx.AsyncClient, catalog: Catalog, args: argparse.Namespace) -> dict[str, Any]:
    """The same number of requests to many adapters and to one, block by block."""
    rng, cache = np.random.default_rng(0), catalog.resolve("base").base.adapters
    weights = 1 / np.arange(1, NUM_ADAPTERS + 1)
    await closed_loop(client, [0] * CLIENTS)
    rates: dict[str, list[float]] = {"many": [], "one": []}
    latencies: dict[str, list[float]] = {"many": [], "one": []}
    asked: list[int] = []
    before = cache.num_loads
    for _ in range(args.blocks):
        drawn = rng.choice(NUM_ADAPTERS, args.requests, p=weights / weights.sum()).tolist()
        asked += drawn
        for side, numbers in (("many", drawn), ("one", [0] * args.requests)):
            seconds, samples = await closed_loop(client, numbers)
            rates[side].append(args.requests / seconds)
            latencies[side] += samples
    loads = cache.num_loads - before
    return {
        "registered": NUM_ADAPTERS,
        "cache": CACHE,
        "requests": len(asked),
        "different_adapters_asked": len(set(asked)),
        "reads_from_file": loads,
        "found_in_cache": round(1 - loads / len(asked), 3),
        "requests_per_s": {side: round(float(np.median(values)), 2) for side, values in rates.items()},
        "many_over_one": round(float(np.median(np.divide(rates["many"], rates["one"]))), 3),
        "latency_ms": {side: percentiles(samples) for side, samples in latencies.items()},
        "adapters_in_cache_mb": round(cache.num_bytes / 2**20, 1),
        "process_mb": psutil.Process().memory_info().rss >> 20,
    }


async def closed_loop(client: httpx.AsyncClient, numbers: list[int]) -> tuple[float, list[float]]:
    """Clients that ask one after another; returns the seconds for all and those of each answer."""
    left, samples = list(enumerate(numbers)), []

    async def ask_until_done() -> None:
        while left:
            samples.append((await ask(client, *left.pop()))[1])

    started = time.monotonic()
    await asyncio.gather(*(ask_until_done() for _ in range(CLIENTS)))
    return time.monotonic() - started, samples


async def load(client: httpx.AsyncClient, args: argparse.Namespace) -> dict[str, Any]:
    """Latency at several shares of the server's throughput."""
    rng, found = np.random.default_rng(1), {}
    numbers = rng.integers(0, CLIENTS, args.requests).tolist()
    await closed_loop(client, list(range(CLIENTS)))
    seconds, _ = await closed_loop(client, numbers)
    capacity = args.requests / seconds
    for share in LOADS:
        gaps = rng.exponential(1 / (share * capacity), args.requests)
        tasks = []
        for number, gap in zip(numbers, gaps, strict=True):
            await asyncio.sleep(gap)
            tasks.append(asyncio.create_task(ask(client, len(tasks), number)))
        samples = await asyncio.gather(*tasks)
        found[f"{round(100 * share)}_percent"] = {
            "requests_per_s": round(share * capacity, 2),
            "requests": args.requests,
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


if __name__ == "__main__":
    main()
