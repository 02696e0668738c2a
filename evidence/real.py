"""The trainings of SmolLM2-135M, each through the demo's pipeline by `flows.sweep` (claims 1, 6 and 10).

    python -m evidence.real [--minutes 20]        from a checkout; goes on where it stopped

Full fine-tuning and LoRA at two rates each with seed 0, the better one with seeds 1 and 2; QLoRA (NF4) at LoRA's rate.
So the rate is chosen on the rows that are reported, for both arms alike.
"""

import argparse
import functools
import json
import math
import time
from pathlib import Path
from typing import Any

from evidence.__main__ import read, versions
from flows.sweep import sweep
from graftline.digest import write_json
from graftline.workflow.command import explained_errors
from graftline.workflow.sweep_cells import Overrides
from graftline.workflow.sweeping import task_runner

PIPELINE = "wordnet-category"
RESULTS = Path(__file__).parent / "results" / "real.json"
SWEEP = Path(".cache/evidence/real")
ADAPTERS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "rank": 8, "alpha": 16, "targets": "all-linear"},
}
RATES = {"full": (2e-5, 5e-5), "lora": (5e-4, 1e-3)}
SEEDS, STEPS = (0, 1, 2), 48


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="start no training after so many minutes")
    given = parser.parse_args()
    with explained_errors():
        _run(time.time() + 60 * given.minutes if given.minutes is not None else math.inf)


def _run(deadline: float) -> None:
    best: dict[str, float] = {}
    for method, rates in RATES.items():
        tried = {_variant(method, rate): _overrides(method, rate) for rate in rates}
        if not _sweep(tried, SEEDS[:1], deadline):
            return
        best[method] = max(rates, key=functools.partial(_accuracy, method))
        if not _sweep({_variant(method, best[method]): _overrides(method, best[method])}, SEEDS, deadline):
            return
    _sweep(
        {_variant("qlora", best["lora"]): {"train.steps": STEPS, "train.learning_rate": best["lora"]}}, SEEDS, deadline
    )


def _variant(method: str, rate: float) -> str:
    return f"{method} {rate:g}"


def _overrides(method: str, rate: float) -> Overrides:
    return {
        "quantize": {"method": "none"},
        "adapter": ADAPTERS[method],
        "train.learning_rate": rate,
        "train.steps": STEPS,
    }


def _sweep(variants: dict[str, Overrides], seeds: tuple[int, ...], deadline: float) -> bool:
    """Run what has no result before ``deadline``; returns whether all is done."""
    if _is_done(variants, seeds):
        return True
    minutes = None if math.isinf(deadline) else max(0.0, (deadline - time.time()) / 60)
    one_at_a_time = sweep.with_options(task_runner=task_runner("local", workers=1))
    one_at_a_time(PIPELINE, variants, seeds, out=SWEEP, threads=1, minutes=minutes)
    _add_results()
    return _is_done(variants, seeds)


def _is_done(variants: dict[str, Overrides], seeds: tuple[int, ...]) -> bool:
    done = {(cell["variant"], cell["seed"]) for cell in read(RESULTS).get("cells", {}).values()}
    return all((variant, seed) in done for variant in variants for seed in seeds)


def _add_results() -> None:
    """Every cell that is done, without what a verdict does not need."""
    document = read(RESULTS) or {"format": 1, "part": "real", "made_with": versions(), "cells": {}}
    for path in sorted((SWEEP / "cells").glob("*.json")):
        cell = json.loads(path.read_text())
        found = cell["results"]
        document["cells"][path.stem] = {
            **{key: cell[key] for key in ("variant", "overrides", "seed", "seconds")},
            "train": found["train"],
            "evaluate": _numbers(found["evaluate"]["candidate"]),
            "base": _numbers(found["evaluate"]["base"]),
            "losses": [round(step["loss"], 4) for step in found["history"]],
        }
    write_json(RESULTS, document)


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def _accuracy(method: str, rate: float) -> float:
    cells = read(RESULTS)["cells"].values()
    return next(
        float(cell["evaluate"]["accuracy"])
        for cell in cells
        if cell["variant"] == _variant(method, rate) and cell["seed"] == SEEDS[0]
    )


if __name__ == "__main__":
    main()
