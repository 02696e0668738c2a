"""Planned memory against measured, published and claimed: is the planner right?

measured   training on a CPU for two steps on random weights and rows, three times, each in a process of its own:
             allocated  largest sum of tensors that live at once, from torch's profiler: what
                        torch.cuda.max_memory_allocated would say on a GPU. The planner's ``low`` predicts it
             resident   largest anonymous memory of the process, sampled every millisecond, minus what it held after a
                        small training had loaded every library, with MALLOC_MMAP_THRESHOLD_=65536: freed tensors go
                        back to the system at once
             default    the same with glibc's settings, whose heap keeps holes: what ``expected`` predicts. Its waste
                        was fitted to the cases in FITTED alone, and the others show how good it is
published  what others measured and published, row by row (`studies.memory_published`)
survey     the survey's table, cell by cell: one row of 2,048 tokens, all supervised; LoRA of rank 16 on all linear
           layers; with and without gradient checkpointing, because the survey does not say which it means
"""

import ctypes
import gc
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
from graftline.plan.memory import HEAP_WASTE, RETURNED_WASTE, MemoryPlan, Workload, plan_memory
from graftline.plan.preflight import workload_of
from graftline.plan.trace import StepShape, block_linears
from graftline.settings.model import Adapter, MethodName, Optimizer, Train
from graftline.train.devices import DTYPES, return_freed_tensors, weight_dtype
from graftline.train.trainer import train
from graftline.weights.quant.blockwise import quantize
from graftline.weights.quant.linear import QuantLinear
from graftline.weights.quant.scheme import Scheme
from studies import memory_published
from studies.harness import Json, Setting
from studies.models import KNOWN


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration; sizes are hidden, layers, feed-forward, vocabulary."""

    sizes: tuple[int, int, int, int] = (256, 8, 768, 8192)
    method: MethodName = "lora"
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
        scheme = Scheme("nf4", 64, True) if self.quantized else None
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


def measured(setting: Setting) -> Json:
    """Every case."""
    names = list(CASES)[: setting.size(len(CASES), 1)]
    return _document([_compare(setting, name) for name in names])


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
        result["errors"] = {kind: round(planned[kind] / max(0.1, measured[kind]) - 1, 4) for kind in _KINDS}
    summary = {kind: _summary(kind, results) for kind in _KINDS}
    return {"heap_waste": waste, "summary": summary, "results": results}


def _of_step(result: dict[str, Any]) -> float:
    return float(sum(result["low_megabytes"][name] for name in ("gradients", "activations", "logits", "transient")))


def _held(result: dict[str, Any]) -> float:
    return float(sum(result["low_megabytes"].values())) - _of_step(result)


def _summary(kind: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Of what was not fitted to: all cases, but for the heap's waste."""
    errors = [abs(r["errors"][kind]) for r in results if kind != "default" or not r["fitted"]]
    within = sum(error <= 0.1 for error in errors)
    return {"cases": len(errors), "within_10_percent": within, "worst": max(errors, default=0.0)}


def _compare(setting: Setting, name: str) -> dict[str, Any]:
    case = setting.size(CASES[name], QUICK)
    plan, found = case.plan(), {}
    for kind in _KINDS:
        returned = {"MALLOC_MMAP_THRESHOLD_": "65536"} if kind == "resident" else None
        found[kind] = setting.apart(_measure, kind, case, environment=returned)
    return {
        "case": name,
        "fitted": name in FITTED,
        "measured_megabytes": {kind: round(size / 1e6, 1) for kind, size in found.items()},
        "low_megabytes": {part.name: round(part.low / 1e6, 1) for part in plan.parts},
    }


def _measure(kind: str, case: Case) -> int:
    return _measure_allocated(case) if kind == "allocated" else _measure_resident(case)


QUICK = Case(sizes=(64, 2, 128, 512), rows=2, tokens=16, supervised=4)


def _measure_allocated(case: Case) -> int:
    _train(QUICK)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        _train(case)
    return peak_allocated(profiled)


def peak_allocated(profiled: profile) -> int:
    """Most bytes of tensors that lived at once while torch's profiler watched."""
    assert profiled.profiler is not None
    found: Any = profiled.profiler.kineto_results
    events, peak = list(found.experimental_event_tree()), 0
    while events:
        event = events.pop()
        events += event.children
        kind, fields = event.typed
        if kind == _EventType.Allocation:
            peak = max(peak, fields.total_allocated)
    return peak


def _measure_resident(case: Case) -> int:
    _train(QUICK)
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
            model.set_submodule(name, QuantLinear(quantize(layer.weight.detach(), Scheme("nf4", 64, True))))
    attach(model, case.adapter(), seed=0)
    with tempfile.TemporaryDirectory() as work:
        train(model, case.encoded(), settings=settings, work=Path(work))


TOKENS, RANK = 2048, 16


CLAIMED: dict[str, dict[str, tuple[float, float]]] = {
    "Llama 2 7B": {"full": (100, 120), "lora": (24, 32), "qlora": (8, 12)},
    "Llama 2 13B": {"full": (180, 200), "lora": (48, 52), "qlora": (15, 20)},
    "Qwen2.5 32B": {"full": (512, 512), "lora": (64, 80), "qlora": (24, 32)},
    "Llama 2 70B": {"full": (1400, 1800), "lora": (280, 280), "qlora": (35, 48)},
}
"""The survey's table: GB from, to."""


def survey(setting: Setting) -> Json:
    """Every cell of the table."""
    cells = [(model, method) for model, claimed in CLAIMED.items() for method in claimed]
    wanted = cells[: setting.size(len(cells), 1)]
    return {"cells": [_cell(model, method, CLAIMED[model][method]) for model, method in wanted]}


def _planned(model: str, method: str, *, checkpointing: bool) -> MemoryPlan:
    """The plan of one cell."""
    shape = StepShape(
        rows=1, tokens=TOKENS, supervised_tokens=TOKENS, checkpointing=checkpointing, dtype=torch.bfloat16
    )
    workload = Workload(
        adapter=Adapter(method="full" if method == "full" else "lora", rank=RANK),
        shape=shape,
        quantization=Scheme("nf4", 64, True) if method == "qlora" else None,
        optimizer="adamw",
        device="cuda",
    )
    return plan_memory(KNOWN[model], workload)


def _cell(model: str, method: str, claimed: tuple[float, float]) -> dict[str, Any]:
    """Planned and claimed GB of one cell."""
    plans = {name: _planned(model, method, checkpointing=name == "recomputed") for name in ("recomputed", "kept")}
    weights = sum(p.expected for p in plans["kept"].parts if p.name in ("weights", "quantization constants"))
    found: dict[str, Any] = {"model": model, "method": method, "claimed_gigabytes": claimed}
    found |= {f"{name}_gigabytes": round(plan.total.expected / 1e9, 1) for name, plan in plans.items()}
    return found | {
        "weights_gigabytes": round(weights / 1e9, 1),
        "parts_gigabytes": {
            name: {part.name: round(part.expected / 1e9, 2) for part in plan.parts} for name, plan in plans.items()
        },
    }


PARTS = {"measured": measured, "published": memory_published.published, "survey": survey}
