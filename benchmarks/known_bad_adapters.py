"""Which gate stops which bad adapter, and does a good one pass? Seeded trials on a small model that is made for it.

    python -m benchmarks.known_bad_adapters --seeds 5 --out benchmarks/results/known_bad_adapters.json

Recipes and gates are those of tests/evaluate/test_known_bad_adapters.py. Prints the Markdown table of docs/gates.md.
"""

import argparse
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from graftline.digest import write_json
from graftline.evaluate.gates import judge
from tests.evaluate.trials import BAD, GATES, GOOD, evaluate, make_candidate, make_world

NAMES = {"good": "good (other seeds than production's)"}


def run_trials(folder: Path, num_seeds: int) -> dict[str, Any]:
    world = make_world(folder)
    base = evaluate(world, AutoModelForCausalLM.from_pretrained(world.base))
    references = {"base": base, "production": make_candidate(world, replace(GOOD, seed=100))}
    found: dict[str, Any] = {}
    for kind, (recipe, gate) in {"good": (GOOD, None), **BAD}.items():
        verdicts = [
            judge(GATES, make_candidate(world, replace(recipe, seed=seed)), references)
            for seed in range(1, num_seeds + 1)
        ]
        failing = Counter(found.name for verdict in verdicts for found in verdict.gates if found.outcome == "fail")
        outcomes = Counter(verdict.outcome for verdict in verdicts)
        found[kind] = {"should_stop": gate, "failing_gates": dict(failing), "verdicts": dict(outcomes)}
        print(kind, found[kind], flush=True)
    return found


def markdown(found: dict[str, Any], num_seeds: int) -> str:
    lines = ["| adapter | should be stopped by | stopped by it | failing gates | verdict |", "|---|---|---|---|---|"]
    for kind, trial in found.items():
        gate = trial["should_stop"]
        stopped = f"{trial['failing_gates'].get(gate, 0)} of {num_seeds}" if gate else "–"
        failing = ", ".join(f"{name} {count}" for name, count in sorted(trial["failing_gates"].items())) or "none"
        verdicts = ", ".join(f"{count} × {outcome}" for outcome, count in sorted(trial["verdicts"].items()))
        lines.append(f"| {NAMES.get(kind, kind)} | {gate or '–'} | {stopped} | {failing} | {verdicts} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run_trials(Path(folder), options.seeds)
    write_json(options.out, {"seeds": options.seeds, "trials": found})
    print(markdown(found, options.seeds))


if __name__ == "__main__":
    main()
