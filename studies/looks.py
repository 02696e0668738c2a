"""Alpha spending: boundaries for looks at an evaluation before all items are scored."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.stats import norm

from graftline.errors import EvaluationError

# Lan and DeMets 1983 alpha spending with the O'Brien-Fleming type function.
#
# One-sided: up to information share t the error spent is 2 - 2 Phi(z_{alpha/2} / sqrt(t)). The boundary of each look is
# found by recursive integration of the density of the unstopped process (Armitage, McPherson, Rowe 1969).

Floats = npt.NDArray[np.float64]
_GRID = 1001
_REACH = 8.0


def spent_alpha(share: float, *, alpha: float) -> float:
    """One-sided error that may be spent up to the information share in (0, 1]."""
    return float(2 * norm.sf(norm.isf(alpha / 2) / share**0.5))


def spending_boundaries(shares: Sequence[float], *, alpha: float) -> list[float]:
    """z-values that a look at each information share must exceed; all looks together err with probability alpha.

    The nominal one-sided alpha of look k is ``norm.sf(boundaries[k])``; a gate at look k is judged with it.

    Raises:
        EvaluationError: shares that are not rising within (0, 1].
    """
    if not shares or any(late <= early for early, late in zip([0.0, *shares], shares, strict=False)) or shares[-1] > 1:
        raise EvaluationError(f"looks at information shares {list(shares)}; expected rising numbers in (0, 1]")
    boundaries: list[float] = []
    process = _Process(points=np.zeros(1), masses=np.ones(1))
    for early, late in zip([0.0, *shares], shares, strict=False):
        budget = spent_alpha(late, alpha=alpha) - (spent_alpha(early, alpha=alpha) if early else 0.0)
        edge, process = _look(process, (late - early) ** 0.5, late**0.5, budget)
        boundaries.append(edge / late**0.5)
    return boundaries


@dataclass(frozen=True)
class _Process:
    """The score process S(t) = z sqrt(t) of those not stopped yet: probability ``masses`` at ``points``."""

    points: Floats
    masses: Floats


def _look(process: _Process, scale: float, deviation: float, budget: float) -> tuple[float, _Process]:
    """The edge that the process crosses with probability ``budget``, and the process that goes on below it.

    S has independent normal increments with standard deviation ``scale``; ``deviation`` is that of S itself.
    """

    def excess(edge: float) -> float:
        return float((process.masses * norm.sf((edge - process.points) / scale)).sum()) - budget

    edge = float(brentq(excess, -_REACH, _REACH, xtol=1e-10))
    grid = np.linspace(-_REACH * deviation, edge, _GRID)
    width = np.full(_GRID, grid[1] - grid[0])
    width[[0, -1]] /= 2  # trapezoid rule
    density = (norm.pdf((grid[:, None] - process.points) / scale) / scale) @ process.masses
    return edge, _Process(grid, density * width)
