"""Two models right or wrong on the same items: tests and intervals for the difference of two paired proportions.

Sources: McNemar 1947; Fagerland, Lydersen, Laake 2013 (mid-p); Wilson 1927; Tango 1998, Stat.
Med. 17:891 (score interval); Clopper and Pearson 1934.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.optimize import brentq
from scipy.stats import binom, norm

from graftline.errors import EvaluationError

EXACT_BELOW_DISCORDANT = 10
"""With fewer discordant items than this, a gate uses the exact binomial distribution (METHODS §6)."""
_EXACT_MCNEMAR_BELOW = 25
_EDGE = 1e-12


@dataclass(frozen=True)
class PairedCounts:
    """Items by outcome: right in both, ``gained`` (candidate only), ``lost`` (reference only), wrong in both."""

    both: int
    gained: int
    lost: int
    neither: int

    def __post_init__(self) -> None:
        if min(self.both, self.gained, self.lost, self.neither) < 0 or self.total == 0:
            raise EvaluationError(f"paired counts {self} are not counts of at least one item")

    @property
    def total(self) -> int:
        """Number of items."""
        return self.both + self.gained + self.lost + self.neither

    @property
    def discordant(self) -> int:
        """Items that only one of the two got right."""
        return self.gained + self.lost

    @property
    def difference(self) -> float:
        """Candidate's proportion minus the reference's."""
        return (self.gained - self.lost) / self.total


def count_pairs(candidate: Sequence[bool], reference: Sequence[bool]) -> PairedCounts:
    """Cross-tabulate two lists of right or wrong, in the same order of items."""
    pairs = list(zip(candidate, reference, strict=True))
    counts = {cell: 0 for cell in ((True, True), (True, False), (False, True), (False, False))}
    for ours, theirs in pairs:
        counts[bool(ours), bool(theirs)] += 1
    return PairedCounts(counts[True, True], counts[True, False], counts[False, True], counts[False, False])


def mcnemar_exact(counts: PairedCounts) -> float:
    """Two-sided exact p-value of "as many gained as lost": min(1, 2 P(Bin(m, 1/2) <= min(gained, lost)))."""
    if counts.discordant == 0:
        return 1.0
    return min(1.0, 2 * float(binom.cdf(min(counts.gained, counts.lost), counts.discordant, 0.5)))


def mcnemar_mid_p(counts: PairedCounts) -> float:
    """Two-sided mid-p: the exact p-value less the probability of the observed split (all of it counted half, twice)."""
    if counts.discordant == 0:
        return 1.0
    smaller = min(counts.gained, counts.lost)
    twice_tail = 2 * float(binom.cdf(smaller, counts.discordant, 0.5))
    return min(1.0, twice_tail - float(binom.pmf(smaller, counts.discordant, 0.5)))


def mcnemar(counts: PairedCounts) -> float:
    """Two-sided p-value of "no difference": exact with fewer than 25 discordant items, mid-p from there on."""
    return mcnemar_exact(counts) if counts.discordant < _EXACT_MCNEMAR_BELOW else mcnemar_mid_p(counts)


def wilson_interval(successes: int, total: int, *, alpha: float) -> tuple[float, float]:
    """Two-sided 1 - alpha score interval of one proportion (Wilson 1927)."""
    z = float(norm.isf(alpha / 2))
    center = (successes + z * z / 2) / (total + z * z)
    half = z / (total + z * z) * math.sqrt(successes * (total - successes) / total + z * z / 4)
    return max(0.0, center - half), min(1.0, center + half)


def tango_score(counts: PairedCounts, difference: float) -> float:
    """Score statistic for "the true difference is ``difference``": standard normal if it is, positive above it.

    z = (gained - lost - n d) / sqrt(n (2 q + d (1 - d))), q the constrained estimate of P(lost) (Tango 1998, eq. 3).
    """
    n, b, c, d = counts.total, counts.gained, counts.lost, difference
    quadratic, linear, constant = 2 * n, -b - c + (2 * n - b + c) * d, -c * d * (1 - d)
    root = math.sqrt(max(0.0, linear * linear - 4 * quadratic * constant))
    lost_share = (root - linear) / (2 * quadratic)
    variance = n * (2 * lost_share + d * (1 - d))
    distance = b - c - n * d
    if variance <= _EDGE * n:
        return 0.0 if abs(distance) < _EDGE * n else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def tango_interval(counts: PairedCounts, *, alpha: float) -> tuple[float, float]:
    """Two-sided 1 - alpha score interval of the difference: all d with an absolute z(d) below the normal quantile."""
    z, estimate = float(norm.isf(alpha / 2)), counts.difference

    def limit(sign: int) -> float:
        edge = sign * (1 - _EDGE)
        if sign * (estimate - edge) >= 0 or sign * (tango_score(counts, edge) + sign * z) > 0:
            return float(sign)
        return float(brentq(lambda d: tango_score(counts, d) + sign * z, estimate, edge, xtol=1e-12))

    return limit(-1), limit(1)


def difference_p_value(counts: PairedCounts, bound: float) -> tuple[float, str]:
    """One-sided p-value of H0 "the true difference is at most ``bound``", and the name of the test.

    With few discordant items: for a bound below 0, P(Bin(n, -bound) <= lost), since the difference is never below
    -P(lost); for 0, McNemar's exact test. Otherwise Tango's score.
    """
    if counts.discordant < EXACT_BELOW_DISCORDANT and bound < 0:
        return float(binom.cdf(counts.lost, counts.total, min(1.0, -bound))), "exact binomial"
    if counts.discordant < EXACT_BELOW_DISCORDANT and bound == 0:
        return float(binom.sf(counts.gained - 1, counts.discordant, 0.5)), "exact McNemar"
    return float(norm.sf(tango_score(counts, bound))), "Tango score"


def few_units_p_value(total: int, *, below: int, above: int, fall: float) -> float:
    """One-sided p-value of H0 "the mean is at least ``fall`` below the usual value", which hardly any unit lacks.

    A bootstrap of such units has next to no spread and is far too sure of itself. Whatever a unit below the usual value
    loses, it is at most 1, so the loss is at most the share of such units: P(Bin(total, fall) <= below), as for paired
    items in `difference_p_value`. For a fall of 0, the sign test of the units that differ.

    Args:
        total: units drawn independently, such as clusters of rows.
        below: units whose value is below the usual one.
        above: units whose value is above it.
        fall: in units of the largest loss that a unit can have; negative: this bound says nothing (p-value 0).
    """
    if fall < 0:
        return 0.0
    if fall == 0:
        return float(binom.sf(above - 1, above + below, 0.5))
    return float(binom.cdf(below, total, min(1.0, fall)))


def rate_p_value(successes: int, total: int, bound: float) -> float:
    """Exact one-sided p-value of H0 "the true proportion is at most ``bound``": P(Bin(n, bound) >= successes)."""
    if not 0 <= successes <= total or total == 0:
        raise EvaluationError(f"{successes} successes of {total} items are not counts of at least one item")
    return float(binom.sf(successes - 1, total, min(1.0, max(0.0, bound))))
