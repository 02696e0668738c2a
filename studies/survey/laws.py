"""Scaling laws over size N, rank r and rows D, fitted with intervals and with the error on a size that was left out.

    simple     ln y = c − a ln N − b ln r − d ln D                            (METHODS §4; least squares)
    with floor y = E + A / (r^b D^d)      at one size, E ≥ 0                  (Zhang et al. 2024, arXiv 2402.17193)

Intervals: settings are resampled whole, with all their seeds. N counts the weights inside the blocks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

from studies.survey.family import SIZES

Floats = npt.NDArray[np.float64]
FACTORS = ("N", "r", "D")
RESAMPLES = 1000
FLOOR_SHARE = 0.01
"""Of the smallest y: a floor below that could as well be none."""


@dataclass(frozen=True)
class Points:
    """Settings, each with the mean of a quantity over its seeds."""

    size: list[str]
    factors: Floats
    """(points, 3): N, r, D."""
    y: Floats


@dataclass(frozen=True)
class Exponent:
    """An exponent with its 95 % interval; above 0: the quantity falls with the factor."""

    factor: str
    value: float
    low: float
    high: float


def weights_of(size: str) -> int:
    """Weights inside the blocks: 4 w² of attention and 3 · 2.5 w² of the feed-forward network, a block."""
    return int(SIZES[size].blocks * 11.5 * SIZES[size].width ** 2)


def points(cells: Sequence[Mapping[str, Any]], of: Callable[[Mapping[str, Any]], float]) -> Points:
    """Mean over seeds of a number of each setting."""
    found: dict[tuple[str, int, int], list[float]] = {}
    for cell in cells:
        found.setdefault((cell["size"], cell["rank"], cell["rows"]), []).append(of(cell))
    keys = sorted(found)
    factors = np.array([[weights_of(size), rank, rows] for size, rank, rows in keys], dtype=np.float64)
    return Points([key[0] for key in keys], factors, np.array([np.mean(found[key]) for key in keys]))


def fit_simple(data: Points) -> tuple[Exponent, ...]:
    """Exponents of the simple law."""
    exponents = _slopes(data.factors, data.y)
    draw = np.random.default_rng(0)
    drawn = [draw.integers(len(data.y), size=len(data.y)) for _ in range(RESAMPLES)]
    resampled = np.array([_slopes(data.factors[rows], data.y[rows]) for rows in drawn])
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    return tuple(
        Exponent(name, float(e), float(a), float(b))
        for name, e, a, b in zip(FACTORS, exponents, low, high, strict=True)
    )


def _design(factors: Floats) -> Floats:
    return np.column_stack([np.ones(len(factors)), -np.log(factors)])


def _slopes(factors: Floats, y: Floats) -> Floats:
    solution = np.linalg.lstsq(_design(factors), np.log(y), rcond=None)[0]
    return np.asarray(solution[1:], dtype=np.float64)


def leave_one_size_out(data: Points) -> dict[str, float]:
    """Relative error (root mean square, of the logarithm) of the simple law on each size, fitted on the others."""
    errors = {}
    for size in dict.fromkeys(data.size):
        left_out = np.array([other == size for other in data.size])
        solution = np.linalg.lstsq(_design(data.factors[~left_out]), np.log(data.y[~left_out]), rcond=None)[0]
        gaps = _design(data.factors[left_out]) @ solution - np.log(data.y[left_out])
        errors[size] = float(np.sqrt(np.mean(gaps**2)))
    return errors


def spread(data: Points) -> float:
    """Standard deviation of the logarithm: what a law that predicts the mean everywhere would miss by."""
    return float(np.std(np.log(data.y)))


@dataclass(frozen=True)
class Direction:
    """How often a quantity fell from a factor's value to the next, all else equal, and Holm's p of the sign test."""

    factor: str
    fell: int
    compared: int
    p: float


def directions(data: Points) -> tuple[Direction, ...]:
    """One-sided sign tests over neighbouring values of each factor."""
    counts = [_count_falls(data, column) for column in range(len(FACTORS))]
    raw = [float(stats.binomtest(fell, compared, alternative="greater").pvalue) for fell, compared in counts]
    order, adjusted, highest = np.argsort(raw), [0.0] * len(raw), 0.0
    for place, at in enumerate(order):
        highest = max(highest, min(1.0, raw[at] * (len(raw) - place)))
        adjusted[at] = highest
    return tuple(Direction(name, *count, p) for name, count, p in zip(FACTORS, counts, adjusted, strict=True))


def _count_falls(data: Points, column: int) -> tuple[int, int]:
    groups: dict[tuple[float, ...], list[tuple[float, float]]] = {}
    for row, value in zip(data.factors, data.y, strict=True):
        rest = tuple(np.delete(row, column))
        groups.setdefault(rest, []).append((float(row[column]), float(value)))
    fell = compared = 0
    for group in groups.values():
        ordered = [value for _, value in sorted(group)]
        fell += sum(after < before for before, after in pairwise(ordered))
        compared += len(ordered) - 1
    return fell, compared


@dataclass(frozen=True)
class FloorLaw:
    """y = E + A / (r^b D^d) at one size: floor, exponents with intervals, relative error of the fit.

    ``floor`` is None where the settings do not identify one: then the exponents are those of the law without a floor.
    """

    floor: float | None
    rank: Exponent
    rows: Exponent
    error: float


def fit_floor(data: Points) -> FloorLaw:
    """Fit the law with a floor; non-negative exponents are not forced.

    A floor is identified if the lower end of its 95 % interval is above `FLOOR_SHARE` of the smallest y. Otherwise E
    may be zero as well, the valley from there to the best fit is flat, and where a search stops in it is up to the
    processor's rounding: the law without a floor is fitted instead.
    """
    rows = _resampled_rows(data)
    # A search each: a tenth of the draws has to do.
    searched = np.array([_fit_floor(data.factors[drawn], data.y[drawn]) for drawn in rows[::10]])
    floor: float | None = None
    if np.quantile(np.exp(searched[:, 0]), 0.025) > FLOOR_SHARE * data.y.min():
        best, resampled = _fit_floor(data.factors, data.y), searched[:, 2:]
        floor, exponents, fitted = float(np.exp(best[0])), best[2:], _floor_law(best, data.factors)
    else:
        resampled = np.array([_slopes(data.factors[drawn], data.y[drawn])[1:] for drawn in rows])
        exponents = _slopes(data.factors, data.y)[1:]
        slope = _design(data.factors)[:, 2:] @ exponents
        fitted = np.exp(slope + np.mean(np.log(data.y) - slope))
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    rank, rows_exponent = (
        Exponent(name, float(exponents[at]), float(low[at]), float(high[at])) for at, name in enumerate(("r", "D"))
    )
    return FloorLaw(floor, rank, rows_exponent, float(np.sqrt(np.mean((fitted / data.y - 1) ** 2))))


def _resampled_rows(data: Points) -> list[npt.NDArray[np.int64]]:
    """Settings drawn with replacement, `RESAMPLES` times; draws of fewer than five of them tell no exponents."""
    draw = np.random.default_rng(0)
    found: list[npt.NDArray[np.int64]] = []
    while len(found) < RESAMPLES:
        rows = draw.integers(len(data.y), size=len(data.y))
        if len({tuple(row) for row in data.factors[rows][:, 1:]}) >= 5:
            found.append(rows)
    return found


def _floor_law(parameters: Floats, factors: Floats) -> Floats:
    log_floor, log_scale, rank, rows = parameters
    scaled = np.log(factors[:, 1:] / factors[:, 1:].mean(axis=0))
    return np.asarray(np.exp(log_floor) + np.exp(log_scale - rank * scaled[:, 0] - rows * scaled[:, 1]))


def _fit_floor(factors: Floats, y: Floats) -> Floats:
    start = np.array([np.log(y.min() * 0.7), np.log(np.ptp(y) + 0.3 * y.min()), 0.1, 0.3])
    found = optimize.least_squares(lambda given: np.log(_floor_law(given, factors)) - np.log(y), start, max_nfev=400)
    return np.asarray(found.x)
