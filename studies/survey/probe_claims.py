"""What the probes say: gradients by rank (claim 2) and perplexity by code (claim 6)."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

RESAMPLES = 10_000
ORDER = ("Int4", "FP4 (E2M1)", "NF4")
"""From the worst to the best perplexity, as QLoRA's table 2 has it."""


def gradient_ratios(results: Path) -> list[str]:
    """How the gradient of B changes from the lowest to the highest rank, beside what theory says."""
    lines = []
    for method, norms in gradient_norms(results).items():
        low, high = min(norms, key=int), max(norms, key=int)
        ratio = _mean(norms[high]) / _mean(norms[low])
        theory = 1.0 if method == "rslora" else math.sqrt(int(low) / int(high))
        lines.append(
            f"SmolLM2-135M, {method}: gradient of B at rank {high} over rank {low}: {ratio:.3f} (theory {theory:.3f})"
        )
    return lines


def gradient_norms(results: Path) -> dict[str, dict[str, list[float]]]:
    """By method and rank, one for each seed of A; empty where the probe has not been run."""
    found: dict[str, dict[str, list[float]]] = _read(results / "gradients.json").get("gradients", {})
    return found


Table = tuple[tuple[str, ...], ...]


def perplexities(results: Path) -> tuple[list[str], bool | None, Table]:
    """Findings, whether every step of the order is certain (None: not measured), and the table."""
    document = _read(results / "codes.json")
    found: dict[str, Any] = document.get("codes", {})
    if not found:
        return [], None, ()
    table: list[tuple[str, ...]] = [("code", "weight error", "perplexity", "against NF4 (ratio)")]
    for name, code in found.items():
        low, ratio, high = _ratio(code, found["NF4"])
        perplexity = math.exp(sum(code["nll"]) / sum(code["tokens"]))
        shown = "–" if name == "NF4" else f"{ratio:.4f} [{low:.4f}, {high:.4f}]"
        table.append((name, f"{code['weight_error']:.4f}", f"{perplexity:.2f}", shown))
    steps = [_ratio(found[worse], found[better]) for worse, better in pairwise(ORDER)]
    plain, double = (document["bits_per_weight"][key] for key in ("False", "True"))
    low, ratio, high = _ratio(found["NF4, double quantization"], found["NF4"])
    findings = [
        f"{worse} over {better}: perplexity × {ratio:.3f} [{low:.3f}, {high:.3f}]"
        for (worse, better), (low, ratio, high) in zip(pairwise(ORDER), steps, strict=True)
    ]
    findings.append(
        f"double quantization: {plain:.3f} − {double:.3f} = {plain - double:.3f} bits a weight less, perplexity × "
        f"{ratio:.4f} [{low:.4f}, {high:.4f}]"
    )
    return findings, all(low > 1 for low, _, _ in steps), tuple(table)


def _ratio(first: dict[str, Any], second: dict[str, Any]) -> tuple[float, float, float]:
    """Perplexity ratio with its 95 % interval, documents resampled: low, ratio, high."""
    gaps, tokens = np.array(first["nll"]) - np.array(second["nll"]), np.array(first["tokens"], dtype=float)
    drawn = np.random.default_rng(0).integers(len(gaps), size=(RESAMPLES, len(gaps)))
    ratios = np.exp(gaps[drawn].sum(axis=1) / tokens[drawn].sum(axis=1))
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(np.exp(gaps.sum() / tokens.sum())), float(high)


def _mean(found: list[float]) -> float:
    return sum(found) / len(found)


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found
