"""The trainings of SmolLM2-135M, each through the demo's pipeline by `flows.sweep` (claims 1, 6 and 10).

Full fine-tuning and LoRA at two rates each with seed 0, the better one with seeds 1 and 2; QLoRA (NF4) at LoRA's rate.
So the rate is chosen on the rows that are reported, for both arms alike.
"""

import functools
import json
import math
import time
from pathlib import Path
from typing import Any

from flows.sweep import sweep
from graftline.digest import write_json
from graftline.workflow.sweep_cells import Overrides
from graftline.workflow.sweeping import task_runner
from studies.survey.__main__ import read, versions
from studies.survey.grid import REAL_ADAPTERS, REAL_RATES

PIPELINE = "wordnet-category"
SWEEP = Path(".cache/evidence/real")
SEEDS, STEPS = (0, 1, 2), 48


def run(results: Path, deadline: float) -> None:
    """Run what has no result before ``deadline``."""
    best: dict[str, float] = {}
    for method, rates in REAL_RATES.items():
        tried = {_variant(method, rate): _overrides(method, rate) for rate in rates}
        if not _sweep(results, tried, SEEDS[:1], deadline):
            return
        best[method] = max(rates, key=functools.partial(_accuracy, results, method))
        if not _sweep(results, {_variant(method, best[method]): _overrides(method, best[method])}, SEEDS, deadline):
            return
    _sweep(
        results,
        {_variant("qlora", best["lora"]): {"train.steps": STEPS, "train.learning_rate": best["lora"]}},
        SEEDS,
        deadline,
    )


def _variant(method: str, rate: float) -> str:
    return f"{method} {rate:g}"


def _overrides(method: str, rate: float) -> Overrides:
    return {
        "quantize": {"method": "none"},
        "adapter": REAL_ADAPTERS[method],
        "train.learning_rate": rate,
        "train.steps": STEPS,
    }


def _sweep(results: Path, variants: dict[str, Overrides], seeds: tuple[int, ...], deadline: float) -> bool:
    """Run what has no result before ``deadline``; returns whether all is done."""
    if _is_done(results, variants, seeds):
        return True
    minutes = None if math.isinf(deadline) else max(0.0, (deadline - time.time()) / 60)
    one_at_a_time = sweep.with_options(task_runner=task_runner("local", workers=1))
    one_at_a_time(PIPELINE, variants, seeds, out=SWEEP, threads=1, minutes=minutes)
    _add_results(results)
    return _is_done(results, variants, seeds)


def _is_done(results: Path, variants: dict[str, Overrides], seeds: tuple[int, ...]) -> bool:
    done = {(cell["variant"], cell["seed"]) for cell in read(results).get("cells", {}).values()}
    return all((variant, seed) in done for variant in variants for seed in seeds)


def _add_results(results: Path) -> None:
    """Every cell that is done, without what a verdict does not need."""
    document = read(results) or {"format": 1, "part": "real", "made_with": versions(), "cells": {}}
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
    write_json(results, document)


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def _accuracy(results: Path, method: str, rate: float) -> float:
    cells = read(results)["cells"].values()
    return next(
        float(cell["evaluate"]["accuracy"])
        for cell in cells
        if cell["variant"] == _variant(method, rate) and cell["seed"] == SEEDS[0]
    )
