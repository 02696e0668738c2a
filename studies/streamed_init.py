"""Memory of a quantized initialization of a model that is larger than the memory it may take.

    python -m studies.streamed_init --work /tmp/streamed [--blocks 28] [--loftq-blocks 1]

Makes a sharded bf16 Llama of 3.2 billion random parameters on the disk (6.4 GB), quantizes it to NF4 in a process of
its own, ends that process halfway with SIGKILL, goes on in a second one, and compares the peak resident memory of both
with the bound that was printed before the start. LoftQ runs on the first blocks: the sizes of the weights are the same
in all. The folder is removed at the end. Writes ``studies/results/streamed_init.json``.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftline.digest import write_json
from graftline.weights.quant.factors import Factors
from graftline.weights.quant.init import InitPlan, initialize, peak_bytes_bound
from graftline.weights.reader import CheckpointReader
from graftline.weights.writer import CheckpointWriter

RESULTS = Path(__file__).parent / "results" / "streamed_init.json"
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 3072, 8192, 24, 8, 128_256
SHARD_BYTES = 1_000_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--loftq-blocks", type=int, default=1)
    parser.add_argument("--child", choices=["run", "die"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    source, out = args.work / "source", args.work / "out"
    if args.child:
        print(json.dumps(quantize(source, out, args.loftq_blocks, die=args.child == "die")))
        return
    try:
        make_model(source, args.blocks)
        report = measure(args, source)
    finally:
        shutil.rmtree(args.work, ignore_errors=True)
    RESULTS.write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")
    print(json.dumps(report, indent=2))


def measure(args: argparse.Namespace, source: Path) -> dict[str, Any]:
    """Run until killed, run on, and collect both processes' figures."""
    reader = CheckpointReader(source)
    bound = peak_bytes_bound(source)
    print(f"bound: {bound / 1e6:.0f} MB for {reader.total_bytes / 1e9:.2f} GB of weights", flush=True)
    first, second = run(args, "die"), run(args, "run")
    peaks = [first["peak_rss_mb"], second["peak_rss_mb"]]
    return {
        "parameters": reader.total_bytes // 2,
        "source_mb": reader.total_bytes // 10**6,
        "shards": len(list(source.glob("*.safetensors"))),
        "largest_tensor_mb": reader.largest_bytes // 10**6,
        "bound_mb": bound // 10**6,
        "peak_rss_mb": {"until killed": peaks[0], "resumed": peaks[1]},
        "within_bound": max(peaks) * 1.048576 <= bound / 10**6,
        "first_tensor_of_the_resumed_run": second["first_tensor"],
        "tensors": second["tensors"],
        "seconds": round(first["seconds"] + second["seconds"]),
        "bits_per_weight": second["bits_per_weight"],
    }


def run(args: argparse.Namespace, child: str) -> dict[str, Any]:
    """A child process; the one that dies leaves its figures in a file."""
    options = ["--work", args.work, "--loftq-blocks", args.loftq_blocks, "--child", child]
    command = [sys.executable, "-m", "studies.streamed_init", *map(str, options)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=child == "run")
    text = done.stdout if child == "run" else (args.work / "died.json").read_text()
    found: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
    return found


def quantize(source: Path, out: Path, loftq_blocks: int, *, die: bool) -> dict[str, Any]:
    started, seen = time.perf_counter(), [0]
    read: list[str] = []
    original = CheckpointReader.read
    CheckpointReader.read = lambda self, name: read.append(name) or original(self, name)  # type: ignore[method-assign,func-returns-value]

    def figures() -> dict[str, Any]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        return {"peak_rss_mb": peak, "seconds": time.perf_counter() - started}

    def on_progress(done: int, total: int) -> None:
        seen[0] = total
        if die and done == total // 2:
            (out.parent / "died.json").write_text(json.dumps(figures()))
            os.kill(os.getpid(), signal.SIGKILL)

    def factors(module: str) -> Factors | None:
        return Factors(16, 1.0) if int(module.split(".")[2]) < loftq_blocks else None

    report = initialize(source, out, plan=InitPlan(method="loftq"), factors=factors, on_progress=on_progress)
    found = {"tensors": seen[0], "first_tensor": read[0], "bits_per_weight": round(report.bits_per_weight, 4)}
    return figures() | found


def make_model(folder: Path, blocks: int) -> None:
    """Random weights, shards of about 1 GB, written one tensor at a time."""
    with CheckpointWriter(folder, max_shard_bytes=SHARD_BYTES) as writer:
        for name, tensor in tensors(blocks):
            writer.add(name, tensor)
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "hidden_size": HIDDEN,
            "intermediate_size": INTERMEDIATE,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "num_hidden_layers": blocks,
            "vocab_size": VOCABULARY,
            "tie_word_embeddings": True,
        }
        write_json(writer.stage / "config.json", config)
        writer.finish()


def tensors(blocks: int) -> Iterator[tuple[str, Tensor]]:
    """The blocks share one random draw, scaled differently: drawing 3 billion numbers would take most of the time."""
    key_value = HIDDEN * KV_HEADS // HEADS
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (key_value, HIDDEN),
        "self_attn.v_proj": (key_value, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    generator = torch.Generator().manual_seed(0)
    draw = (torch.randn(INTERMEDIATE * HIDDEN, generator=generator) * 0.02).bfloat16()
    yield (
        "model.embed_tokens.weight",
        draw.repeat(VOCABULARY * HIDDEN // draw.numel() + 1)[: VOCABULARY * HIDDEN].view(-1, HIDDEN),
    )
    yield "model.norm.weight", torch.ones(HIDDEN, dtype=torch.bfloat16)
    for block in range(blocks):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{block}.{norm}.weight", torch.ones(HIDDEN, dtype=torch.bfloat16)
        for name, shape in shapes.items():
            yield f"model.layers.{block}.{name}.weight", (draw[: shape[0] * shape[1]] * (1 + block / 64)).view(shape)


if __name__ == "__main__":
    main()
