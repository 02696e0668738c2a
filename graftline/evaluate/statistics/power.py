"""What a sample can show: the smallest effect, and the items that an effect needs. Normal approximation, one-sided.

n = (z_{1-alpha} + z_{power})^2 sd^2 / effect^2, with sd the standard deviation of one item's paired difference; for
right or wrong items sd^2 = P(discordant) - difference^2 (METHODS §6).
"""

import math

from scipy.stats import norm

DEFAULT_POWER = 0.8


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


def _quantiles(alpha: float, power: float) -> float:
    return float(norm.isf(alpha) + norm.ppf(power))
