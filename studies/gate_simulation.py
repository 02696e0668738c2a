"""How often do gates promote what they should not, and what they should? Simulated comparisons through `judge`.

    python -m studies.gate_simulation --comparisons 1000 --out studies/results/gate_simulation.json

False promotion: the truth lies exactly on the gate's bound, the worst case of "must not pass". Power: there is no
difference, and the number of items is the one that `items_needed` asks for at power 0.8. Prints the Markdown tables of
docs/gates.md.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy.stats import norm

from graftline.digest import of_json, write_json
from graftline.evaluate.gate_rules import GateRule, Test
from graftline.evaluate.gates import judge
from graftline.evaluate.scores import DocumentScore, ItemScore, Scores
from graftline.evaluate.statistics.power import items_needed, paired_deviation
from graftline.evaluate.statistics.sequential import spending_boundaries

ALPHA = 0.05
TEMPLATE = of_json("simulated")
_LOG_SPREAD = 0.7
"""Standard deviation of the logarithm of a document's length: lengths vary by a factor of ten."""
Generator = np.random.Generator
Simulate = Callable[[Generator], bool]


@dataclass(frozen=True)
class Cell:
    """One simulated setting and how often it was promoted."""

    question: str
    gate: str
    items: int
    truth: str
    promoted: float
    comparisons: int


@lru_cache(maxsize=200_000)
def item(index: int, correct: bool) -> ItemScore:
    return ItemScore(f"{index:06}", (-1.0, -2.0), 0 if correct else 1, 0, correct, 1.0, 1, True)


def accuracy_pair(rng: Generator, num_items: int, discordant: float, difference: float) -> tuple[Scores, Scores]:
    """Candidate and reference that differ on a share ``discordant`` of items, by ``difference`` on average."""
    gained, lost = (discordant + difference) / 2, (discordant - difference) / 2
    kinds = rng.choice(4, num_items, p=[gained, lost, (1 - discordant) * 0.8, (1 - discordant) * 0.2])
    ours = tuple(item(i, kind in (0, 2)) for i, kind in enumerate(kinds))
    theirs = tuple(item(i, kind in (1, 2)) for i, kind in enumerate(kinds))
    return Scores(TEMPLATE, ("a", "b"), ours), Scores(TEMPLATE, ("a", "b"), theirs)


def document_pair(
    rng: Generator, num_documents: int, difference: float, *, skewed: bool = False
) -> tuple[Scores, Scores]:
    """General text: lengths are skewed, and a document's change belongs to all of its tokens."""
    tokens = rng.lognormal(4.5, _LOG_SPREAD, num_documents).astype(int) + 5
    base = rng.gamma(20, 0.15, num_documents) * tokens
    # Skewed: most documents hardly change, a few get much worse; the mean is 0 either way.
    noise = (rng.exponential(1.0, num_documents) - 1.0 if skewed else rng.normal(0.0, 1.0, num_documents)) * 0.08
    changed = base + (difference + noise) * tokens

    def scores(values: np.ndarray) -> Scores:
        rows = enumerate(zip(values, tokens, strict=True))
        return Scores(TEMPLATE, documents=tuple(DocumentScore(f"{i:05}", float(v), int(t)) for i, (v, t) in rows))

    return scores(changed), scores(base)


def promoted(rules: dict[str, GateRule], pair: tuple[Scores, Scores]) -> bool:
    return judge(rules, pair[0], {"production": pair[1]}).outcome == "pass"


def accuracy_rule(test: Test, margin: float) -> GateRule:
    return GateRule("accuracy", "higher", test, margin, ALPHA, min_items=1, against="production")


FORGETTING = GateRule("forgetting_nll", "lower", "non-inferiority", 0.02, ALPHA, 1, "production")


def false_promotion_cells() -> Iterator[tuple[str, int, str, Simulate]]:
    for num_items in (100, 300, 1000, 3000):
        for discordant in (0.05, 0.2):
            margin = 0.03
            rule = {"g": accuracy_rule("non-inferiority", margin)}
            yield (
                f"accuracy, non-inferiority {margin}",
                num_items,
                f"worse by {margin}, {discordant:.0%} discordant",
                lambda rng, n=num_items, d=discordant, r=rule, m=margin: promoted(r, accuracy_pair(rng, n, d, -m)),
            )
        rule = {"g": accuracy_rule("superiority", 0.0)}
        yield (
            "accuracy, superiority",
            num_items,
            "equal, 20% discordant",
            lambda rng, n=num_items, r=rule: promoted(r, accuracy_pair(rng, n, 0.2, 0.0)),
        )
    rule = {"g": accuracy_rule("equivalence", 0.03)}
    yield (
        "accuracy, equivalence 0.03",
        1000,
        "worse by 0.03, 10% discordant",
        lambda rng: promoted(rule, accuracy_pair(rng, 1000, 0.1, -0.03)),
    )
    for num_documents, skewed in ((100, False), (300, False), (50, True), (100, True), (300, True)):
        yield (
            "forgetting NLL, non-inferiority 0.02",
            num_documents,
            f"worse by 0.02, {'skewed' if skewed else 'symmetric'}",
            lambda rng, n=num_documents, s=skewed: promoted({"g": FORGETTING}, document_pair(rng, n, 0.02, skewed=s)),
        )
    yield "accuracy and forgetting (Holm)", 300, "both on their bound", both_on_their_bound
    yield "accuracy and forgetting (Holm)", 300, "only forgetting on its bound", only_forgetting_on_its_bound


def joined(items: tuple[Scores, Scores], documents: tuple[Scores, Scores]) -> tuple[Scores, Scores]:
    first, second = (replace(a, documents=b.documents) for a, b in zip(items, documents, strict=True))
    return first, second


TWO_GATES = {"task": accuracy_rule("non-inferiority", 0.03), "forgetting": FORGETTING}


def both_on_their_bound(rng: Generator) -> bool:
    return promoted(TWO_GATES, joined(accuracy_pair(rng, 300, 0.2, -0.03), document_pair(rng, 100, 0.02)))


def only_forgetting_on_its_bound(rng: Generator) -> bool:
    return promoted(TWO_GATES, joined(accuracy_pair(rng, 300, 0.2, 0.15), document_pair(rng, 100, 0.02)))


def power_cells() -> Iterator[tuple[str, int, str, Simulate]]:
    for discordant, margin in ((0.05, 0.02), (0.2, 0.05), (0.2, 0.03)):
        num_items = int(items_needed(paired_deviation(discordant, 0.0), margin, alpha=ALPHA))
        rule = {"g": accuracy_rule("non-inferiority", margin)}
        yield (
            f"accuracy, non-inferiority {margin}",
            num_items,
            f"equal, {discordant:.0%} discordant",
            lambda rng, n=num_items, d=discordant, r=rule: promoted(r, accuracy_pair(rng, n, d, 0.0)),
        )
    gain, discordant = 0.05, 0.2
    num_items = int(items_needed(paired_deviation(discordant, gain), gain, alpha=ALPHA))
    rule = {"g": accuracy_rule("superiority", 0.0)}
    yield (
        "accuracy, superiority",
        num_items,
        f"better by {gain}, {discordant:.0%} discordant",
        lambda rng, n=num_items, r=rule: promoted(r, accuracy_pair(rng, n, discordant, gain)),
    )
    yield both_must_pass()


def both_must_pass() -> tuple[str, int, str, Simulate]:
    """Two gates, each planned at alpha / 2 (Holm) with power 0.9, so that both pass with power 0.8."""
    discordant, spread = 0.2, 0.08 * math.exp(_LOG_SPREAD**2 / 2)  # of a mean weighted by lognormal lengths
    num_items = int(items_needed(paired_deviation(discordant, 0.0), 0.03, alpha=ALPHA / 2, power=0.9))
    num_documents = int(items_needed(spread, 0.02, alpha=ALPHA / 2, power=0.9))

    def simulate(rng: Generator) -> bool:
        return promoted(
            TWO_GATES, joined(accuracy_pair(rng, num_items, discordant, 0.0), document_pair(rng, num_documents, 0.0))
        )

    return "accuracy and forgetting (Holm)", num_items, f"equal, {num_documents} documents", simulate


SHARES = [0.25, 0.5, 0.75, 1.0]
BOUNDARIES = spending_boundaries(SHARES, alpha=ALPHA)


def peeking(rng: Generator, *, spending: bool) -> bool:
    """Four looks at a growing evaluation, no difference in truth; promoted at the first look that passes."""
    candidate, reference = accuracy_pair(rng, 1000, 0.2, 0.0)
    for share, boundary in zip(SHARES, BOUNDARIES, strict=True):
        alpha = float(norm.sf(boundary)) if spending else ALPHA
        rule = GateRule("accuracy", "higher", "superiority", 0.0, alpha, 1, "production")
        n = round(1000 * share)
        looked = Scores(TEMPLATE, ("a", "b"), candidate.items[:n]), Scores(TEMPLATE, ("a", "b"), reference.items[:n])
        if promoted({"g": rule}, looked):
            return True
    return False


def looking_cells() -> Iterator[tuple[str, int, str, Simulate]]:
    yield "superiority, 4 looks at alpha each", 1000, "equal", lambda rng: peeking(rng, spending=False)
    yield "superiority, 4 looks, alpha spending", 1000, "equal", lambda rng: peeking(rng, spending=True)


QUESTIONS = {"false promotion": false_promotion_cells, "power": power_cells, "looking early": looking_cells}


def run_cells(comparisons: int, seed: int, known: list[Cell]) -> Iterator[list[Cell]]:
    """All cells so far, after every one; those that ``known`` holds are taken over."""
    cells = []
    for question, make in QUESTIONS.items():
        for number, (gate, num_items, truth, simulate) in enumerate(make()):
            blank = Cell(question, gate, num_items, truth, 0.0, comparisons)
            found = next((cell for cell in known if replace(cell, promoted=0.0) == blank), None)
            if found is None:
                rng = np.random.default_rng([seed, number, len(question)])
                found = replace(blank, promoted=sum(simulate(rng) for _ in range(comparisons)) / comparisons)
                print(found, flush=True)
            cells.append(found)
            yield cells


def read_cells(path: Path, seed: int) -> list[Cell]:
    """Cells that an earlier run recorded with the same seed."""
    recorded = json.loads(path.read_text()) if path.is_file() else {}
    return [Cell(**cell) for cell in recorded["cells"]] if recorded.get("seed") == seed else []


def markdown(cells: list[Cell]) -> str:
    lines = []
    for question in QUESTIONS:
        lines += [f"\n**{question.capitalize()}**\n", "| gate | items | truth | promoted |", "|---|---|---|---|"]
        for cell in cells:
            if cell.question == question:
                lines.append(f"| {cell.gate} | {cell.items} | {cell.truth} | {cell.promoted:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--comparisons", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="cells that it holds already are not simulated again")
    options = parser.parse_args()
    cells: list[Cell] = []
    for cells in run_cells(options.comparisons, options.seed, read_cells(options.out, options.seed)):
        value = {"alpha": ALPHA, "seed": options.seed, "cells": [asdict(cell) for cell in cells]}
        write_json(options.out, value)
    print(markdown(cells))


if __name__ == "__main__":
    main()
