"""Merge: graftline's streamed fold against peft's merge_and_unload, paired in one run.

    python -m studies.merge /tmp/base-fp32 --peer ../shared/bench/peer_merge.py
    python -m studies.merge FOLDER --make --repeat 1 --peer … --out studies/results/merge_3b.json

With ``--make`` the model is made first: 3.2 billion random bf16 parameters (6.4 GB), removed at the end.
Each merge is a process of its own (peak memory is a process's). The two alternate, so that a busy machine is busy for
both; what counts are the ratios. Writes ``studies/results/merge.json``.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from studies.streamed_init import make_model

RESULTS = Path(__file__).parent / "results" / "merge.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer", type=Path, required=True, help="peer_merge.py")
    parser.add_argument("--adapter", type=Path, help="PEFT adapter; made here when not given")
    parser.add_argument("--make", action="store_true", help="make the model first: 3.2 billion random parameters")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # the child process: merge into this folder
    args = parser.parse_args()
    if args.one:
        merge_once(args.model, args.adapter, args.one, args.dtype)
        return
    if args.make and not args.model.exists():
        make_model(args.model, blocks=28)
    with tempfile.TemporaryDirectory(dir=args.model.parent) as work:
        report = measure(args, Path(work))
    if args.make:
        shutil.rmtree(args.model)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def measure(args: argparse.Namespace, work: Path) -> dict[str, object]:
    adapter = args.adapter or make_adapter(args.model, work / "adapter")
    options = [args.model, "--dtype", args.dtype]
    ours, peers = [], []
    for index in range(args.repeat):
        child = ["-m", "studies.merge", *options, "--peer", args.peer, "--adapter", adapter]
        ours.append(run([*child, "--one", work / f"merged-{index}"]))
        shutil.rmtree(work / f"merged-{index}")
        peers.append(run([args.peer, args.model, adapter, "--dtype", args.dtype]))
    return summary(args, ours, peers)


def run(command: list[object]) -> dict[str, float]:
    """Run one merge in a process of its own; its last line of output is JSON."""
    done = subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def merge_once(model: Path, adapter: Path, out: Path, dtype: str) -> None:
    import torch

    from graftline.merge.fold import merge_folder
    from graftline.weights.reader import CheckpointReader

    imported_mb = peak_mb()
    started = time.perf_counter()
    merge_folder(model, adapter, out, dtype=getattr(torch, dtype))
    figures = {
        "merge_s": round(time.perf_counter() - started, 2),
        "peak_rss_mb": peak_mb(),
        "imported_rss_mb": imported_mb,
        "largest_tensor_mb": CheckpointReader(model).largest_bytes / 2**20,
    }
    print(json.dumps(figures))


def peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def make_adapter(model: Path, folder: Path) -> Path:
    """A rank-16 adapter on every linear layer with random factors in PEFT's format, made without the model."""
    import torch
    from safetensors.torch import save_file

    from graftline.weights.arch import read_architecture
    from graftline.weights.reader import CheckpointReader

    reader, architecture = CheckpointReader(model), read_architecture(model)
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name in filter(architecture.is_linear_weight, reader.names()):
        num_outputs, num_inputs = reader.info(name).shape
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{layer}.lora_A.weight"] = 0.02 * torch.randn(16, num_inputs, generator=generator)
        tensors[f"{layer}.lora_B.weight"] = 0.02 * torch.randn(num_outputs, 16, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": 16,
        "lora_alpha": 32,
        "target_modules": list(architecture.linears),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def summary(args: argparse.Namespace, ours: list[dict[str, float]], peers: list[dict[str, float]]) -> dict[str, object]:
    """Both sides' runs and the ratios of their medians; below 1 means that graftline takes less."""
    median = {
        name: (statistics.median(run[name] for run in ours), statistics.median(run[name] for run in peers))
        for name in ("merge_s", "peak_rss_mb")
    }
    bound_mb = 4 * ours[0]["largest_tensor_mb"] + 700  # of the stored tensor
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
