"""What the study feeds into the library: the arms that `graftline recommend` and `graftline init` choose from.

Only arms that were trained on the real model count. Those that are not worse for certain than the best one come first,
the adapters before full fine-tuning, dense before 4 bits; the others follow by accuracy.
"""

from pathlib import Path
from typing import Any

from studies.survey.arms import difference, estimate
from studies.survey.claims import accuracies, real_arms
from studies.survey.grid import REAL_ADAPTERS, REAL_RATES

ORDER = ("lora", "qlora", "full")
"""Preference among arms whose accuracy is not worse for certain."""
CLAIMS = {"lora": [1, 3, 5, 10], "qlora": [6, 7], "full": [1, 10]}
TRAINED_AS = {"qlora": "lora"}
"""Arms with the adapter and the rates of another."""


def arms(results: Path) -> list[dict[str, Any]]:
    """The arms in the order of preference, as `graftline.plan.evidence` reads them."""
    real = real_arms(results)
    scores = {name: accuracies(cells) for name, cells in real.items()}
    best = max(scores, key=lambda name: estimate(list(scores[name].values())).mean)

    def place(name: str) -> tuple[bool, float]:
        worse = name != best and difference(scores[name], scores[best]).high < 0
        return worse, -estimate(list(scores[name].values())).mean if worse else ORDER.index(name)

    return [_arm(name, real[name]) for name in sorted(scores, key=place)]


def _arm(name: str, cells: dict[int, Any]) -> dict[str, Any]:
    found, settings = estimate(list(accuracies(cells).values())), TRAINED_AS.get(name, name)
    return {
        "name": name,
        "adapter": REAL_ADAPTERS[settings],
        "bits": 4 if name == "qlora" else 16,
        "learning_rate": float(next(iter(cells.values()))["variant"].split()[1]),
        "learning_rates_tried": list(REAL_RATES[settings]),
        "found": f"accuracy {found.plain()} on SmolLM2-135M after 48 steps, {found.seeds} seeds; the base has 0.397",
        "claims": CLAIMS[name],
    }
