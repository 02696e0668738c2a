"""Training speed against peft + transformers.Trainer, both in one run on one machine, in turns, at equal settings.

    python -m studies.training --base MODEL_FOLDER --rows ROWS.jsonl --peer peer_train.py

Each side runs in its own process as studies/training_sides.py says: the same rows, learning rate and number of
steps, CPU seconds on one thread. Both adapters are then scored by one function on the same held-out rows. ``limit`` is
what the machine gives to the linear layers' matrix products alone (forward, and backward to the input, of the decoder's
body on packed tokens): no training that computes every token of every row can be faster.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from graftline.digest import write_json
from studies.training_sides import BATCH, HELD_OUT, encode, read_rows, run_side

_SIDES = ("peer", "graftline", "limit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, type=Path)
    parser.add_argument("--rows", required=True, type=Path)
    parser.add_argument("--peer", required=True, type=Path, help="peer_train.py")
    parser.add_argument("--methods", nargs="+", default=["lora"], choices=["lora", "rslora", "dora", "vera"])
    parser.add_argument("--num-rows", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("studies/results/training.json"))
    parser.add_argument("--limit", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.limit:
        print(json.dumps(_measure_limit(args)))
        return
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, file in _write_row_files(args, Path(folder)).items():
            for method in args.methods:
                results.append(_compare(args, name, file, method))
                write_json(args.out, {"seconds": "CPU, one thread", "torch": torch.__version__, "results": results})


def _write_row_files(args: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """The demo's rows; and rows of one length, nearly all supervised: no padding and no head to save on."""
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()]
    full = []
    for row in rows:
        head, _, tail = row["prompt"].partition(":")
        whole = {"prompt": head + ":", "completion": tail + row["completion"]}
        if len(encode(tokenizer, whole).input_ids) == 28:
            full.append(whole)
    files = {"demo": rows, "full": full}
    for name, content in files.items():
        wanted = content[: args.num_rows + HELD_OUT]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wanted))
    return {name: folder / f"{name}.jsonl" for name in files}


def _compare(args: argparse.Namespace, rows_name: str, rows: Path, method: str) -> dict[str, Any]:
    sides: dict[str, list[dict[str, Any]]] = {side: [] for side in _SIDES}
    for turn in range(args.rounds):
        for side, found in sides.items():
            found.append(_run_side(args, side, rows, method))
            print(rows_name, method, turn, side, found[-1], flush=True)
    ratios = [
        ours["tokens_per_second"] / peer["tokens_per_second"]
        for ours, peer in zip(sides["graftline"], sides["peer"], strict=True)
    ]
    rate = {side: statistics.median(run["tokens_per_second"] for run in found) for side, found in sides.items()}
    return {
        "rows": rows_name,
        "method": method,
        "num_rows": args.num_rows,
        "ratio_median": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "tokens_per_second": {side: round(value, 1) for side, value in rate.items()},
        "share_of_limit": round(rate["graftline"] / rate["limit"], 3),
        "losses": {side: sides[side][-1]["losses"] for side in ("peer", "graftline")},
        "held_out_loss": {side: sides[side][-1]["held_out_loss"] for side in ("peer", "graftline")},
        "peak_megabytes": {side: sides[side][-1]["peak_megabytes"] for side in ("peer", "graftline")},
    }


def _run_side(args: argparse.Namespace, side: str, rows: Path, method: str) -> dict[str, Any]:
    if side != "limit":
        options = {"base": args.base, "rows": rows, "method": method, "num_rows": args.num_rows}
        return run_side(side, **options, **({"peer": args.peer} if side == "peer" else {}))
    command = [sys.executable, "-m", "studies.training", "--limit", "--base", str(args.base), "--rows", str(rows)]
    command += ["--peer", str(args.peer), "--num-rows", str(args.num_rows)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measure_limit(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    rows = read_rows(args.rows, AutoTokenizer.from_pretrained(args.base))[: args.num_rows]
    tokens = round(sum(len(row.input_ids) for row in rows) / len(rows) * BATCH)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.base))
    body = model.base_model
    layers = [torch.empty(m.weight.shape).uniform_(-0.1, 0.1) for m in body.modules() if isinstance(m, nn.Linear)]
    inputs = {size: torch.rand(tokens, size) for weight in layers for size in weight.shape}
    seconds = []
    for _ in range(4):
        started = time.process_time()
        for weight in layers:
            inputs[weight.shape[1]] @ weight.T
            inputs[weight.shape[0]] @ weight
        seconds.append(time.process_time() - started)
    return {"tokens_per_second": tokens / statistics.median(seconds[1:])}


if __name__ == "__main__":
    main()
