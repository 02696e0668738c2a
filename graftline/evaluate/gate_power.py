"""How often a gate passes a candidate as good as what it is compared with, and what to say if that is seldom."""

from functools import lru_cache, partial

from graftline.evaluate.gate_rules import Kind
from graftline.evaluate.statistics.power import (
    DEFAULT_POWER,
    Power,
    enough,
    equal_candidate_power,
    equal_mean_power,
)

POWER_TESTS = ("non-inferiority", "equivalence")
"""Tests that an equal candidate should pass; `superiority` asks for more than that."""


@lru_cache(maxsize=4096)
def gate_power(kind: Kind, test: str, margin: float, num_items: int, *, spread: float, alpha: float) -> Power:
    """The power of a gate with one of `POWER_TESTS`.

    Args:
        kind: what the metric is.
        test: of the gate.
        margin: of the gate, in the metric's unit.
        num_items: that both models are scored on.
        spread: of a rate, the share of items on which two equal models differ; of a mean, the standard deviation of one
            item's difference.
        alpha: the gate's own.
    """
    two_sided = test == "equivalence"
    if kind == "rate":
        rate = partial(equal_candidate_power, discordant_share=spread, alpha=alpha, two_sided=two_sided)
        return enough(rate, margin, num_items)
    mean = partial(equal_mean_power, deviation=spread, alpha=alpha, two_sided=two_sided)
    return enough(mean, margin, num_items)


def weakness(power: Power, margin: float, num_items: int) -> str | None:
    """How often an equal candidate passes, and the margin or the items that would make it 8 of 10; None if it does."""
    if power.value >= DEFAULT_POWER:
        return None
    cures = []
    if power.margin is not None:
        cures.append(f"a margin of {power.margin:g} with {num_items} items")
    if power.num_items is not None:
        cures.append(f"about {power.num_items:,} items with the margin of {margin:g}")
    would = f"; {' or '.join(cures)} would make it 8 of 10" if cures else ""
    return f"a candidate that is exactly as good passes this gate {power.value:.0%} of the time{would}"
