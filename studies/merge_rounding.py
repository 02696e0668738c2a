"""How far does rounding alone move a merged model? Ten small tasks and seeds, by number type.

    python -m studies.merge_rounding --work FOLDER
    python -m studies.merge_rounding --work FOLDER --real NAME BASE ADAPTER ROWS

A small model of another shape for every seed learns rows of tests/evaluate/trials.py with a part of the answers wrong;
an adapter is trained on it, folded in and rounded to each number type, and compared with the unmerged model on 32 rows
that were held out, as the merge stage does. Every second base is stored as bfloat16, whose grid its weights then lie
on, as published models' do. ``--real`` adds a run of the line instead: its base, trained adapter and evaluation rows.

`ParityLimits.for_dtype` takes its limits from ``studies/results/merge_rounding.json``: about ten times the largest.
About four core minutes.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from graftline.adapters.attach import attach
from graftline.adapters.peft_format import AdapterIdentity, load_adapter, save_adapter
from graftline.data.rows import Row, read_rows
from graftline.data.template import encode, template_digest
from graftline.digest import write_json
from graftline.merge.fold import merge_folder
from graftline.merge.parity import ParityLimits, compare_with_recorded, record_logits
from graftline.settings.model import Adapter
from graftline.weights.identity import read_identity
from graftline.weights.quant.load import load_model
from tests.evaluate.trials import TEMPLATE, fit, mistaken, task_rows
from tests.tiny import make_tiny_llama

RESULTS = Path(__file__).parent / "results" / "merge_rounding.json"
TYPES = (torch.bfloat16, torch.float16, torch.float32)
METHODS = ("lora", "dora", "rslora", "pissa", "vera")
SHAPES = (
    {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 4},
    {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1},
)
LEARNING: dict[str, Any] = {"steps": 60, "learning_rate": 5e-3}
NUM_TASKS, NUM_ROWS = 10, 32
NO_LIMITS = ParityLimits(None, min_argmax_agreement=0.0, max_mean_kl=1e9, max_nll_change=1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models; finished tasks are kept there")
    parser.add_argument("--real", nargs=4, metavar=("NAME", "BASE", "ADAPTER", "ROWS"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells: list[dict[str, Any]] = json.loads(options.out.read_text())["cells"] if options.out.is_file() else []
    if options.real:
        name, base, adapter, rows = options.real
        measured = measure(Path(base), Path(adapter), read_rows(Path(rows)), "none", options.work / name)
        cells = [cell for cell in cells if cell["task"] != name] + [{"task": name, **found} for found in measured]
    else:
        cells = [cell for cell in cells if not cell["task"].startswith("seed ")]
        cells += [cell for seed in range(NUM_TASKS) for cell in small_task(options.work / f"seed-{seed}", seed)]
    write_json(options.out, {"rows": NUM_ROWS, "largest": largest(cells), "cells": cells})
    print(json.dumps(largest(cells), indent=2))


def small_task(work: Path, seed: int) -> list[dict[str, Any]]:
    """A base, an adapter and their merges; every second base is stored as bfloat16."""
    method, shape, rng = METHODS[seed % len(METHODS)], SHAPES[seed % len(SHAPES)], random.Random(seed)
    stored = torch.bfloat16 if seed % 2 == 0 else torch.float32
    # Larger initial weights than usual: so small a model learns in tens instead of thousands of steps.
    make_tiny_llama(work / "start", initializer_range=0.1, seed=seed, **shape)
    tokenizer, base = AutoTokenizer.from_pretrained(work / "start"), work / "base"
    rows = task_rows(rng, 200 + NUM_ROWS)
    model = AutoModelForCausalLM.from_pretrained(work / "start")
    fit(
        model, [[encode(mistaken(row), tokenizer, template=TEMPLATE) for row in rows[NUM_ROWS:]]], seed=seed, **LEARNING
    )
    model.to(stored).save_pretrained(base)
    tokenizer.save_pretrained(base)
    model = load_model(base, dtype=torch.float32)
    attach(model, Adapter(method=method, rank=8, alpha=16), seed=seed)
    fit(model, [[encode(row, tokenizer, template=TEMPLATE) for row in rows[NUM_ROWS:]]], seed=seed, **LEARNING)
    identity = AdapterIdentity(
        base_digest=read_identity(base).digest,
        quantizer=None,
        template_digest=template_digest(tokenizer, TEMPLATE),
        training_run=f"merge_rounding/{seed}",
    )
    save_adapter(model, work / "adapter", identity=identity)
    found = measure(base, work / "adapter", rows, TEMPLATE, work / "merged")
    about = {"task": f"seed {seed}", "method": method, "base_stored_as": str(stored).removeprefix("torch.")}
    return [about | shape | cell for cell in found]


def measure(base: Path, adapter: Path, rows: list[Row], template: str, work: Path) -> list[dict[str, Any]]:
    """The merged model in each number type against base and adapter."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    encoded = [encode(row, tokenizer, template=template) for row in rows[:NUM_ROWS]]
    sequences, answers = [row.input_ids for row in encoded], [row.supervised for row in encoded]
    unmerged = load_model(base, dtype=torch.float32)
    load_adapter(unmerged, adapter, base=read_identity(base))
    recorded = record_logits(unmerged, sequences)
    cells = []
    for dtype in TYPES:
        name = str(dtype).removeprefix("torch.")
        folder = work / name
        merge_folder(base, adapter, folder, dtype=dtype)
        merged = load_model(folder, dtype=torch.float32)
        report = compare_with_recorded(recorded, merged, sequences, limits=NO_LIMITS, answers=answers)
        cells.append(
            {
                "merged_as": name,
                "max_logit_difference": report.max_logit_difference,
                "argmax_disagreement": 1 - report.argmax_agreement,
                "mean_kl": report.mean_kl,
                "answer_nll_change": report.answer_nll_change,
                "answer_nll_change_interval": list(report.answer_nll_change_interval),
            }
        )
    return cells


def largest(cells: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By number type, the largest of each figure; of the answers' NLL, the largest upper end of the interval."""
    figures = ("max_logit_difference", "argmax_disagreement", "mean_kl")
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(cell["merged_as"] for cell in cells):
        of_type = [cell for cell in cells if cell["merged_as"] == name]
        found[name] = {figure: max(cell[figure] for cell in of_type) for figure in figures}
        found[name]["answer_nll_rise"] = max(cell["answer_nll_change_interval"][1] for cell in of_type)
    return found


if __name__ == "__main__":
    main()
