"""Numbers that summarize scores. Gates compare models item by item instead (`graftline.evaluate.gates`)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graftline.errors import EvaluationError
from graftline.evaluate.scores import AnswerScore, DocumentScore, ItemScore

NUM_CALIBRATION_BINS = 10


def accuracy(items: Sequence[ItemScore]) -> float:
    """Share of items whose most likely option is the right one."""
    _require(items)
    return sum(item.correct for item in items) / len(items)


def nll_per_token(rows: Sequence[ItemScore] | Sequence[DocumentScore]) -> float:
    """Nats a token: total NLL over total tokens, so long documents weigh more. Perplexity is its exponential."""
    _require(rows)
    return sum(row.nll for row in rows) / sum(row.num_tokens for row in rows)


def perplexity(rows: Sequence[ItemScore] | Sequence[DocumentScore]) -> float:
    """exp(NLL a token)."""
    return math.exp(nll_per_token(rows))


def stop_rate(rows: Sequence[ItemScore] | Sequence[AnswerScore]) -> float:
    """Share of answers after which the model ends.

    Raises:
        EvaluationError: stops were not measured for some items.
    """
    _require(rows)
    unknown = [row.item_id for row in rows if row.stop is None]
    if unknown:
        raise EvaluationError(
            f"whether the model stops was not measured for {len(unknown)} items, such as {unknown[0]}; "
            "score with stop_ids"
        )
    return sum(bool(row.stop) for row in rows) / len(rows)


def confusion(items: Sequence[ItemScore], num_labels: int) -> list[list[int]]:
    """Counts by gold label (row) and chosen label (column)."""
    counts = [[0] * num_labels for _ in range(num_labels)]
    for item in items:
        counts[item.gold][item.chosen] += 1
    return counts


@dataclass(frozen=True)
class LabelMetrics:
    """One label: how many items have it, and precision, recall and F1 (0 where undefined)."""

    label: str
    num_items: int
    precision: float
    recall: float
    f1: float


def by_label(items: Sequence[ItemScore], labels: Sequence[str]) -> list[LabelMetrics]:
    """Precision, recall and F1 of each label, in the order of ``labels``."""
    counts = np.array(confusion(items, len(labels)))
    found = []
    for index, label in enumerate(labels):
        right, gold, chosen = int(counts[index, index]), int(counts[index].sum()), int(counts[:, index].sum())
        precision, recall = right / chosen if chosen else 0.0, right / gold if gold else 0.0
        f1 = 2 * right / (gold + chosen) if gold + chosen else 0.0
        found.append(LabelMetrics(label, gold, precision, recall, f1))
    return found


def macro_f1(items: Sequence[ItemScore], labels: Sequence[str]) -> float:
    """Mean F1 over the labels that occur as gold or as choice."""
    _require(items)
    occurring = {item.gold for item in items} | {item.chosen for item in items}
    per_label = by_label(items, labels)
    return sum(per_label[index].f1 for index in occurring) / len(occurring)


@dataclass(frozen=True)
class CalibrationBin:
    """Items by confidence: the bin's bounds, such as ``0.9-1.0``, mean confidence and accuracy within it."""

    name: str
    num_items: int
    confidence: float
    accuracy: float


def confidences(items: Sequence[ItemScore]) -> list[float]:
    """Probability of the chosen option among the options (softmax of the log-likelihoods)."""
    found = []
    for item in items:
        scores = np.array(item.log_likelihoods)
        found.append(float(1 / np.exp(scores - scores[item.chosen]).sum()))
    return found


def calibration(items: Sequence[ItemScore], *, num_bins: int = NUM_CALIBRATION_BINS) -> list[CalibrationBin]:
    """Bins of equal width over confidence in (0, 1]; empty ones are left out."""
    _require(items)
    confidence = np.array(confidences(items))
    correct = np.array([item.correct for item in items], dtype=float)
    places = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    bins = []
    for place in range(num_bins):
        inside = places == place
        if inside.any():
            name = f"{place / num_bins:.1f}-{(place + 1) / num_bins:.1f}"
            found = int(inside.sum()), float(confidence[inside].mean()), float(correct[inside].mean())
            bins.append(CalibrationBin(name, *found))
    return bins


def expected_calibration_error(items: Sequence[ItemScore], *, num_bins: int = NUM_CALIBRATION_BINS) -> float:
    """Mean distance of accuracy and confidence over bins, weighted by items (Guo et al. 2017)."""
    bins = calibration(items, num_bins=num_bins)
    return sum(found.num_items * abs(found.accuracy - found.confidence) for found in bins) / len(items)


def _require(rows: Sequence[object]) -> None:
    if not rows:
        raise EvaluationError("there is nothing scored here; a metric needs at least one item: evaluate first")
