"""Results by arm and seed, and intervals whose unit is the seed (METHODS §6)."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from studies.survey.grid import TUNING_SEED

Result = Mapping[str, Any]
BySeed = dict[int, float]


def read_cells(results: Path, part: str) -> list[Result]:
    """The cells of a part that did not fail; none where the part has not been run."""
    path = results / f"{part}.json"
    cells = json.loads(path.read_text())["cells"].values() if path.exists() else []
    return [cell for cell in cells if "failed" not in cell]


def judged(cells: Sequence[Result]) -> list[Result]:
    """The cells that verdicts are taken from: those of the tuning of rates left out."""
    return [cell for cell in cells if cell["seed"] != TUNING_SEED]


def arm(cells: Sequence[Result], name: str) -> dict[int, Result]:
    """An arm's cells by seed, those of the tuning of its rate left out."""
    return {cell["seed"]: cell for cell in judged(cells) if cell["arm"] == name}


def values(cells: Mapping[int, Result], of: Callable[[Result], float]) -> BySeed:
    """A number of each cell by seed."""
    return {seed: of(cell) for seed, cell in sorted(cells.items())}


def test_loss(cell: Result) -> float:
    """Nats per supervised token of the test rows after training."""
    return float(cell["after"]["test"])


def forgotten(cell: Result) -> float:
    """By how many nats a token the general text got worse."""
    return float(cell["after"]["general"] - cell["before"]["general"])


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with Student's two-sided interval."""

    mean: float
    low: float
    high: float
    seeds: int

    def text(self, digits: int = 3, unit: str = "") -> str:
        """``+0.012 [-0.003, +0.027]``."""
        return f"{self.mean:+.{digits}f} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]{unit}"

    def plain(self, digits: int = 3) -> str:
        """Without signs, for quantities that are no differences."""
        return f"{self.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def estimate(found: Sequence[float], *, level: float = 0.95) -> Estimate:
    """Mean and interval; with one value the interval is infinite."""
    count, mean = len(found), sum(found) / len(found)
    if count < 2:
        return Estimate(mean, -math.inf, math.inf, count)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in found) / (count - 1))
    half = float(stats.t.ppf((1 + level) / 2, count - 1)) * deviation / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, count)


def difference(first: BySeed, second: BySeed, *, level: float = 0.95) -> Estimate:
    """``first - second`` seed by seed, over the seeds that both have."""
    return estimate([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())], level=level)


def decide(found: Estimate, *, wanted_below: float) -> str:
    """``supported`` where all of the interval lies below, ``not supported`` where above, else ``not decided``."""
    if found.high < wanted_below:
        return "supported"
    return "not supported" if found.low > wanted_below else "not decided"
