"""Serving: the universal graph against transformers' generate with peft, paired in one run.

    python -m benchmarks.serving /tmp/base-fp32 --parts decode prefill adapter swap

Every side runs the same rank-16 adapter on every linear layer in fp32 in this process, turn about in random order; what
counts are the ratios of a round.

decode    tokens/s at batch 1, 4 and 16 over generate's, the reading of the prompt taken out on both sides
prefill   tokens/s of a prompt of 128 and of 512 tokens
adapter   base alone, base with the adapter, and the merged model, each with a graph of its own: what an unmerged
          adapter costs, and whether a merged one is free: two one-sided tests of the log ratio of a pair of sessions
          against ± 3 % (alpha 0.05), the margin fixed before the first run
swap      from "this adapter now" to its tensors bound, from its file and from the cache

Writes ``benchmarks/results/serving.json``; parts that are not run keep their figures.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.serving_models import (
    RANK,
    decode_seconds,
    forward_seconds,
    generate_seconds,
    make_adapter,
    prefill_seconds,
    prompts,
)
from benchmarks.turns import rate, ratio, turns
from graftline.evaluate.statistics.multiplicity import paired_tost
from graftline.export.onnx_session import Runner, Step
from graftline.merge.fold import merge_folder
from graftline.serve.adapter_cache import AdapterCache
from graftline.serve.base import Base, Runtime

RESULTS = Path(__file__).parent / "results" / "serving.json"
DECODE_TOKENS = {1: 16, 4: 12, 16: 8}
PREFILL_LENGTHS = (128, 512)
EQUIVALENCE_MARGIN = 0.03
SESSIONS_A_ROUND = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="of comparisons")
    parser.add_argument("--work", type=Path, help="keep graphs and adapters here")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = json.loads(args.out.read_text()) if args.out.exists() else {}
    report |= {"model": args.model.name, "rank": RANK, "precision": "fp32", "threads": args.threads}
    with tempfile.TemporaryDirectory() as temporary:
        sides = Sides(args.model, args.work or Path(temporary), args.threads)
        for part in args.parts:
            report[part] = PARTS[part](sides, args.rounds)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


class Sides:
    """A base, an adapter of it on the graph, and the same in peft."""

    def __init__(self, model: Path, work: Path, num_threads: int) -> None:
        self.model, self.work = model, work
        self.runtime = Runtime(graphs=work / "graphs", num_threads=num_threads)
        self.adapter_folder = work / f"lora-{RANK}"
        if not self.adapter_folder.exists():
            make_adapter(model, self.adapter_folder, "lora")
        self.base = Base(model, self.runtime)
        self.adapter, _ = self.base.prepare_adapter(self.adapter_folder)
        self.runner = self.base.new_runner(self.adapter)

    def peer(self) -> Any:
        """The peer's model, after it was seen to compute the same."""
        plain = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        peer = PeftModel.from_pretrained(plain, self.adapter_folder).eval()
        ids = prompts(1, 32)
        step = Step(ids, [32], every_position=True)
        found = self.runner.step(self.base.session.new_cache(1, 32), step)[0]
        with torch.no_grad():
            difference = float(np.abs(found - peer(input_ids=torch.tensor(ids)).logits[0].numpy()).max())
        assert difference < 5e-3, f"the two sides differ by {difference} in a logit: their times say nothing"
        return peer


def against_generate(sides: Sides, num_rounds: int) -> dict[str, Any]:
    """Decoding against generate."""
    peer, found = sides.peer(), {}
    for num_rows, num_tokens in DECODE_TOKENS.items():
        seconds = turns(
            {
                "ours": lambda rows=num_rows, count=num_tokens: decode_seconds(sides.base, sides.runner, rows, count),
                "peer": lambda rows=num_rows, count=num_tokens: generate_seconds(peer, rows, count),
            },
            num_rounds,
        )
        found[f"batch_{num_rows}"] = compared(seconds, num_rows * num_tokens)
    return found


def against_forward(sides: Sides, num_rounds: int) -> dict[str, Any]:
    """Reading prompts against transformers' forward pass."""
    peer, found = sides.peer(), {}
    for length in PREFILL_LENGTHS:
        seconds = turns(
            {
                "ours": lambda length=length: prefill_seconds(sides.base, sides.runner, 1, length),
                "peer": lambda length=length: forward_seconds(peer, 1, length),
            },
            num_rounds,
        )
        found[f"prompt_{length}"] = compared(seconds, length)
    return found


def compared(seconds: dict[str, list[float]], num_tokens: int) -> dict[str, Any]:
    return {
        "graftline_tokens_per_s": rate(num_tokens, seconds["ours"]),
        "peer_tokens_per_s": rate(num_tokens, seconds["peer"]),
        "ratio": ratio(seconds["peer"], seconds["ours"]),
    }


def cost_of_an_adapter(sides: Sides, num_rounds: int) -> dict[str, Any]:
    """Base alone, unmerged, merged, in fresh sessions each time.

    Two sessions of one graph differ by up to a tenth in speed for as long as they live (where their weights came to lie
    in memory), so that a session, not a round, is the unit of the statistics.
    """
    merged_folder = sides.work / "merged"
    if not merged_folder.exists():
        merge_folder(sides.model, sides.adapter_folder, merged_folder, dtype=torch.float32)
    folders = {"base": sides.model, "merged": merged_folder}
    medians: dict[str, dict[str, list[float]]] = {}
    for number in range(SESSIONS_A_ROUND * num_rounds):
        order = list(folders) if number % 2 else list(folders)[::-1]
        bases = {name: Base(folders[name], sides.runtime) for name in order}
        adapter, _ = bases["base"].prepare_adapter(sides.adapter_folder)
        runners = {name: (base, base.new_runner(None)) for name, base in bases.items()}
        runners["unmerged"] = (bases["base"], bases["base"].new_runner(adapter))
        for kind, seconds in one_session_each(runners, seed=number).items():
            for side, samples in seconds.items():
                medians.setdefault(kind, {}).setdefault(side, []).append(statistics.median(samples))
    return {kind: costs(seconds) for kind, seconds in medians.items()}


def one_session_each(runners: dict[str, tuple[Base, Runner]], *, seed: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by kind of work and side."""
    work: dict[str, Callable[[Base, Runner], float]] = {
        "decode_batch_1": lambda base, runner: decode_seconds(base, runner, 1, 8, length=8),
        "decode_batch_8": lambda base, runner: decode_seconds(base, runner, 8, 4, length=8),
        "prefill_128": lambda base, runner: prefill_seconds(base, runner, 1, 128),
    }
    return {
        kind: turns({side: lambda it=it, run=run: run(*it) for side, it in runners.items()}, 3, seed=seed)
        for kind, run in work.items()
    }


def costs(seconds: dict[str, list[float]]) -> dict[str, Any]:
    differences = np.log(seconds["merged"]) - np.log(seconds["base"])
    p_value = paired_tost(differences, math.log(1 - EQUIVALENCE_MARGIN), math.log(1 + EQUIVALENCE_MARGIN))
    return {
        "unmerged_over_merged": ratio(seconds["unmerged"], seconds["merged"]),
        "unmerged_over_base": ratio(seconds["unmerged"], seconds["base"]),
        "merged_over_base": ratio(seconds["merged"], seconds["base"]),
        "merged_equals_base": {"margin": EQUIVALENCE_MARGIN, "p_value": p_value, "shown": p_value < 0.05},
    }


def swap(sides: Sides, num_rounds: int) -> dict[str, Any]:
    """From "this adapter now" to its tensors bound."""
    times: dict[str, list[float]] = {"from_file": [], "in_cache": []}
    for _ in range(4 * num_rounds):
        cache = AdapterCache(sides.base.session, key=sides.base.key, max_adapters=1)
        for samples in times.values():
            started = time.perf_counter()
            with cache.use(sides.adapter):
                samples.append(1e3 * (time.perf_counter() - started))
    quantiles = {name: np.quantile(samples, [0.5, 0.95]).round(3).tolist() for name, samples in times.items()}
    return {
        "adapter_mb": round(sides.adapter.file.stat().st_size / 2**20, 2),
        **{f"{name}_ms": {"p50": p50, "p95": p95} for name, (p50, p95) in quantiles.items()},
    }


PARTS = {"decode": against_generate, "prefill": against_forward, "adapter": cost_of_an_adapter, "swap": swap}

if __name__ == "__main__":
    main()
