"""Memory that others measured and published, predicted by the planner row by row.

    python -m benchmarks.memory_published

The planner traces this project's step. Where the other program differs in a way that it states, the difference is
counted, never fitted:

    logits      transformers until 4.44 kept all logits: bf16 (2 bytes), their fp32 copy (4), the copy without the last
                position (4) and the log-softmax (4) live at the end of the forward pass. torchtune's chunked loss keeps
                bf16 logits and their gradient (2 + 2) and three fp32 copies of an eighth (12 / 8). Cut cross-entropy
                (Unsloth) keeps none.
    offload     checkpoints of hidden states (2 bytes x hidden x layers a token) lie in host memory (Unsloth).
    fused       optimizer step in the backward pass, states paged out: gradients and states of one layer only.
    sharded     FSDP: dense and quantized weights divided by the devices, and two blocks gathered at a time.

Sources were read from copies; each row carries the address. Published GiB are converted to GB of 10^9 bytes.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.memory_models import MODELS
from graftline.adapters.spec import AdapterSpec
from graftline.digest import write_json
from graftline.quant.scheme import Scheme
from graftline.train.memory import Workload, plan_memory
from graftline.train.trace import StepShape

_GIB = 1.073741824
_TORCHTUNE = "https://github.com/pytorch/torchtune/blob/0031bfb080bd35ec533c412df883cf2bf7bf7fe4/README.md"
_UNSLOTH = "https://unsloth.ai/docs/basics/unsloth-benchmarks"
_FACTORY = "https://github.com/hiyouga/LLaMA-Factory/wiki/Performance-comparison"
_LOGIT_BYTES = {"whole": 14.0, "torchtune": 5.5, "none": 0.0}
_ATTENTION = ("q_proj", "v_proj", "o_proj")


@dataclass(frozen=True, kw_only=True)
class Published:
    """One row of a table, and how its program trains."""

    source: str
    what: str
    model: str
    gigabytes: float
    tokens: int
    batch: int = 1
    method: Literal["full", "lora"] = "lora"
    rank: int = 8
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    quantized: bool = False
    checkpointing: bool = True
    logits: Literal["whole", "torchtune", "none"] = "none"
    offload: bool = False
    fused: bool = False
    devices: int = 1
    context: bool = True
    """Whether the figure is the device's, with CUDA's context, and not the allocator's."""
    assumed: str = ""
    """What the source does not state, and what is assumed."""


def rows() -> Iterator[Published]:
    """Every row of the tables that can be planned."""
    yield from _torchtune()
    yield from _unsloth()
    yield from _factory()


def _torchtune() -> Iterator[Published]:
    def row(what: str, gib: float, model: str = "Llama 3.1 8B", **given: Any) -> Published:
        return Published(
            source=_TORCHTUNE,
            what=what,
            model=model,
            gigabytes=round(gib * _GIB, 1),
            tokens=2048,
            batch=2,
            logits="torchtune",
            context=False,
            **given,
        )

    lora = {"targets": _ATTENTION, "assumed": "rank 8 on q, v and output projections, as in its recipes"}
    yield row("8B full, 4090", 18.9, method="full", fused=True, assumed="its recipe: paged 8-bit AdamW, fused, bf16")
    yield row("8B LoRA, 4090", 16.2, **lora)
    yield row("8B LoRA, A6000", 30.3, checkpointing=False, targets=_ATTENTION, assumed="activations kept")
    yield row("8B QLoRA, 4090", 7.4, quantized=True, **lora)
    yield row("70B LoRA, 8 A100", 27.6, model="Llama 3.1 70B", devices=8, **lora)
    yield row("405B QLoRA, 8 A100", 44.8 / _GIB, model="Llama 3.1 405B", devices=8, quantized=True, **lora)


def _unsloth() -> Iterator[Published]:
    tables = {
        ("Llama 3.1 8B", True): {8: 2972, 12: 21848, 16: 40724, 24: 78475, 40: 153977, 48: 191728, 80: 342733},
        ("Llama 3.1 8B", False): {12: 932, 16: 2551, 24: 5789, 40: 12264, 48: 15502, 80: 28454},
        ("Llama 3.1 70B", True): {48: 12106, 80: 89389},
        ("Llama 3.1 70B", False): {80: 6916},
    }
    for (model, own), table in tables.items():
        for gigabytes, tokens in table.items():
            yield Published(
                source=_UNSLOTH,
                what=f"{model} QLoRA, {tokens} tokens, {'Unsloth' if own else 'transformers + FA2'}",
                model=model,
                gigabytes=gigabytes,
                tokens=tokens,
                rank=32,
                quantized=True,
                offload=own,
                logits="none" if own else "whole",
                assumed="the longest context fills the device",
            )


def _factory() -> Iterator[Published]:
    def row(tokens: int, gigabytes: float, **given: Any) -> Published:
        return Published(
            source=_FACTORY, model="Llama 2 7B", tokens=tokens, gigabytes=gigabytes, logits="whole", **given
        )

    for tokens, gigabytes in {1024: 6, 2048: 7, 4096: 9, 8192: 12, 16384: 19, 32768: 32}.items():
        what = f"7B QLoRA, {tokens} tokens, transformers + FA2"
        yield row(tokens, gigabytes, quantized=True, what=what, assumed="activations recomputed")
    short = "batch 4 of at most 1,024 tokens"
    yield row(1024, 28, batch=4, what=f"7B LoRA, {short}, transformers + FA2", assumed="activations recomputed")


def predict(row: Published) -> float:
    """Bytes that the planner and the counted differences give."""
    config = MODELS[row.model]
    shape = StepShape(
        rows=row.batch,
        tokens=row.tokens,
        supervised_tokens=1,  # logits are counted apart
        checkpointing=row.checkpointing,
        dtype=torch.bfloat16,
    )
    workload = Workload(
        adapter=AdapterSpec(method="lora", rank=row.rank, targets=row.targets),
        shape=shape,
        quantization=Scheme() if row.quantized else None,
        device="cuda",
    )
    plan = plan_memory(config, workload)
    parts = {part.name: part.expected for part in plan.parts}
    text, tokens = config.get_text_config(), row.batch * row.tokens
    held = ("weights", "quantization constants")
    total = sum(value for name, value in parts.items() if name not in held)
    total += sum(parts[name] for name in held) / row.devices
    total += _LOGIT_BYTES[row.logits] * tokens * text.vocab_size
    if row.offload:
        total -= 2.0 * tokens * text.hidden_size * text.num_hidden_layers
    block = (plan.num_parameters - 2 * text.vocab_size * text.hidden_size) / text.num_hidden_layers
    if row.devices > 1:
        total += 2 * block * (0.5 if row.quantized else 2)
    if row.fused:
        total += 2 * block + 2.0 * text.vocab_size * text.hidden_size  # bf16 gradients of a block, and of the head
    return total if row.context else total - parts["CUDA context"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory_published.json"))
    args = parser.parse_args()
    results = []
    for row in rows():
        predicted = predict(row) / 1e9
        error = round(predicted / row.gigabytes - 1, 3)
        results.append({**asdict(row), "predicted_gigabytes": round(predicted, 1), "error": error})
        print(f"{row.what:<55}{row.gigabytes:>7}{predicted:>8.1f}{error:>+8.1%}", flush=True)
    within = sum(abs(result["error"]) <= 0.2 for result in results)
    print(f"{within} of {len(results)} within 20 %")
    write_json(
        args.out,
        {
            "command": "python -m benchmarks.memory_published",
            "rows": len(results),
            "within_20_percent": within,
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
