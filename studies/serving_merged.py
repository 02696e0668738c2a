"""What an adapter costs in CPU seconds: base, merged and unmerged, in many fresh sessions; and how far the products go.

    python -m studies.serving_merged /tmp/base-fp32 --work /tmp/merged --parts whole limit
    python -m studies.serving_merged /tmp/base-fp32 --work /tmp/merged --parts four_blocks --pairs 60

One thread, CPU seconds, the smallest of five turns of each side: what else the machine does only adds. Two sessions of
one graph differ for as long as they live, so a pair of fresh sessions is the unit of the statistics. Pairs are added to
``studies/results/serving_merged.json`` one by one until there are ``--pairs``: an interrupted run goes on.

whole        every block of the base
four_blocks  its first four and the head: sessions that are made quickly, so that there can be many. "A merged model
             takes the base's time" is tested here, by two one-sided tests of the log ratio against ± 2 % (alpha 0.05);
             the margin was fixed before the first run; 60 pairs were planned, 40 fitted the time
limit        a step's matrix products alone, by torch, over the whole step: above 1, torch needs more for the products
             than the server for all of it
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from graftline.digest import write_json
from graftline.evaluate.statistics.multiplicity import paired_tost
from graftline.export.onnx_session import Runner
from graftline.merge.fold import merge_folder
from graftline.serve.base import Base, Runtime
from studies.serving_models import RANK, decode_seconds, make_adapter, prefill_seconds
from studies.turns import ratio, turns

RESULTS = Path(__file__).parent / "results" / "serving_merged.json"
MARGIN = 0.02
TURNS = 5
KINDS: dict[str, Callable[[Base, Runner], float]] = {
    "decode_batch_1": lambda base, runner: decode_seconds(base, runner, 1, 8, length=8, clock=time.process_time),
    "decode_batch_8": lambda base, runner: decode_seconds(base, runner, 8, 4, length=8, clock=time.process_time),
    "prefill_128": lambda base, runner: prefill_seconds(base, runner, 1, 128, clock=time.process_time),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="graphs, adapters and merged models")
    parser.add_argument("--parts", nargs="+", choices=["whole", "four_blocks", "limit"], required=True)
    parser.add_argument("--pairs", type=int, default=12, help="of sessions")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    report = json.loads(args.out.read_text()) if args.out.is_file() else {}
    report |= {"model": args.model.name, "rank": RANK, "precision": "fp32", "threads": 1, "clock": "CPU seconds"}
    for part in args.parts:
        if part == "limit":
            report[part] = limit(args.model, args.work)
        else:
            model = first_blocks(args.model, args.work / part, 4) if part == "four_blocks" else args.model
            pairs = report.setdefault(part, {}).setdefault("pairs", [])
            while len(pairs) < args.pairs:
                pairs.append(one_pair(model, args.work / part, seed=len(pairs)))
                report[part] |= {kind: costs(pairs, kind) for kind in KINDS}
                write_json(args.out, report)
        write_json(args.out, report)
        print(part, {key: value for key, value in report[part].items() if key != "pairs"}, flush=True)


def first_blocks(model: Path, work: Path, count: int) -> Path:
    """A model of the first blocks of another."""
    folder = work / "base"
    if not folder.exists():
        cut = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        cut.model.layers = cut.model.layers[:count]
        cut.config.num_hidden_layers = count
        if getattr(cut.config, "layer_types", None):
            cut.config.layer_types = cut.config.layer_types[:count]
        AutoTokenizer.from_pretrained(model).save_pretrained(folder)
        cut.save_pretrained(folder)
    return folder


def one_pair(model: Path, work: Path, *, seed: int) -> dict[str, dict[str, float]]:
    """CPU seconds by kind of work and side, in fresh sessions of the base and of the merged model."""
    runtime, adapter_folder, merged = Runtime(graphs=work / "graphs", num_threads=1), work / "lora", work / "merged"
    if not adapter_folder.exists():
        make_adapter(model, adapter_folder, "lora")
    if not merged.exists():
        merge_folder(model, adapter_folder, merged, dtype=torch.float32)
    folders = {"base": model, "merged": merged}
    order = list(folders) if seed % 2 else list(folders)[::-1]
    bases = {name: Base(folders[name], runtime) for name in order}
    adapter, _ = bases["base"].prepare_adapter(adapter_folder)
    runners = {name: (base, base.new_runner(None)) for name, base in bases.items()}
    runners["unmerged"] = (bases["base"], bases["base"].new_runner(adapter))
    seconds = {
        kind: turns({side: lambda it=it, run=run: run(*it) for side, it in runners.items()}, TURNS, seed=seed)
        for kind, run in KINDS.items()
    }
    return {kind: {side: round(min(samples), 6) for side, samples in by.items()} for kind, by in seconds.items()}


def costs(pairs: list[dict[str, dict[str, float]]], kind: str) -> dict[str, Any]:
    """Ratios with their intervals, and the test of equal time."""
    base, merged, unmerged = ([pair[kind][side] for pair in pairs] for side in ("base", "merged", "unmerged"))
    found: dict[str, Any] = {
        "unmerged_over_merged": ratio(unmerged, merged),
        "unmerged_over_base": ratio(unmerged, base),
        "merged_over_base": ratio(merged, base),
    }
    if len(pairs) > 1:
        p_value = paired_tost(np.log(merged) - np.log(base), math.log(1 - MARGIN), math.log(1 + MARGIN))
        found["merged_equals_base"] = {"margin": MARGIN, "p_value": p_value, "shown": p_value < 0.05}
    return found


def limit(model: Path, work: Path) -> dict[str, Any]:
    """Share of a step that its products take when torch does nothing else."""
    base = Base(model, Runtime(graphs=work / "whole" / "graphs", num_threads=1))
    runner, layout = base.new_runner(None), base.session.layout
    shapes = [(linear.in_features, sum(linear.out_features)) for linear in layout.linears]
    weights = [torch.randn(num_out, num_in) for num_in, num_out in shapes]
    head = torch.randn(layout.vocab_size, layout.hidden_size)

    def products(num_rows: int, num_tokens: int) -> float:
        inputs = {num_in: torch.randn(num_rows * num_tokens, num_in) for num_in, _ in shapes}
        last = torch.randn(num_rows, layout.hidden_size)
        started = time.process_time()
        for weight in weights:
            torch.mm(inputs[weight.shape[1]], weight.T)
        torch.mm(last, head.T)
        return time.process_time() - started

    found = {}
    for name, num_rows, num_tokens in (("decode_batch_1", 1, 1), ("decode_batch_8", 8, 1), ("prefill_128", 1, 128)):
        sides = {
            "step": lambda rows=num_rows, count=num_tokens: prefill_seconds(
                base, runner, rows, count, clock=time.process_time
            ),
            "products": lambda rows=num_rows, count=num_tokens: products(rows, count),
        }
        seconds = {side: min(samples) for side, samples in turns(sides, 3 * TURNS).items()}
        found[name] = {
            "step_ms": round(1e3 * seconds["step"], 2),
            "products_ms": round(1e3 * seconds["products"], 2),
            "products_over_step": round(seconds["products"] / seconds["step"], 3),
        }
    return found


if __name__ == "__main__":
    main()
