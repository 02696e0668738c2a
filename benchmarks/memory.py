"""Predicted against measured peak memory of training on a CPU.

    python -m benchmarks.memory

Each configuration is trained for two steps in a process of its own, on random weights and rows of one length. The peak
is the process's largest anonymous memory, sampled every millisecond, minus what it held after a small training had
loaded every library. The
prediction is graftline.train.memory's, from the configuration alone.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from graftline.adapters.attach import attach
from graftline.adapters.spec import AdapterSpec
from graftline.data.template import Encoded
from graftline.digest import write_json
from graftline.quant.blockwise import quantize
from graftline.quant.linear import QuantLinear
from graftline.quant.scheme import Scheme
from graftline.train.memory import Workload, plan_memory
from graftline.train.settings import Optimizer, TrainSettings
from graftline.train.trace import StepShape, block_linears
from graftline.train.trainer import train


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration; sizes are hidden, layers, feed-forward, vocabulary."""

    sizes: tuple[int, int, int, int] = (256, 8, 768, 8192)
    method: str = "lora"
    rank: int = 8
    rows: int = 8
    tokens: int = 256
    supervised: int = 64
    accumulation: int = 1
    checkpointing: bool = False
    quantized: bool = False
    optimizer: Optimizer = "adamw"

    def config(self) -> LlamaConfig:
        """A Llama of these sizes."""
        hidden, layers, feed_forward, vocabulary = self.sizes
        return LlamaConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            intermediate_size=feed_forward,
            vocab_size=vocabulary,
            num_attention_heads=hidden // 64,
            num_key_value_heads=max(1, hidden // 192),
            tie_word_embeddings=True,
        )

    def workload(self) -> Workload:
        """What the planner is told."""
        shape = StepShape(
            rows=self.rows,
            tokens=self.tokens,
            supervised_tokens=self.rows * self.supervised,
            micro_batches=self.accumulation,
            checkpointing=self.checkpointing,
        )
        return Workload(
            adapter=AdapterSpec(method=self.method, rank=self.rank),
            shape=shape,
            quantization=Scheme() if self.quantized else None,
            optimizer=self.optimizer,
        )


_SMOLLM2 = (576, 30, 1536, 49152)
CASES = {
    "LoRA": Case(),
    "LoRA, twice the rows": Case(rows=16),
    "LoRA, rank 64": Case(rank=64),
    "LoRA, all tokens supervised": Case(supervised=255, sizes=(256, 4, 768, 32768)),
    "LoRA, recomputation": Case(rows=16, tokens=512, checkpointing=True),
    "LoRA, accumulation": Case(rows=4, accumulation=4, rank=64),
    "LoRA, long rows": Case(rows=2, tokens=1024),
    "LoRA, wide": Case(sizes=(768, 4, 2048, 8192)),
    "DoRA": Case(method="dora"),
    "VeRA": Case(method="vera", rank=64),
    "bottleneck": Case(method="houlsby", rank=32),
    "full": Case(method="full", sizes=(512, 6, 1536, 16384), rows=4),
    "full, 8-bit AdamW": Case(method="full", sizes=(512, 6, 1536, 16384), rows=4, optimizer="adamw_8bit"),
    "QLoRA": Case(quantized=True, sizes=(512, 6, 1536, 8192)),
    "SmolLM2-135M, LoRA": Case(sizes=_SMOLLM2, rows=4, tokens=128, supervised=4),
    "SmolLM2-135M, LoRA, recomputation": Case(sizes=_SMOLLM2, rows=4, tokens=128, supervised=4, checkpointing=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, metavar="CASE")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory.json"))
    parser.add_argument(
        "--measure", choices=CASES, metavar="CASE", help="run one case here and print its peak in bytes"
    )
    args = parser.parse_args()
    if args.measure:
        print(_measure(CASES[args.measure]))
        return
    results = [_compare(name) for name in args.cases]
    worst = max(abs(result["error"]) for result in results)
    within = sum(abs(result["error"]) <= 0.1 for result in results)
    print(f"{within} of {len(results)} within 10 %, worst {worst:.1%}")
    write_json(args.out, {"within_10_percent": within, "worst_error": worst, "results": results})


def _compare(name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.memory", "--measure", name]
    measured = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    case = CASES[name]
    plan = plan_memory(case.config(), case.workload())
    parts = {part.name: round(part.expected / 1e6, 1) for part in plan.parts}
    error = round(plan.total.expected / measured - 1, 4)
    result = {"case": name, "measured_megabytes": round(measured / 1e6, 1), "error": error, "parts_megabytes": parts}
    print(json.dumps(result), flush=True)
    return result


def _measure(case: Case) -> int:
    _train(Case(sizes=(64, 2, 128, 512), rows=2, tokens=16, supervised=4, optimizer=case.optimizer))
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before, peak, finished = _anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not finished.wait(0.001):
            peak = max(peak, _anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    _train(case)
    finished.set()
    watcher.join()
    return peak - before


def _anonymous_bytes() -> int:
    """Resident memory that no file backs: what the system does with pages of libraries must not count."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def _train(case: Case) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(case.config(), dtype=torch.float32)
    if case.quantized:
        for name, layer in block_linears(model).items():
            model.set_submodule(name, QuantLinear(quantize(layer.weight.detach(), Scheme())))
    attach(model, AdapterSpec(method=case.method, rank=case.rank), seed=0)
    marks = [at >= case.tokens - case.supervised for at in range(case.tokens)]
    ids = torch.randint(case.config().vocab_size, (case.rows * case.accumulation, case.tokens)).tolist()
    settings = TrainSettings(
        steps=2,
        batch_size=case.rows,
        gradient_accumulation=case.accumulation,
        gradient_checkpointing=case.checkpointing,
        optimizer=case.optimizer,
        learning_rate=1e-4,
        checkpoint_every=0,
        device="cpu",
    )
    with tempfile.TemporaryDirectory() as work:
        train(model, [Encoded(row, marks) for row in ids], settings=settings, work=Path(work))


if __name__ == "__main__":
    main()
