"""Predicted against measured peak memory of training on a CPU.

    python -m studies.memory

Each configuration is trained for two steps on random weights and random rows, three times, each in its own process:

    allocated  largest sum of tensors that live at once, from torch's profiler: what torch.cuda.max_memory_allocated
               would say on a GPU. This is what the planner's ``low`` predicts.
    resident   largest anonymous memory of the process, sampled every millisecond, minus what it held after a small
               training had loaded every library, with MALLOC_MMAP_THRESHOLD_=65536: freed tensors go back to the
               system at once, so it is what allocated is, and what kernels and Python take beside
    default    the same with glibc's settings, whose heap keeps holes. This is what ``expected`` predicts; its waste was
               fitted to the cases in FITTED alone, and the others show how good it is.

The prediction is graftline.plan.memory's, from the configuration alone.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

from graftline.adapters.attach import attach
from graftline.data.template import Encoded
from graftline.digest import write_json
from graftline.plan.memory import HEAP_WASTE, RETURNED_WASTE, MemoryPlan, plan_memory
from graftline.plan.preflight import workload_of
from graftline.plan.trace import block_linears
from graftline.settings.model import Adapter, Optimizer, Train
from graftline.train.devices import DTYPES, return_freed_tensors, weight_dtype
from graftline.train.trainer import train
from graftline.weights.quant.blockwise import quantize
from graftline.weights.quant.linear import QuantLinear
from graftline.weights.quant.scheme import Scheme


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
    packing: bool = False
    prefix: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"

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
            max_position_embeddings=4096,
        )

    def settings(self) -> Train:
        """What the training is told."""
        return Train(
            steps=_STEPS,
            batch_size=self.rows,
            gradient_accumulation=self.accumulation,
            gradient_checkpointing=self.checkpointing,
            optimizer=self.optimizer,
            packing=self.packing,
            precision=self.precision,
            learning_rate=1e-4,
            scheduler="constant",
            threads=1,
            checkpoint_every=0,
            device="cpu",
        )

    def encoded(self) -> list[Encoded]:
        """Rows of one length, random behind what all begin with: as many as the training needs."""
        marks = [at >= self.tokens - self.supervised for at in range(self.tokens)]
        chooser, words = torch.Generator().manual_seed(0), self.sizes[3]
        begin = torch.randint(words, (self.prefix,), generator=chooser).tolist()
        shape = (self.rows * self.accumulation * _STEPS, self.tokens - self.prefix)
        return [Encoded(begin + row, marks) for row in torch.randint(words, shape, generator=chooser).tolist()]

    def adapter(self) -> Adapter:
        """What is trained."""
        return Adapter(method=self.method, rank=self.rank)

    def plan(self) -> MemoryPlan:
        """What the planner says."""
        scheme = Scheme() if self.quantized else None
        return plan_memory(self.config(), workload_of(self.encoded(), self.settings(), self.adapter(), scheme))


_STEPS = 2
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
    "QLoRA, recomputation": Case(quantized=True, sizes=(512, 6, 1536, 8192), checkpointing=True),
    "Qwen's vocabulary": Case(sizes=(256, 4, 768, 151936), supervised=32),
    "Qwen's vocabulary, all tokens supervised": Case(sizes=(256, 4, 768, 151936), rows=4, supervised=255),
    "packed": Case(rows=16, tokens=120, packing=True),
    "shared prefix": Case(rows=16, prefix=192),
    "bf16": Case(precision="bf16", sizes=(512, 6, 1536, 8192)),
    "SmolLM2-135M, LoRA": Case(sizes=_SMOLLM2, rows=4, tokens=128, supervised=4),
    "SmolLM2-135M, LoRA, recomputation": Case(sizes=_SMOLLM2, rows=4, tokens=128, supervised=4, checkpointing=True),
}


FITTED = ("LoRA", "LoRA, wide", "DoRA", "full", "LoRA, accumulation", "QLoRA")
"""Cases that the waste of glibc's heap was fitted to."""
_KINDS = ("allocated", "resident", "default")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", nargs="+", default=list(CASES), choices=CASES, metavar="CASE", help="others keep what --out has"
    )
    parser.add_argument("--out", type=Path, default=Path("studies/results/memory.json"))
    parser.add_argument(
        "--measure", nargs=2, metavar=("KIND", "CASE"), help="measure one case here and print its peak in bytes"
    )
    args = parser.parse_args()
    if args.measure:
        kind, name = args.measure
        print(_measure_allocated(CASES[name]) if kind == "allocated" else _measure_resident(CASES[name]))
        return
    before = json.loads(args.out.read_text())["results"] if args.out.is_file() else []
    known = {result["case"]: result for result in before}
    for name in args.cases:
        known[name] = _compare(name)
        document = _document([known[name] for name in CASES if name in known])
        write_json(args.out, document)
    print(json.dumps({"heap_waste": document["heap_waste"], **document["summary"]}, indent=1))


def _document(results: list[dict[str, Any]]) -> dict[str, Any]:
    fitted = [result for result in results if result["fitted"]]
    wastes = [(r["measured_megabytes"]["default"] - _held(r)) / _of_step(r) - 1 for r in fitted]
    waste = round(sum(wastes) / len(wastes), 2) if wastes else HEAP_WASTE
    for result in results:
        share = RETURNED_WASTE if CASES[result["case"]].checkpointing else waste
        low = _held(result) + _of_step(result)
        planned = {"allocated": low, "resident": low, "default": low + share * _of_step(result)}
        result["planned_megabytes"] = {kind: round(value, 1) for kind, value in planned.items()}
        measured = result["measured_megabytes"]
        result["errors"] = {kind: round(planned[kind] / measured[kind] - 1, 4) for kind in _KINDS}
    summary = {kind: _summary(kind, results) for kind in _KINDS}
    return {"command": "python -m studies.memory", "heap_waste": waste, "summary": summary, "results": results}


def _of_step(result: dict[str, Any]) -> float:
    return float(sum(result["low_megabytes"][name] for name in ("gradients", "activations", "logits", "transient")))


def _held(result: dict[str, Any]) -> float:
    return float(sum(result["low_megabytes"].values())) - _of_step(result)


def _summary(kind: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Of what was not fitted to: all cases, but for the heap's waste."""
    errors = [abs(r["errors"][kind]) for r in results if kind != "default" or not r["fitted"]]
    within = sum(error <= 0.1 for error in errors)
    return {"cases": len(errors), "within_10_percent": within, "worst": max(errors, default=0.0)}


def _compare(name: str) -> dict[str, Any]:
    plan = CASES[name].plan()
    result = {
        "case": name,
        "fitted": name in FITTED,
        "measured_megabytes": {kind: round(_in_own_process(kind, name) / 1e6, 1) for kind in _KINDS},
        "low_megabytes": {part.name: round(part.low / 1e6, 1) for part in plan.parts},
    }
    print(json.dumps(result), flush=True)
    return result


def _in_own_process(kind: str, name: str) -> int:
    command = [sys.executable, "-m", "studies.memory", "--measure", kind, name]
    environment = dict(os.environ) | ({"MALLOC_MMAP_THRESHOLD_": "65536"} if kind == "resident" else {})
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(done.stdout.splitlines()[-1])


_WARM_UP = Case(sizes=(64, 2, 128, 512), rows=2, tokens=16, supervised=4)


def _measure_allocated(case: Case) -> int:
    _train(_WARM_UP)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        _train(case)
    return peak_allocated(profiled)


def peak_allocated(profiled: profile) -> int:
    """Most bytes of tensors that lived at once while torch's profiler watched."""
    assert profiled.profiler is not None
    events, peak = list(profiled.profiler.kineto_results.experimental_event_tree()), 0
    while events:
        event = events.pop()
        events += event.children
        kind, fields = event.typed
        if kind == _EventType.Allocation:
            peak = max(peak, fields.total_allocated)
    return peak


def _measure_resident(case: Case) -> int:
    _train(_WARM_UP)
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
    settings = case.settings()
    return_freed_tensors(settings)
    dtype = weight_dtype(DTYPES[case.precision], case.adapter())
    model = AutoModelForCausalLM.from_config(case.config(), dtype=dtype)
    if case.quantized:
        for name, layer in block_linears(model).items():
            model.set_submodule(name, QuantLinear(quantize(layer.weight.detach(), Scheme())))
    attach(model, case.adapter(), seed=0)
    with tempfile.TemporaryDirectory() as work:
        train(model, case.encoded(), settings=settings, work=Path(work))


if __name__ == "__main__":
    main()
