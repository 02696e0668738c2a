"""Merge: graftline's streamed fold against peft's merge_and_unload, paired in one run.

    python benchmarks/merge.py /tmp/base-fp32 --peer ../shared/bench/peer_merge.py

Each merge is a process of its own (peak memory is a process's). The two alternate, so that a busy machine is busy for
both; what counts are the ratios. Writes ``benchmarks/results/merge.json``.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "merge.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer", type=Path, required=True, help="peer_merge.py")
    parser.add_argument("--adapter", type=Path, help="PEFT adapter; made here when not given")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # the child process: merge into this folder
    args = parser.parse_args()
    if args.one:
        merge_once(args.model, args.adapter, args.one, args.dtype)
        return
    with tempfile.TemporaryDirectory(dir=args.model.parent) as work:
        adapter = args.adapter or make_adapter(args.model, Path(work) / "adapter")
        ours, peers = [], []
        for index in range(args.repeat):
            out = Path(work) / f"merged-{index}"
            ours.append(
                run(
                    [
                        __file__,
                        args.model,
                        "--peer",
                        args.peer,
                        "--adapter",
                        adapter,
                        "--one",
                        out,
                        "--dtype",
                        args.dtype,
                    ]
                )
            )
            peers.append(run([args.peer, args.model, adapter, "--dtype", args.dtype]))
    report = summary(args, ours, peers)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def run(command: list[object]) -> dict[str, float]:
    """Run one merge in a process of its own; its last line of output is JSON."""
    done = subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def merge_once(model: Path, adapter: Path, out: Path, dtype: str) -> None:
    import torch

    from graftline.merge.fold import merge_folder

    imported_mb = peak_mb()
    started = time.perf_counter()
    report = merge_folder(model, adapter, out, dtype=getattr(torch, dtype))
    figures = {
        "merge_s": round(time.perf_counter() - started, 2),
        "peak_rss_mb": peak_mb(),
        "imported_rss_mb": imported_mb,
        "largest_tensor_mb": report.largest_tensor_bytes / 2**20,
    }
    print(json.dumps(figures))


def peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def make_adapter(model: Path, folder: Path) -> Path:
    """A rank-16 adapter on every linear layer with random factors, saved by peft."""
    code = (
        "import sys, torch\n"
        "from peft import LoraConfig, get_peft_model\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "config = LoraConfig(r=16, lora_alpha=32, target_modules='all-linear', init_lora_weights=False)\n"
        "get_peft_model(model, config).save_pretrained(sys.argv[2])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(model), str(folder)], check=True, capture_output=True)
    return folder


def summary(args: argparse.Namespace, ours: list[dict[str, float]], peers: list[dict[str, float]]) -> dict[str, object]:
    """Both sides' runs and the ratios of their medians; below 1 means that graftline takes less."""
    median = {
        name: (statistics.median(run[name] for run in ours), statistics.median(run[name] for run in peers))
        for name in ("merge_s", "peak_rss_mb")
    }
    bound_mb = 4 * ours[0]["largest_tensor_mb"] + 700
    return {
        "model": args.model.name,
        "dtype": args.dtype,
        "graftline": ours,
        "peft": peers,
        "time_ratio": round(median["merge_s"][0] / median["merge_s"][1], 3),
        "memory_ratio": round(median["peak_rss_mb"][0] / median["peak_rss_mb"][1], 3),
        "memory_bound_mb": round(bound_mb),
        "memory_within_bound": max(run["peak_rss_mb"] for run in ours) <= bound_mb,
    }


if __name__ == "__main__":
    main()
