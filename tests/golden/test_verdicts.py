"""What the gates say about fixed scores."""

from dataclasses import replace
from typing import Any

import pytest

from tests.golden import product
from tests.golden.record import Bound, Golden

BOUND = Bound(relative=1e-6, absolute=1e-9)
"""Sums of a few hundred numbers; resampling draws integers, so that no processor changes what is drawn."""
NUM_ITEMS = 240
_RATE = {"metric": "accuracy", "direction": "higher"}
_AGAINST = {
    "not-worse": {"test": "non-inferiority", "margin": 0.05, "against": "production"},
    "better": {"test": "superiority", "margin": 0.05, "against": "base"},
    "as-good": {"test": "equivalence", "margin": 0.05, "against": "production"},
    "enough": {"test": "limit", "limit": 0.8},
}
GATES: dict[str, dict[str, Any]] = {
    **{f"accuracy-{name}": _RATE | asked for name, asked in _AGAINST.items()},
    **{
        f"nll-{name}": {"metric": "nll", "direction": "lower"} | asked | ({"limit": 1.5} if name == "enough" else {})
        for name, asked in _AGAINST.items()
    },
    "forgetting": {
        "metric": "forgetting_nll",
        "direction": "lower",
        "test": "non-inferiority",
        "margin": 0.25,
        "min_items": 50,
        "against": "base",
    },
    "stops": {"metric": "option_stop_rate", "direction": "higher", "test": "limit", "limit": 0.9},
    "overlap": {"metric": "rouge_l", "direction": "higher", "test": "superiority", "against": "base", "min_items": 30},
    "leaks": {"metric": "leaked_rows", "direction": "lower", "test": "limit", "limit": 0},
    "size": {"metric": "merged_bytes", "direction": "lower", "test": "non-inferiority", "margin": 5, "against": "base"},
    "not-measured": {"metric": "energy", "direction": "lower", "test": "limit", "limit": 1},
    "nobody": _RATE | {"test": "non-inferiority", "margin": 0.1, "against": "a-release"},
    "few": _RATE | {"test": "limit", "limit": 0.5, "min_items": 1000},
}


def make_scores(num_right: int, *, shift: float = 0.0) -> product.Scores:
    """Scores of which the first ``num_right`` of every 20 items are right."""
    items, documents, answers = [], [], []
    for index in range(NUM_ITEMS):
        gold, right = index % 3, index % 20 < num_right
        chosen = gold if right else (gold + 1) % 3
        nll = 0.25 + index % 7 * 0.125 + shift * (1 + index % 3)
        options = tuple(-nll - (0.5 if option != chosen else 0.0) for option in range(3))
        item = product.ItemScore(f"item-{index:03}", options, chosen, gold, right, nll, 1 + index % 2, index % 16 > 0)
        items.append(item)
    for index in range(60):
        documents.append(product.DocumentScore(f"text-{index:02}", 30.0 + index % 11 + 4 * shift * (index % 5), 12))
        score = (index * 7 % 10) / 10 * (1 - shift)
        answers.append(product.AnswerScore(f"item-{index:03}", "a cat", float(score > 0.5), score, score, 2, True))
    return product.Scores(
        template=product.digest(b"template"),
        labels=("cat", "dog", "cow"),
        items=tuple(items),
        documents=tuple(documents),
        answers=tuple(answers),
        numbers={"leaked_rows": 0.0, "merged_bytes": 1000.0 + shift},
    )


CANDIDATES = {
    "better": (make_scores(19, shift=-0.1), {"base": make_scores(10), "production": make_scores(17)}),
    "equal": (make_scores(17), {"base": make_scores(10), "production": make_scores(17)}),
    "worse": (make_scores(13, shift=0.2), {"base": make_scores(16), "production": make_scores(17)}),
    "leaking": (
        replace(make_scores(19), numbers={"leaked_rows": 3.0, "merged_bytes": 900.0}),
        {"base": make_scores(10), "production": make_scores(18)},
    ),
}


@pytest.mark.parametrize("name", CANDIDATES)
def test_the_gates_say_of_fixed_scores_what_was_recorded(name: str, golden: Golden) -> None:
    candidate, references = CANDIDATES[name]
    verdict, page = product.verdict(GATES, candidate, references)
    golden.values(f"verdicts/{name}.json", verdict, BOUND)
    golden.text(f"verdicts/{name}.md", page)


def test_a_verdict_with_one_gate_is_the_recorded_one(golden: Golden) -> None:
    candidate, references = CANDIDATES["worse"]
    verdict, _ = product.verdict({"accuracy": GATES["accuracy-not-worse"]}, candidate, references)
    golden.values("verdicts/one-gate.json", verdict, BOUND)
