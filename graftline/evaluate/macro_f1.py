"""Macro-F1 as values a row, so that the tests of means judge it: exact in the estimate, linearized in its deviation.

With 2·hits h (a class that is right and chosen counts 2) and sizes s (1 for being right, 1 for being chosen), a class's
F1 is r = Σh / Σs, and macro-F1 is the mean of r over the classes that the rows have. A row's value is

    v_i = mean_k [ r_k + (h_ik − r_k s_ik) / mean(s_k) ],    whose mean is macro-F1,

and for two models a and b on the same rows, with r̄ and s̄ the means of both models' r and mean(s),

    v_i(a) − v_i(b) = mean_k [ ((h_aik − h_bik) − r̄_k (s_aik − s_bik)) / s̄_k ],

whose mean is the difference exactly (r_a S_a − r_b S_b = r̄ (S_a − S_b) + (r_a − r_b) S̄), and which is 0 for rows that
both models answer alike. Both are a ratio's linearization (delta method).

Shapes: N rows, K classes that the rows have.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from graftline.evaluate.scores import ItemScore

Floats = NDArray[np.float64]


def values_of(items: Sequence[ItemScore]) -> Floats:
    """(N,) values whose mean is macro-F1."""
    hits_NK, sizes_NK = _counts(items)
    f1_K, mean_K = hits_NK.sum(0) / sizes_NK.sum(0), sizes_NK.mean(0)
    found: Floats = (f1_K + (hits_NK - f1_K * sizes_NK) / mean_K).mean(1)
    return found


def paired_values(candidate: Sequence[ItemScore], reference: Sequence[ItemScore]) -> tuple[Floats, Floats]:
    """(N,) values of two models on the same rows in the same order; equal where they choose alike."""
    ours, our_sizes = _counts(candidate)
    theirs, their_sizes = _counts(reference)
    mean_f1_K = (ours.sum(0) / our_sizes.sum(0) + theirs.sum(0) / their_sizes.sum(0)) / 2
    mean_size_K = (our_sizes.mean(0) + their_sizes.mean(0)) / 2
    difference_N = (((ours - theirs) - mean_f1_K * (our_sizes - their_sizes)) / mean_size_K).mean(1)
    second = values_of(reference)
    return second + difference_N, second


def _counts(items: Sequence[ItemScore]) -> tuple[Floats, Floats]:
    gold, chosen = (np.array([getattr(item, name) for item in items]) for name in ("gold", "chosen"))
    classes = np.unique(gold)
    is_gold, is_chosen = (each[:, None] == classes for each in (gold, chosen))
    return 2.0 * (is_gold & is_chosen), is_gold.astype(float) + is_chosen
