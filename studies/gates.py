"""Gates: how often do they promote what they should not, and what they should? And which stops which bad adapter?

simulation      comparisons with a known truth through `judge`, each also by the rule before (passes corrected by Holm,
                fails at each gate's own alpha). False promotion: the truth lies exactly on the bound of one gate at
                least, the worst case of "must not pass". False failure: it lies on the bound of every gate, the worst
                case of "must not fail". Power: there is no difference, and the number of items is the one that
                `items_needed` asks for at power 0.8. Looking early: promoted at the first of four looks that passes
known_bad       six kinds of bad adapters and a good one, five seeds of each, on a small model that is made for it:
                recipes and gates of `studies.trials`

The tables in Markdown are those of docs/gates.md.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from multiprocessing import get_context

import numpy as np

from graftline.digest import of_json
from graftline.evaluate.gates import judge
from graftline.evaluate.scores import DocumentScore, ItemScore, Scores, read_scores, write_scores
from graftline.evaluate.statistics.error_rates import holm, items_needed, paired_deviation
from graftline.settings.model import Gate, GateTest
from studies.harness import Json, Setting
from studies.trials import (
    BAD,
    GATES,
    GOOD,
    Recipe,
    World,
    evaluate,
    load_base,
    make_candidate,
    make_world,
)

ALPHA = 0.05
TEMPLATE = of_json("simulated")
_LOG_SPREAD = 0.7
"""Standard deviation of the logarithm of a document's length: lengths vary by a factor of ten."""
Generator = np.random.Generator
Simulate = Callable[[Generator], tuple[bool, bool]]
"""One comparison: whether it is promoted (or fails) by the gates, and by the rule before."""


@dataclass(frozen=True)
class Cell:
    """One simulated setting and how often it was promoted, or failed."""

    question: str
    gate: str
    items: int
    truth: str
    share: float
    """Of comparisons that were promoted, or that failed where the question is about failing."""
    share_before: float
    """The same by the rule before: passes corrected by Holm, fails at each gate's own alpha."""
    comparisons: int


@lru_cache(maxsize=200_000)
def item(index: int, correct: bool) -> ItemScore:
    """One of two options was right."""
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


def promoted(rules: dict[str, Gate], pair: tuple[Scores, Scores]) -> tuple[bool, bool]:
    """Whether the gates let the first of the pair pass against the second; and whether they did with Holm."""
    verdict = judge(rules, pair[0], {"production": pair[1]})
    corrected = holm({gate.name: gate.p_value for gate in verdict.gates if gate.p_value is not None})
    return verdict.outcome == "pass", all(corrected[gate.name] <= gate.alpha for gate in verdict.gates)


def failed(rules: dict[str, Gate], pair: tuple[Scores, Scores]) -> tuple[bool, bool]:
    """Whether the gates fail the first of the pair; and whether they did without a correction."""
    verdict = judge(rules, pair[0], {"production": pair[1]})
    return verdict.outcome == "fail", any(
        gate.p_broken is not None and gate.p_broken <= gate.alpha for gate in verdict.gates
    )


def accuracy_rule(test: GateTest, margin: float, alpha: float = ALPHA) -> Gate:
    """A gate on accuracy against production."""
    return Gate(
        metric="accuracy", direction="higher", test=test, margin=margin, alpha=alpha, min_items=1, against="production"
    )


FORGETTING = Gate(
    metric="forgetting_nll",
    direction="lower",
    test="non-inferiority",
    margin=0.02,
    alpha=ALPHA,
    min_items=1,
    against="production",
)
GENERAL = Gate(
    metric="general_accuracy",
    direction="higher",
    test="non-inferiority",
    margin=0.03,
    alpha=ALPHA,
    min_items=1,
    against="production",
)
TASK = accuracy_rule("non-inferiority", 0.03)
TWO_GATES = {"task": TASK, "forgetting": FORGETTING}
THREE_GATES = {**TWO_GATES, "general": GENERAL}
TWO, THREE = "accuracy and forgetting", "accuracy, forgetting and general accuracy"
Question = Iterator[tuple[str, int, str, Simulate]]
"""Gate, number of items, truth, and one comparison."""


def on_items(test: GateTest, margin: float, num_items: int, discordant: float, difference: float) -> Simulate:
    """Whether one simulated comparison of accuracies passes."""
    rule = {"g": accuracy_rule(test, margin)}
    return lambda rng: promoted(rule, accuracy_pair(rng, num_items, discordant, difference))


def on_documents(num_documents: int, *, skewed: bool) -> Simulate:
    """The same for general text that got worse by the whole margin."""
    return lambda rng: promoted({"g": FORGETTING}, document_pair(rng, num_documents, 0.02, skewed=skewed))


@dataclass(frozen=True)
class Truth:
    """Differences in truth, candidate minus reference, on so many independent items and documents."""

    items: int
    accuracy: float
    documents: int
    forgetting: float
    general: float | None = None
    """None: the gate on general tasks is not there."""

    def draw(self, rng: Generator) -> tuple[dict[str, Gate], tuple[Scores, Scores]]:
        """The gates, and one pair of scores."""
        items = accuracy_pair(rng, self.items, 0.2, self.accuracy)
        texts = document_pair(rng, self.documents, self.forgetting)
        general = accuracy_pair(rng, self.items, 0.2, self.general or 0.0)
        ours, theirs = (
            replace(a, documents=b.documents, general=c.items) for a, b, c in zip(items, texts, general, strict=True)
        )
        return (TWO_GATES if self.general is None else THREE_GATES), (ours, theirs)


def on_several(
    truth: Truth, outcome: Callable[[dict[str, Gate], tuple[Scores, Scores]], tuple[bool, bool]]
) -> Simulate:
    """Whether one comparison by several gates is promoted, or fails."""
    return lambda rng: outcome(*truth.draw(rng))


def false_promotion_cells() -> Question:
    """The truth lies on the gate's bound."""
    for count in (100, 300, 1000, 3000):
        for share in (0.05, 0.2):
            simulate = on_items("non-inferiority", 0.03, count, share, -0.03)
            yield "accuracy, non-inferiority 0.03", count, f"worse by 0.03, {share:.0%} discordant", simulate
        yield "accuracy, superiority", count, "equal, 20% discordant", on_items("superiority", 0.0, count, 0.2, 0.0)
    simulate = on_items("equivalence", 0.03, 1000, 0.1, -0.03)
    yield "accuracy, equivalence 0.03", 1000, "worse by 0.03, 10% discordant", simulate
    for count, skewed in ((100, False), (300, False), (50, True), (100, True), (300, True)):
        truth = f"worse by 0.02, {'skewed' if skewed else 'symmetric'}"
        yield "forgetting NLL, non-inferiority 0.02", count, truth, on_documents(count, skewed=skewed)
    yield TWO, 300, "both on their bound", on_several(Truth(300, -0.03, 100, 0.02), promoted)
    yield TWO, 300, "only forgetting on its bound", on_several(Truth(300, 0.15, 100, 0.02), promoted)
    yield THREE, 300, "all on their bound", on_several(Truth(300, -0.03, 100, 0.02, -0.03), promoted)
    only = "only forgetting on its bound"
    yield THREE, 300, only, on_several(Truth(300, 0.15, 100, 0.02, 0.15), promoted)


def false_failure_cells() -> Question:
    """Every condition holds, and none by more than nothing."""
    yield TWO, 300, "both on their bound", on_several(Truth(300, -0.03, 100, 0.02), failed)
    yield THREE, 300, "all on their bound", on_several(Truth(300, -0.03, 100, 0.02, -0.03), failed)


def power_cells() -> Question:
    """No difference, or a gain, with as many items as are asked for at power 0.8."""
    for share, margin in ((0.05, 0.02), (0.2, 0.05), (0.2, 0.03)):
        count = int(items_needed(paired_deviation(share, 0.0), margin, alpha=ALPHA))
        simulate = on_items("non-inferiority", margin, count, share, 0.0)
        yield f"accuracy, non-inferiority {margin}", count, f"equal, {share:.0%} discordant", simulate
    count = int(items_needed(paired_deviation(0.2, 0.05), 0.05, alpha=ALPHA))
    simulate = on_items("superiority", 0.0, count, 0.2, 0.05)
    yield "accuracy, superiority", count, "better by 0.05, 20% discordant", simulate
    spread = 0.08 * math.exp(_LOG_SPREAD**2 / 2)  # of a mean weighted by lognormal lengths
    for gates, general in ((2, None), (3, 0.0)):
        # Each with power 0.8^(1 / gates), so that all of them pass with power 0.8.
        power = 0.8 ** (1 / gates)
        count = int(items_needed(paired_deviation(0.2, 0.0), 0.03, alpha=ALPHA, power=power))
        documents = int(items_needed(spread, 0.02, alpha=ALPHA, power=power))
        name = TWO if general is None else THREE
        yield (
            name,
            count,
            f"equal, {documents} documents",
            on_several(Truth(count, 0.0, documents, 0.0, general), promoted),
        )


LOOKS = (0.25, 0.5, 0.75, 1.0)


def peeking(rng: Generator) -> tuple[bool, bool]:
    """Four looks at a growing evaluation, no difference in truth; promoted at the first look that passes."""
    candidate, reference = accuracy_pair(rng, 1000, 0.2, 0.0)
    rules = {"g": accuracy_rule("superiority", 0.0)}
    sizes = [round(1000 * share) for share in LOOKS]
    looks = (
        promoted(rules, (replace(candidate, items=candidate.items[:n]), replace(reference, items=reference.items[:n])))[
            0
        ]
        for n in sizes
    )
    passed = any(looks)
    return passed, passed


def looking_cells() -> Question:
    """Four looks."""
    yield "superiority, the first of 4 looks that passes", 1000, "equal", peeking


QUESTIONS = {
    "false promotion": false_promotion_cells,
    "false failure": false_failure_cells,
    "power": power_cells,
    "looking early": looking_cells,
}


def simulation(setting: Setting) -> Json:
    """Every cell, in as many processes as there are threads; each has a seed of its own."""
    comparisons = setting.rounds or setting.size(1000, 1)
    places = [(question, number) for question, make in QUESTIONS.items() for number, _ in enumerate(make())]
    # Started anew, not forked: torch's threads are running here.
    with ProcessPoolExecutor(setting.threads, mp_context=get_context("spawn")) as pool:
        found = pool.map(partial(simulated, seed=setting.seed, comparisons=comparisons), places)
        cells = [asdict(cell) for cell in found]
    lines = ["| question | gate | items | truth | now | before |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {c['question']} | {c['gate']} | {c['items']} | {c['truth']} | {c['share']:.3f} | {c['share_before']:.3f} |"
        for c in cells
    ]
    return {"alpha": ALPHA, "cells": cells, "markdown": lines}


def simulated(place: tuple[str, int], *, seed: int, comparisons: int) -> Cell:
    """One cell, by its question and its number there."""
    question, number = place
    gate, num_items, truth, simulate = list(QUESTIONS[question]())[number]
    rng = np.random.default_rng([seed, number, list(QUESTIONS).index(question)])
    now, before = np.mean([simulate(rng) for _ in range(comparisons)], axis=0).tolist()
    return Cell(question, gate, num_items, truth, now, before, comparisons)


NAMES = {"good": "good (other seeds than production's)"}


def known_bad(setting: Setting) -> Json:
    """On the small model."""
    kinds = {"good": (GOOD, None), **dict(list(BAD.items())[: setting.size(len(BAD), 1)])}
    return _trials(setting, make_world(setting.folder("model"), steps=setting.size(400, 10)), kinds, GATES)


Kinds = dict[str, tuple[Recipe, str | None]]


def _trials(setting: Setting, world: World, kinds: Kinds, gates: dict[str, Gate]) -> Json:
    """Each kind with each seed: verdict, and each gate's outcome with the candidate's figure."""
    good, found = kinds["good"][0], {}
    references = {
        "base": _kept(setting, "base", lambda: evaluate(world, load_base(world))),
        "production": _kept(setting, "production", lambda: make_candidate(world, replace(good, seed=100))),
    }
    for kind, (recipe, gate) in kinds.items():
        trials: Json = {}
        for seed in range(1, 1 + (setting.rounds or setting.size(5, 1))):
            made = replace(recipe, seed=seed, steps=setting.size(recipe.steps, 5))
            name = f"{kind}-{seed}".replace(" ", "-")
            verdict = judge(gates, _kept(setting, name, partial(make_candidate, world, made)), references)
            figures = {gate.name: [gate.outcome, gate.candidate] for gate in verdict.gates}
            trials[f"{seed}"] = {"verdict": verdict.outcome, "gates": figures}
        found[kind] = {"should_stop": gate, "trials": trials}
    return found | {"markdown": markdown(found)}


def _kept(setting: Setting, name: str, make: Callable[[], Scores]) -> Scores:
    """Scores from the work folder; made and put there if they are not."""
    path = setting.folder("scores") / f"{name}.jsonl"
    if not path.exists():
        write_scores(path, make())
    return read_scores(path)


def markdown(found: Json) -> list[str]:
    """One line a kind."""
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
    return lines


PARTS = {part.__name__: part for part in (simulation, known_bad)}
