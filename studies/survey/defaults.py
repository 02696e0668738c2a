"""What the study feeds into the library: the arms that `graftline recommend` and `graftline init` choose from.

python -m studies.survey.defaults [studies/survey/results] [graftline/plan/evidence.json]

Only arms that were trained on the real model count. Those that are not worse for certain than the best one come first,
the adapters before full fine-tuning, dense before 4 bits; the others follow by accuracy.
"""

import sys
from pathlib import Path
from typing import Any

from graftline.digest import write_json
from graftline.plan.evidence import EVIDENCE
from studies.survey.arms import difference, estimate
from studies.survey.claims import accuracies, real_arms
from studies.survey.page import HERE
from studies.survey.real import ADAPTERS, RATES

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
        "adapter": ADAPTERS[settings],
        "bits": 4 if name == "qlora" else 16,
        "learning_rate": float(next(iter(cells.values()))["variant"].split()[1]),
        "learning_rates_tried": list(RATES[settings]),
        "found": f"accuracy {found.plain()} on SmolLM2-135M after 48 steps, {found.seeds} seeds; the base has 0.397",
        "claims": CLAIMS[name],
    }


def main() -> None:
    """Command line."""
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results"
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else EVIDENCE
    write_json(out, {"format": 1, "page": "docs/evidence.md", "arms": arms(results)})


if __name__ == "__main__":
    main()
