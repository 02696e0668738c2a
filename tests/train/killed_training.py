"""A training of the tiny base as a program: ``python -m tests.train.killed_training JOB.json``; it may kill itself."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from graftline.adapters.attach import attach, trainable_parameters
from graftline.train.results import ignore_step
from graftline.train.trainer import train
from graftline.weights.quant.linear import load_model
from tests.sections import adapter_section, train_section
from tests.train.killing import kill_at
from tests.train.rows import make_rows


def main(job: dict[str, Any]) -> None:
    """Train; the trained weights are written to ``job["out"]``."""
    settings = train_section(**job["train"])
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    model = load_model(Path(job["base"]), dtype=dtype).requires_grad_(False)
    attach(model, adapter_section("lora", rank=4, alpha=8), seed=0)
    on_step = kill_at(job["kill_at"]) if job["kill_at"] else ignore_step
    train(model, make_rows(24), settings=settings, work=Path(job["work"]), on_step=on_step)
    torch.save({name: value.detach().cpu() for name, value in trainable_parameters(model).items()}, job["out"])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
