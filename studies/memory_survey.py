"""The survey's table of GPU memory, cell by cell, from the planner.

    python -m studies.memory_survey

One row of 2,048 tokens, all of them supervised; bf16 arithmetic; LoRA of rank 16 on all linear layers; AdamW with fp32
states; NF4 with double quantization; loss in chunks, so that logits never exist whole. Each cell is planned with and
without gradient checkpointing, because the survey does not say which it means.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graftline.digest import write_json
from graftline.plan.memory import MemoryPlan, Workload, plan_memory
from graftline.plan.trace import StepShape
from graftline.settings.model import Adapter
from graftline.weights.quant.scheme import Scheme
from studies.memory_models import MODELS

TOKENS, RANK = 2048, 16


@dataclass(frozen=True)
class Claim:
    """A row of the survey's table: GB from, to."""

    model: str
    full: tuple[float, float]
    lora: tuple[float, float]
    qlora: tuple[float, float]


CLAIMS = (
    Claim("Llama 2 7B", (100, 120), (24, 32), (8, 12)),
    Claim("Llama 2 13B", (180, 200), (48, 52), (15, 20)),
    Claim("Qwen2.5 32B", (512, 512), (64, 80), (24, 32)),
    Claim("Llama 2 70B", (1400, 1800), (280, 280), (35, 48)),
)
METHODS = ("full", "lora", "qlora")


def planned(model: str, method: str, *, checkpointing: bool) -> MemoryPlan:
    """The plan of one cell."""
    shape = StepShape(
        rows=1, tokens=TOKENS, supervised_tokens=TOKENS, checkpointing=checkpointing, dtype=torch.bfloat16
    )
    workload = Workload(
        adapter=Adapter(method="full" if method == "full" else "lora", rank=RANK),
        shape=shape,
        quantization=Scheme() if method == "qlora" else None,
        device="cuda",
    )
    return plan_memory(MODELS[model], workload)


def cell(model: str, method: str, claimed: tuple[float, float]) -> dict[str, Any]:
    """Planned and claimed GB of one cell."""
    plans = {name: planned(model, method, checkpointing=name == "recomputed") for name in ("recomputed", "kept")}
    weights = sum(p.expected for p in plans["kept"].parts if p.name in ("weights", "quantization constants"))
    found: dict[str, Any] = {"model": model, "method": method, "claimed_gigabytes": claimed}
    found |= {f"{name}_gigabytes": round(plan.total.expected / 1e9, 1) for name, plan in plans.items()}
    return found | {
        "weights_gigabytes": round(weights / 1e9, 1),
        "parts_gigabytes": {
            name: {part.name: round(part.expected / 1e9, 2) for part in plan.parts} for name, plan in plans.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("studies/results/memory_survey.json"))
    args = parser.parse_args()
    cells = []
    for claim in CLAIMS:
        for method in METHODS:
            cells.append(cell(claim.model, method, getattr(claim, method)))
            print(json.dumps({key: value for key, value in cells[-1].items() if key != "parts_gigabytes"}), flush=True)
    write_json(args.out, {"command": "python -m studies.memory_survey", "cells": cells})


if __name__ == "__main__":
    main()
