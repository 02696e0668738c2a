"""Errors of both kinds: several tests at once, and what a sample can show."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import binom, norm, t

from graftline.errors import EvaluationError
from graftline.evaluate.statistics.proportions import PairedCounts, difference_p_value

# Several tests at once (Holm 1979), and equivalence as two one-sided tests (Schuirmann 1987).


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values: the i-th smallest of m (from 0) times m - i, made monotone, at most 1.

    The probability of any false rejection among those with an adjusted p-value at most alpha is at most alpha.
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def equivalence_p_value(p_not_below: float, p_not_above: float) -> float:
    """Two one-sided tests: the larger of the two p-values ("at most the low bound", "at least the high bound")."""
    return max(p_not_below, p_not_above)


def paired_tost(differences: npt.ArrayLike, low: float, high: float) -> float:
    """p-value of H0 "the mean difference lies outside of (low, high)", by two one-sided paired t-tests.

    Raises:
        EvaluationError: fewer than two differences, or bounds in the wrong order.
    """
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or len(d) < 2 or not low < high:
        raise EvaluationError(f"{d.size} differences with bounds {low} and {high}; at least two and low < high needed")
    mean, error = float(d.mean()), float(d.std(ddof=1)) / len(d) ** 0.5
    if error == 0:
        return 0.0 if low < mean < high else 1.0
    above_low = float(t.sf((mean - low) / error, len(d) - 1))
    below_high = float(t.cdf((mean - high) / error, len(d) - 1))
    return equivalence_p_value(above_low, below_high)


# What a sample can show: the smallest effect, the items that an effect needs, and how often an equal candidate passes.
#
# n = (z_{1-alpha} + z_{power})^2 sd^2 / effect^2, with sd the standard deviation of one item's paired difference; for
# right or wrong items sd^2 = P(discordant) - difference^2 (METHODS §6). The normal approximation, one-sided.
#
# How often an equal candidate passes is computed from the gates' own test where items are right or wrong: over all
# numbers D of discordant items, D ~ Bin(n, share), of which the candidate gains Bin(D, 1/2).

DEFAULT_POWER = 0.8
ASSUMED_DISCORDANT_SHARE = 0.05
"""Share of items on which two equally good models differ, where nothing was observed yet."""
_FEWEST_DISCORDANT = 10
"""With fewer items than this that went either way, their share is not known well enough to be taken."""
_EXACT_UP_TO_ITEMS = 2_000
_TAIL = 1e-9
_MOST_ITEMS = 10**9


@dataclass(frozen=True)
class Power:
    """How often a gate passes an equal candidate, and what would make that 8 of 10 times.

    ``margin`` (with these items) and ``num_items`` (with this margin) are None where ``value`` suffices, or where none
    does.
    """

    value: float
    margin: float | None = None
    num_items: int | None = None


def smallest_effect(deviation: float, num_items: int, *, alpha: float, power: float = DEFAULT_POWER) -> float:
    """The distance from the bound that is shown with the given power."""
    return _quantiles(alpha, power) * deviation / math.sqrt(num_items)


def items_needed(deviation: float, effect: float, *, alpha: float, power: float = DEFAULT_POWER) -> float:
    """How many items show a distance ``effect`` from the bound; infinite for an effect of 0."""
    if effect == 0:
        return math.inf
    return math.ceil((_quantiles(alpha, power) * deviation / effect) ** 2)


def paired_deviation(discordant_share: float, difference: float) -> float:
    """Standard deviation of one item's difference of right or wrong."""
    return math.sqrt(max(0.0, discordant_share - difference**2))


def equal_discordant_share(counts: PairedCounts) -> float:
    """The share of items on which an equal candidate would differ, from what a candidate did.

    Twice the smaller of gained and lost: what a better or worse candidate gained or lost on balance is left out. Never
    less than 10 items or 5 %, whichever is less.
    """
    observed = 2 * min(counts.gained, counts.lost) / counts.total
    return max(observed, min(ASSUMED_DISCORDANT_SHARE, _FEWEST_DISCORDANT / counts.total))


def equal_candidate_power(
    margin: float, num_items: int, *, discordant_share: float, alpha: float, two_sided: bool = False
) -> float:
    """How often a candidate with the reference's own rate is shown to be not worse by ``margin`` or more.

    Args:
        margin: of the gate, above 0 to be of any use.
        num_items: right or wrong items that both models answer.
        discordant_share: share of them on which the two differ, half of it either way.
        alpha: one-sided error of the gate.
        two_sided: equivalence: not better by ``margin`` or more either.

    Returns:
        A probability: of the exact distribution of gained and lost items under the gates' test up to 2,000 items, of
        its normal approximation above.
    """
    if num_items > _EXACT_UP_TO_ITEMS:
        deviation = math.sqrt(discordant_share)
        return equal_mean_power(margin, num_items, deviation=deviation, alpha=alpha, two_sided=two_sided)
    least, most = (int(edge) for edge in binom.ppf([_TAIL, 1 - _TAIL], num_items, discordant_share))
    discordant, fewest = np.arange(least, most + 1), [least // 2]
    for count in discordant.tolist():
        fewest.append(_fewest_gained(count, num_items, margin=margin, alpha=alpha, guess=fewest[-1]))
    too_few = np.array(fewest[1:]) - 1
    passing = binom.sf(too_few, discordant, 0.5)
    if two_sided:  # as many lost as gained, so that as few items more are allowed
        passing = np.maximum(0.0, passing - binom.cdf(too_few, discordant, 0.5))
    return min(1.0, float(binom.pmf(discordant, num_items, discordant_share) @ passing))


def _fewest_gained(discordant: int, num_items: int, *, margin: float, alpha: float, guess: int) -> int:
    """Of so many discordant items, how many must be gained for the gate to pass; one more than all if none suffice.

    Each discordant item more moves the answer by one at most, so that the search starts at the last answer.
    """

    def passes(gained: int) -> bool:
        counts = PairedCounts(num_items - discordant, gained, discordant - gained, 0)
        return difference_p_value(counts, -margin)[0] <= alpha

    gained = min(guess, discordant)
    while gained > 0 and passes(gained - 1):
        gained -= 1
    while gained <= discordant and not passes(gained):
        gained += 1
    return gained


def equal_mean_power(
    margin: float, num_items: int, *, deviation: float, alpha: float, two_sided: bool = False
) -> float:
    """`equal_candidate_power` for means, by the normal approximation; ``deviation``: of one item's difference."""
    if deviation == 0:
        return float(margin > 0)
    passing = float(norm.cdf(margin * math.sqrt(num_items) / deviation - norm.isf(alpha)))
    return max(0.0, 2 * passing - 1) if two_sided else passing


def enough(power: Callable[[float, int], float], margin: float, num_items: int) -> Power:
    """The power of a gate, and if it is below 0.8 the margin or the items that would do.

    Args:
        power: of a margin and a number of items; it grows with both.
        margin: of the gate.
        num_items: that it has.
    """
    value = power(margin, num_items)
    if value >= DEFAULT_POWER:
        return Power(value)
    step = 10 ** (math.floor(math.log10(margin)) - 1) if margin > 0 else 0.001
    steps = first_that_holds(lambda count: power(count * step, num_items) >= DEFAULT_POWER, most=10**6)
    items = first_that_holds(lambda count: power(margin, count) >= DEFAULT_POWER) if margin > 0 else None
    return Power(value, None if steps is None else round(steps * step, 12), items)


def first_that_holds(holds: Callable[[int], bool], *, most: int = _MOST_ITEMS) -> int | None:
    """The smallest number that holds, to 2 %, where every larger one holds too; None if ``most`` does not."""
    high = 1
    while not holds(high):
        if high >= most:
            return None
        high = min(most, 2 * high)
    low = high // 2
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _quantiles(alpha: float, power: float) -> float:
    return float(norm.isf(alpha) + norm.ppf(power))
