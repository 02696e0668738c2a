"""Macro-F1 as values a row: their mean is macro-F1, their differences are exact and 0 where two models choose alike."""

import random

import numpy as np
import pytest
from scipy import stats

from graftline.digest import of_bytes
from graftline.evaluate.gate_rules import paired_samples, sample
from graftline.evaluate.macro_f1 import paired_values, values_of
from graftline.evaluate.metrics import macro_f1
from graftline.evaluate.scores import ItemScore, Scores

LABELS = ("a", "b", "c", "d")


def items(gold: list[int], chosen: list[int]) -> list[ItemScore]:
    found = []
    for at, (right, choice) in enumerate(zip(gold, chosen, strict=True)):
        values = tuple(-0.1 if option == choice else -3.0 for option in range(len(LABELS)))
        found.append(ItemScore(f"{at:05}", values, choice, right, choice == right, -values[right], 1))
    return found


def drawn(draw: random.Random, count: int, quality: float, weights: tuple[int, ...]) -> tuple[list[int], list[int]]:
    gold = draw.choices(range(4), weights, k=count)
    return gold, [one if draw.random() < quality else draw.choices(range(4), weights)[0] for one in gold]


@pytest.mark.parametrize("seed", range(5))
def test_means_are_macro_f1_and_differences_are_exact(seed: int):
    draw = random.Random(seed)
    gold, first = drawn(draw, 80, 0.7, (5, 3, 2, 1))
    second = [one if draw.random() < 0.8 else draw.randrange(4) for one in first]
    ours, theirs = items(gold, first), items(gold, second)
    assert values_of(ours).mean() == pytest.approx(macro_f1(ours, LABELS), abs=1e-12)
    a, b = paired_values(ours, theirs)
    assert a.mean() - b.mean() == pytest.approx(macro_f1(ours, LABELS) - macro_f1(theirs, LABELS), abs=1e-12)
    same = np.array(first) == np.array(second)
    assert np.abs((a - b)[same]).max() < 1e-12
    assert np.abs((a - b)[~same]).min() > 0.01


def test_samples_are_paired_by_item():
    gold, first = drawn(random.Random(1), 60, 0.7, (1, 1, 1, 1))
    ours = Scores(of_bytes(b""), LABELS, tuple(items(gold, first)))
    theirs = Scores(of_bytes(b""), LABELS, tuple(reversed(items(gold, [0] * 60))))
    a, b = paired_samples(ours, theirs, "macro_f1")
    assert a.ids == b.ids
    assert b.values == sample(theirs, "macro_f1").values
    assert a.mean == pytest.approx(sample(ours, "macro_f1").mean)


def test_intervals_of_the_difference_cover_as_often_as_they_say():
    """300 samples of 150 rows with a rare class: the mean difference of many is where 95 % of t intervals lie."""
    draw, found = random.Random(2), []
    for _ in range(300):
        gold, first = drawn(draw, 150, 0.75, (6, 3, 2, 1))
        second = [one if draw.random() < 0.7 else draw.randrange(4) for one in gold]
        a, b = paired_values(items(gold, first), items(gold, second))
        difference = a - b
        found.append((difference.mean(), stats.sem(difference)))
    truth = np.mean([mean for mean, _ in found])
    covered = np.mean([abs(mean - truth) < 1.96 * error for mean, error in found])
    assert 0.91 < covered < 0.985
