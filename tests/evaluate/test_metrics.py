import itertools
import math

import numpy as np
import pytest

from graftline.errors import EvaluationError
from graftline.evaluate.metrics import (
    accuracy,
    by_label,
    calibration,
    confidences,
    confusion,
    expected_calibration_error,
    macro_f1,
    nll_per_token,
    perplexity,
    stop_rate,
)
from graftline.evaluate.scores import DocumentScore, ItemScore

LABELS = ("a", "b", "c")


def item(gold: int, chosen: int, *, confidence: float = 0.8, index: int = 0) -> ItemScore:
    rest = math.log((1 - confidence) / 2)
    scores = tuple(math.log(confidence) if i == chosen else rest for i in range(3))
    return ItemScore(f"{index}", scores, chosen, gold, gold == chosen, -scores[gold], 2, gold == chosen)


ITEMS = [item(0, 0), item(0, 1), item(1, 1), item(1, 1), item(1, 0), item(0, 0)]


def test_accuracy_and_confusion_count_items() -> None:
    assert accuracy(ITEMS) == pytest.approx(4 / 6)
    assert confusion(ITEMS, 3) == [[2, 1, 0], [1, 2, 0], [0, 0, 0]]


def test_each_label_has_precision_recall_and_f1() -> None:
    first, _, unused = by_label([*ITEMS, item(2, 0)], LABELS)
    assert (first.num_items, first.precision, first.recall) == (3, pytest.approx(2 / 4), pytest.approx(2 / 3))
    assert first.f1 == pytest.approx(2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))
    assert (unused.num_items, unused.precision, unused.recall, unused.f1) == (1, 0.0, 0.0, 0.0)


def test_macro_f1_leaves_out_labels_that_do_not_occur() -> None:
    assert macro_f1(ITEMS, LABELS) == pytest.approx(2 / 3)


def test_nll_weighs_documents_by_tokens() -> None:
    documents = [DocumentScore("a", 10.0, 10), DocumentScore("b", 90.0, 30)]
    assert nll_per_token(documents) == pytest.approx(2.5)
    assert perplexity(documents) == pytest.approx(math.exp(2.5))


def test_stop_rate_counts_only_when_every_item_was_measured() -> None:
    assert stop_rate(ITEMS) == pytest.approx(4 / 6)
    unknown = ItemScore("x", (-1.0,), 0, 0, True, 1.0, 1)
    with pytest.raises(EvaluationError, match="1 items, such as x"):
        stop_rate([*ITEMS, unknown])


def test_confidence_is_the_softmax_of_the_chosen_option() -> None:
    assert confidences([item(0, 1, confidence=0.7)]) == [pytest.approx(0.7)]


def test_a_calibrated_model_has_no_calibration_error_and_a_boastful_one_has() -> None:
    right = [item(0, 0, confidence=0.75)] * 75 + [item(1, 0, confidence=0.75)] * 25
    assert expected_calibration_error(right) == pytest.approx(0.0, abs=1e-9)
    boastful = [item(0, 0, confidence=0.95)] * 50 + [item(1, 0, confidence=0.95)] * 50
    assert expected_calibration_error(boastful) == pytest.approx(0.45)


def test_calibration_bins_hold_every_item_once() -> None:
    rng = np.random.default_rng(0)
    items = [item(0, 0, confidence=c) for c in [1.0 - 1e-12, 0.4, *rng.uniform(0.34, 1, 50)]]
    bins = calibration(items, num_bins=5)
    assert sum(found.num_items for found in bins) == 52
    assert all(a.confidence < b.confidence for a, b in itertools.pairwise(bins))


@pytest.mark.parametrize("metric", [accuracy, nll_per_token, stop_rate, calibration])
def test_nothing_scored_is_refused(metric) -> None:
    with pytest.raises(EvaluationError, match="nothing scored"):
        metric([])
