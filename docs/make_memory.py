"""Writes docs/memory-tables.md from what `python -m studies memory` wrote. `make docs` runs it; a test compares."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "studies" / "results" / "memory.json"
PAGE = ROOT / "docs" / "memory-tables.md"
_METHODS = {"full": "full fine-tuning", "lora": "LoRA, 16 bits", "qlora": "QLoRA, 4 bits"}
_KINDS = {
    "allocated": "tensors alive at once, from torch's profiler, against `low`",
    "resident": "memory of the process, freed tensors returned at once, against `low`",
    "default": "memory of the process with glibc's heap, against `expected`; fitted cases left out",
}


def render() -> str:
    """The page."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    parts = ["# Memory: planned, measured, published, claimed\n"]
    parts.append(
        "Made from studies/results/ by `make docs`; [memory.md](memory.md) explains the planner. GB are 10⁹ bytes.\n"
    )
    parts += [*_measured(found["measured"]), *_published(found["published"]), *_survey(found["survey"])]
    return "\n".join(parts)


def _measured(document: dict[str, Any]) -> list[str]:
    lines = [
        "## Planned and measured on a CPU\n",
        f"`python -m studies memory --parts measured`; MB. Error: planned / measured − 1. "
        f"Waste of the heap in `expected`: {document['heap_waste']:.0%} of a step's memory, from the fitted cases.\n",
    ]
    lines += ["| what is measured | cases | within 10 % | worst |", "|---|---:|---:|---:|"]
    for kind, what in _KINDS.items():
        found = document["summary"][kind]
        lines.append(f"| {what} | {found['cases']} | {found['within_10_percent']} | {found['worst']:.1%} |")
    lines += ["", "| configuration | low | allocated | error | resident | error | expected | default | error |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for result in document["results"]:
        measured, errors = result["measured_megabytes"], result["errors"]
        planned = result["planned_megabytes"]
        lines.append(
            f"| {result['case']} "
            f"| {planned['allocated']:.0f} | {measured['allocated']:.0f} | {errors['allocated']:+.1%} "
            f"| {measured['resident']:.0f} | {errors['resident']:+.1%} | {planned['default']:.0f} "
            f"| {measured['default']:.0f} | {errors['default']:+.1%}{' (fitted)' if result['fitted'] else ''} |"
        )
    return [*lines, ""]


def _published(document: dict[str, Any]) -> list[str]:
    lines = ["## What others measured and published\n"]
    lines.append(
        f"`python -m studies memory --parts published`: {document['within_20_percent']} of {document['rows']} rows "
        "within 20 %. What is held is the planner's count; what a step adds is its trace of the other program's step "
        "(studies/memory_programs.py). Assumptions hold for all rows of a source:\n"
    )
    lines += [f"* [{source.split('/')[2]}]({source}): {assumed}" for source, assumed in document["assumed"].items()]
    lines += ["", "| row | published GB | planned GB | error | | why it misses |", "|---|---:|---:|---:|---|---|"]
    for row in document["results"]:
        hit = "hit" if abs(row["error"]) <= 0.2 else "**miss**"
        lines.append(
            f"| {row['what']} | {row['gigabytes']:g} | {row['predicted_gigabytes']} | {row['error']:+.1%} | {hit} "
            f"| {row['note']} |"
        )
    return [*lines, ""]


def _survey(document: dict[str, Any]) -> list[str]:
    lines = ["## The survey's table\n"]
    lines.append(
        "The survey gives GB for four sizes and states no assumptions. Planned here: one row of 2,048 tokens, all "
        "supervised, bf16, LoRA of rank 16 on all linear layers, AdamW with fp32 states, NF4 with double quantization, "
        "loss in chunks, flash attention; with gradient checkpointing (recomputed) and without (kept). "
        "`python -m studies memory --parts survey`.\n"
    )
    lines += [
        "| model | method | survey | recomputed | kept | weights | verdict |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for cell in document["cells"]:
        low, high = cell["claimed_gigabytes"]
        claimed = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        lines.append(
            f"| {cell['model']} | {_METHODS[cell['method']]} | {claimed} | {cell['recomputed_gigabytes']} "
            f"| {cell['kept_gigabytes']} | {cell['weights_gigabytes']} | {verdict(cell)} |"
        )
    return [*lines, ""]


def verdict(cell: dict[str, Any]) -> str:
    """What is to be said of the survey's figure, from the two planned ones; 10 % off is taken as equal."""
    low, high = cell["claimed_gigabytes"]
    agrees = [name for name in ("recomputed", "kept") if 0.9 * low <= cell[f"{name}_gigabytes"] <= 1.1 * high]
    if cell["weights_gigabytes"] > high:
        return f"**wrong**: the weights alone take {cell['weights_gigabytes']}"
    end = "; its lower end is below the weights alone" if cell["weights_gigabytes"] > low else ""
    if len(agrees) == 2:
        return f"holds either way{end}"
    if agrees:
        return f"holds {'with' if agrees == ['recomputed'] else 'without'} checkpointing only{end}"
    least, most = (cell[f"{name}_gigabytes"] for name in ("recomputed", "kept"))
    if high < least:
        return f"**too low** by {least / high:.2f} times{end}"
    if low > most:
        return f"**too high** by {low / most:.2f} times"
    return f"between the two: partly recomputed, or a shorter row{end}"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
