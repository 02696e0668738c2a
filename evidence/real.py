"""The trainings of SmolLM2-135M, each through the demo's pipeline by `flows.sweep` (claims 1, 6 and 10).

    python -m evidence.real [--steps 48]        from a checkout; goes on where it stopped

Full fine-tuning and LoRA at two rates each with seed 0, the better one with seeds 1 and 2; QLoRA (NF4) at LoRA's rate.
So the rate is chosen on the rows that are reported, for both arms alike.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from evidence.__main__ import versions
from flows.command import explained_errors
from flows.sweep import sweep, task_runner
from flows.sweep_cells import Overrides
from graftline.digest import write_json

PIPELINE = "wordnet-category"
RESULTS = Path(__file__).parent / "results" / "real.json"
SWEEP = Path(".cache/evidence/real")
ADAPTERS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "rank": 8, "alpha": 16, "targets": "all-linear"},
}
RATES = {"full": (2e-5, 5e-5), "lora": (5e-4, 1e-3)}
SEEDS = (0, 1, 2)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=48)
    given = parser.parse_args()
    with explained_errors():
        best = {}
        for method, rates in RATES.items():
            tried = {f"{method} {rate:g}": _overrides(method, rate, given.steps) for rate in rates}
            _sweep(tried, SEEDS[:1])
            best[method] = max(rates, key=lambda rate, method=method: _accuracy(method, rate))  # type: ignore[misc]
            _sweep({f"{method} {best[method]:g}": _overrides(method, best[method], given.steps)}, SEEDS)
        quantized = {"train.steps": given.steps, "train.learning_rate": best["lora"]}
        _sweep({f"qlora {best['lora']:g}": quantized}, SEEDS)


def _overrides(method: str, rate: float, steps: int) -> Overrides:
    return {
        "quantize": {"method": "none"},
        "adapter": ADAPTERS[method],
        "train.learning_rate": rate,
        "train.steps": steps,
    }


def _sweep(variants: dict[str, Overrides], seeds: tuple[int, ...]) -> None:
    one_at_a_time = sweep.with_options(task_runner=task_runner("local", workers=1, address=None))
    one_at_a_time(PIPELINE, variants, seeds, out=SWEEP, threads=1)
    _write_results()


def _write_results() -> None:
    """Every cell that is done, without the loss of every step."""
    cells = {}
    for path in sorted((SWEEP / "cells").glob("*.json")):
        cell = json.loads(path.read_text())
        found = cell["results"]
        cells[path.stem] = {
            **{key: cell[key] for key in ("variant", "overrides", "seed", "seconds")},
            "train": found["train"],
            "evaluate": _numbers(found["evaluate"]),
            "losses": [round(step["loss"], 4) for step in found["history"]],
        }
    write_json(RESULTS, {"format": 1, "part": "real", "made_with": versions(), "cells": cells})


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def _accuracy(method: str, rate: float) -> float:
    cells = json.loads(RESULTS.read_text())["cells"].values()
    return next(
        float(cell["evaluate"]["accuracy"])
        for cell in cells
        if cell["variant"] == f"{method} {rate:g}" and cell["seed"] == SEEDS[0]
    )


if __name__ == "__main__":
    main()
