"""Memory that others measured and published, predicted row by row.

What is held (weights, constants, adapters, states) is the planner's count. What a step adds is the planner's trace, run
on the other program's step as it published it (studies/memory_programs.py), with the share that a CUDA allocator
usually wastes. What is assumed (ASSUMED) holds for all rows of a source, and nothing is fitted. Eager code is traced:
what torch.compile fuses or computes again is not known to it.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel

from graftline.plan.memory import MemoryBreakdown, Workload, count_held, expected_waste
from graftline.plan.trace import Ledger, StepShape, trace_step
from graftline.settings.model import Adapter, Optimizer
from graftline.weights.quant.scheme import Scheme
from studies.harness import Json, Setting
from studies.memory_programs import PlainLora, run_torchtune, run_transformers, run_unsloth
from studies.models import KNOWN

_GIB = 1.073741824
_TORCHTUNE = "https://github.com/pytorch/torchtune/blob/0031bfb080bd35ec533c412df883cf2bf7bf7fe4/README.md"
_UNSLOTH = "https://unsloth.ai/docs/basics/unsloth-benchmarks"
_FACTORY = "https://github.com/hiyouga/LLaMA-Factory/wiki/Performance-comparison"
ASSUMED = {
    _TORCHTUNE: "As its README says, two packed rows of 2,048 tokens. Adapters and their AdamW states bf16; rank 8 on "
    "q, v and output projections, in its QLoRA recipes on the MLP too (recipes/configs/llama3_1). Full training by its "
    "single-device recipe: each gradient is used and freed in the backward pass; 8-bit AdamW is paged, so that its "
    "states leave a device that is full. FSDP divides what is held; embeddings, head and two blocks are gathered at a "
    "time. The figure is the allocator's, without CUDA's context.",
    _UNSLOTH: "As the page says, rank 32 on all linear layers, one row, NF4; the longest row fills the device, and a "
    "device named 24 GB holds 24 GiB. 8-bit AdamW, as in its notebooks. Unsloth itself: dense weights bf16, a block's "
    "input in host memory, kernels that write over saved tensors, no logits. Hugging Face + FA2: peft's usual "
    "preparation (embeddings and head in fp32), activations recomputed, logits whole.",
    _FACTORY: "Rank 8 on all linear layers, AdamW, NF4 or bf16, activations recomputed, logits whole; one row, but "
    "where it says batch 4.",
}
"""What is assumed for all rows of a source, beside what it says."""
_ATTENTION = ("q_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_CONTEXT = 0.75e9


_BATCH = "its own recipe (405B_qlora.yaml) takes one row, not the table's two: that would be {one_row} GB"
_UNKNOWN = "the page does not say whether activations were recomputed: kept, it would be {kept} GB"


@dataclass(frozen=True, kw_only=True)
class Published:
    """One row of a table, and how its program trains."""

    source: str
    program: Literal["torchtune", "Unsloth", "transformers"]
    what: str
    model: str
    gigabytes: float
    tokens: int
    batch: int = 1
    full: bool = False
    rank: int = 8
    targets: tuple[str, ...] = (*_ATTENTION, "k_proj", *_MLP)
    quantized: bool = True
    checkpointing: bool = True
    optimizer: Optimizer = "adamw"
    dense: Literal["bf16", "fp32"] = "bf16"
    """What is not quantized."""
    states_paged_out: bool = False
    devices: int = 1
    note: str = ""
    """Why the prediction is off, as far as it is known."""


def rows() -> Iterator[Published]:
    """Every row of the tables that can be planned."""
    yield from _torchtune()
    yield from _unsloth()
    yield from _factory()


def _torchtune() -> Iterator[Published]:
    def row(what: str, gib: float, model: str = "Llama 3.1 8B", **given: Any) -> Published:
        quantized = {"targets": (*_ATTENTION, *_MLP) if given.get("quantized") else _ATTENTION, "quantized": False}
        return Published(
            source=_TORCHTUNE,
            program="torchtune",
            what=f"torchtune, {what}",
            model=model,
            gigabytes=round(gib * _GIB, 1),
            tokens=2048,
            batch=2,
            **quantized | given,
        )

    full: dict[str, Any] = {"full": True, "optimizer": "paged_adamw_8bit"}
    yield row("8B full, 24 GB device", 18.9, states_paged_out=True, **full)
    yield row("8B full, 48 GB device", 37.4, **full)
    yield row("8B LoRA, recomputed", 16.2)
    yield row("8B LoRA, activations kept", 30.3, checkpointing=False)
    yield row("8B QLoRA", 7.4, quantized=True)
    yield row("70B LoRA, 8 devices", 27.6, "Llama 3.1 70B", devices=8)
    yield row("405B QLoRA, 8 devices", 44.8 / _GIB, "Llama 3.1 405B", devices=8, quantized=True, note=_BATCH)


def _unsloth() -> Iterator[Published]:
    tables = {
        ("Llama 3.1 8B", True): {8: 2972, 12: 21848, 16: 40724, 24: 78475, 40: 153977, 48: 191728, 80: 342733},
        ("Llama 3.1 8B", False): {12: 932, 16: 2551, 24: 5789, 40: 12264, 48: 15502, 80: 28454},
        ("Llama 3.1 70B", True): {48: 12106, 80: 89389},
        ("Llama 3.1 70B", False): {80: 6916},
    }
    for (model, own), table in tables.items():
        for gib, tokens in table.items():
            yield Published(
                source=_UNSLOTH,
                program="Unsloth" if own else "transformers",
                what=f"Unsloth, {model.removeprefix('Llama 3.1 ')}, {tokens:,} tokens"
                + ("" if own else ", Hugging Face + FA2"),
                model=model,
                gigabytes=round(gib * _GIB, 1),
                tokens=tokens,
                rank=32,
                optimizer="adamw_8bit",
                dense="bf16" if own else "fp32",
            )


def _factory() -> Iterator[Published]:
    def row(what: str, tokens: int, gigabytes: float, **given: Any) -> Published:
        return Published(
            source=_FACTORY,
            program="transformers",
            what=f"LLaMA-Factory, 7B {what}",
            model="Llama 2 7B",
            tokens=tokens,
            gigabytes=gigabytes,
            **given,
        )

    for tokens, gigabytes in {1024: 6, 2048: 7, 4096: 9, 8192: 12, 16384: 19, 32768: 32}.items():
        yield row(f"QLoRA, {tokens:,} tokens, FA2", tokens, gigabytes)
    yield row("LoRA, batch 4 of at most 1,024 tokens, FA2", 1024, 28, batch=4, quantized=False, note=_UNKNOWN)


def predict(row: Published) -> float:
    """Bytes that the planner's count and its trace of the other program's step give."""
    config, workload = KNOWN[row.model], _workload(row)
    held = count_held(config, workload)
    share = 0.5 if row.program == "torchtune" else 1.0  # of fp32: its adapters and their states are bf16
    weights = 2.0 * held.num_parameters if row.full else held.weights + held.constants
    states = held.optimizer * (1.0 if "8bit" in row.optimizer else share)
    if row.full:  # embeddings, head and norms are trained too
        states *= held.num_parameters / held.num_trained
    if row.states_paged_out:
        states = 0.0
    total = weights / row.devices + held.adapters * share + states
    if row.devices > 1:
        total += _gathered_bytes(row, config, held)
    if row.program != "torchtune":
        total += _CONTEXT
    return total + (1 + expected_waste("cuda")) * _step_bytes(row, workload, held)


def _workload(row: Published) -> Workload:
    dtype = torch.bfloat16 if row.dense == "bf16" else torch.float32
    return Workload(
        adapter=Adapter(method="full" if row.full else "lora", rank=row.rank, targets=row.targets),
        shape=StepShape(
            rows=row.batch, tokens=row.tokens, supervised_tokens=1, checkpointing=row.checkpointing, dtype=dtype
        ),
        quantization=Scheme("nf4", 64, True) if row.quantized else None,
        optimizer=row.optimizer,
        device="cuda",
    )


def _step_bytes(row: Published, workload: Workload, held: MemoryBreakdown) -> float:
    config = KNOWN[row.model]
    if row.program == "Unsloth":
        with FakeTensorMode():
            ledger = Ledger(nn.Module())
            with ledger:
                run_unsloth(config, row.batch * row.tokens, ledger)
        # Its blocks here have no adapters: their gradients, fp32, come on top.
        return max(sum(peak.values()) for peak in ledger.peaks.values()) + 4.0 * held.num_trained

    def prepare(model: PreTrainedModel) -> None:
        model.requires_grad_(row.full)
        for name, layer in list(model.named_modules()):
            if name.endswith(row.targets) and not row.full:
                dtype = torch.bfloat16 if row.program == "torchtune" else torch.float32
                model.set_submodule(name, PlainLora(layer, row.rank, dtype))
        if row.dense == "fp32":
            model.get_input_embeddings().float()
            model.get_output_embeddings().float()

    run = run_torchtune if row.program == "torchtune" else run_transformers
    step = trace_step(config, workload.shape, prepare=prepare, quantized=row.quantized, weights=torch.bfloat16, run=run)
    return step.total


def _gathered_bytes(row: Published, config: PretrainedConfig, held: MemoryBreakdown) -> float:
    """Embeddings and head, and two blocks: 4 bits, or bf16."""
    root = 2 * config.vocab_size * config.hidden_size
    block = (held.num_parameters - root) / config.num_hidden_layers
    return 2.0 * root + 2 * block * (0.5 if row.quantized else 2.0)


def _other_ways(row: Published) -> dict[str, float]:
    ways = {"one_row": replace(row, batch=1), "kept": replace(row, checkpointing=False)}
    return {name: round(predict(way) / 1e9, 1) for name, way in ways.items() if f"{{{name}}}" in row.note}


def published(setting: Setting) -> Json:
    """Planned and published GB of every row."""
    results = []
    for row in list(rows())[:: setting.size(1, 16)]:
        predicted = predict(row) / 1e9
        note = row.note.format(**_other_ways(row)) if row.note else ""
        about = {"note": note, "predicted_gigabytes": round(predicted, 1)}
        results.append(asdict(row) | about | {"error": round(predicted / row.gigabytes - 1, 3)})
    within = sum(abs(result["error"]) <= 0.2 for result in results)
    return {"assumed": ASSUMED, "rows": len(results), "within_20_percent": within, "results": results}
