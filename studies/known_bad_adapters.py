"""Which gate stops which bad adapter, and does a good one pass? Seeded trials on a small model that is made for it.

    python -m studies.known_bad_adapters --work FOLDER --seeds 5
    python -m studies.known_bad_adapters --work FOLDER --seeds 1 --base BASE --rows runs/wordnet-category/fetch

Recipes and gates are those of tests/evaluate/test_known_bad_adapters.py. With ``--base`` it is the demo's real model
(SmolLM2-135M) with rows and general text of the demo, about two core minutes an adapter. Scores are kept in
``--work``, so that a run that was stopped goes on there. Prints the Markdown table of docs/gates.md.
"""

import argparse
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from graftline.data.rows import read_rows
from graftline.digest import write_json
from graftline.evaluate.gates import judge
from graftline.evaluate.scores import Scores, read_scores, write_scores
from tests.evaluate.trials import (
    BAD,
    GATES,
    GOOD,
    Recipe,
    World,
    bad_recipes,
    evaluate,
    load_base,
    make_candidate,
    make_world,
)

RESULTS = Path(__file__).parent / "results" / "known_bad_adapters.json"
NAMES = {"good": "good (other seeds than production's)"}
REAL_LABELS = ("animal", "person", "plant")
REAL_GOOD = Recipe(learning_rate=5e-4, steps=24, batch_size=8)
REAL_BAD = bad_recipes(REAL_GOOD, noise=0.1, learning_rate=0.015, other_template="tokenizer")
REAL_GATES = GATES | {
    # The real base is right in 83 of 100 already; forgetting as in the demo's own gate.
    "gain": replace(GATES["gain"], margin=0.0),
    "forgetting": replace(GATES["forgetting"], margin=1.0),
}


def real_world(base: Path, rows: Path) -> World:
    """The demo's rows of three categories: 400 to train on, 100 to evaluate with, 40 sentences of general text."""
    of_labels = [row for row in read_rows(rows / "train.jsonl") if row.answer.strip() in REAL_LABELS]
    random.Random(0).shuffle(of_labels)
    texts = [json.loads(line)["text"] for line in (rows / "general.jsonl").read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(base)
    return World(base, tokenizer, of_labels[100:500], of_labels[:100], texts[:40], template="none", labels=REAL_LABELS)


def run_trials(work: Path, world: World, num_seeds: int, *, real: bool) -> dict[str, Any]:
    """Trials of every kind with each seed: verdict, and each gate's outcome with the candidate's figure."""
    good, bad, gates = (REAL_GOOD, REAL_BAD, REAL_GATES) if real else (GOOD, BAD, GATES)
    references = {
        "base": kept(work, "base", lambda: evaluate(world, load_base(world))),
        "production": kept(work, "production", lambda: make_candidate(world, replace(good, seed=100))),
    }
    found: dict[str, Any] = {}
    for seed in range(1, num_seeds + 1):
        for kind, (recipe, gate) in {"good": (good, None), **bad}.items():
            candidate = replace(recipe, seed=seed)
            scores = kept(work, f"{kind}-{seed}".replace(" ", "-"), lambda made=candidate: make_candidate(world, made))
            verdict = judge(gates, scores, references)
            trial = {
                "verdict": verdict.outcome,
                "gates": {gate.name: [gate.outcome, gate.candidate] for gate in verdict.gates},
            }
            found.setdefault(kind, {"should_stop": gate, "trials": {}})["trials"][f"{seed}"] = trial
            print(kind, seed, json.dumps(trial), flush=True)
    return found


def kept(work: Path, name: str, make: Callable[[], Scores]) -> Scores:
    """Scores from the folder; made and put there if they are not."""
    path = work / f"{name}.jsonl"
    if not path.exists():
        write_scores(path, make())
    return read_scores(path)


def markdown(found: dict[str, Any]) -> str:
    lines = ["| adapter | should be stopped by | stopped by it | failing gates | verdict |", "|---|---|---|---|---|"]
    for kind, made in found.items():
        trials, gate = made["trials"].values(), made["should_stop"]
        failing = Counter(
            name for trial in trials for name, (outcome, _) in trial["gates"].items() if outcome == "fail"
        )
        stopped = f"{failing[gate]} of {len(trials)}" if gate else "–"
        by = ", ".join(f"{name} {count}" for name, count in sorted(failing.items())) or "none"
        outcomes = Counter(trial["verdict"] for trial in trials)
        verdicts = ", ".join(f"{count} × {outcome}" for outcome, count in sorted(outcomes.items()))
        lines.append(f"| {NAMES.get(kind, kind)} | {gate or '–'} | {stopped} | {by} | {verdicts} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--base", type=Path, help="folder of a real base, instead of the small one that is made")
    parser.add_argument("--rows", type=Path, help="with --base: the fetch folder of a run of wordnet-category")
    parser.add_argument("--work", type=Path, required=True, help="folder for scores; one for each kind of base")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    real = options.base is not None
    world = real_world(options.base, options.rows) if real else make_world(options.work / "model")
    found = run_trials(options.work, world, options.seeds, real=real)
    document = json.loads(options.out.read_text()) if options.out.exists() else {}
    write_json(options.out, document | {"real" if real else "small": found})
    print(markdown(found))


if __name__ == "__main__":
    main()
