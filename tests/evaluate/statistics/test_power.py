import math

import numpy as np
import pytest

from graftline.evaluate.statistics.error_rates import items_needed, paired_deviation, smallest_effect
from graftline.evaluate.statistics.proportions import PairedCounts, difference_p_value


@pytest.mark.parametrize(("margin", "published"), [(0.02, 3100), (0.01, 12400)])
def test_items_needed_equal_the_published_sample_sizes(margin: float, published: int) -> None:
    """METHODS §6: 20 % discordant, one-sided 5 %, power 80 %."""
    deviation = paired_deviation(0.20, 0.0)
    assert items_needed(deviation, margin, alpha=0.05) == pytest.approx(published, rel=0.01)


def test_the_deviation_of_a_paired_difference_is_that_of_its_three_values() -> None:
    values = np.array([1] * 30 + [-1] * 10 + [0] * 60)
    assert paired_deviation(0.4, 0.2) == pytest.approx(values.std())
    assert paired_deviation(0.04, 0.2) == 0.0


def test_the_smallest_effect_is_the_one_whose_items_needed_are_those_at_hand() -> None:
    effect = smallest_effect(0.4, 500, alpha=0.05)
    assert items_needed(0.4, effect, alpha=0.05) in (500, 501)
    assert items_needed(0.4, 0.0, alpha=0.05) == math.inf


def test_the_stated_power_is_reached_by_simulation() -> None:
    rng = np.random.default_rng(0)
    num_items = int(items_needed(paired_deviation(0.2, 0.0), 0.05, alpha=0.05))
    passed = 0
    for gained, lost, same in rng.multinomial(num_items, [0.1, 0.1, 0.8], size=1000):
        passed += difference_p_value(PairedCounts(same, gained, lost, 0), -0.05)[0] <= 0.05
    assert passed / 1000 == pytest.approx(0.8, abs=0.04)
