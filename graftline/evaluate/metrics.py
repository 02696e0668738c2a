"""Numbers that summarize scores and answers. Gates compare models item by item instead (`graftline.evaluate.gates`)."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftline.errors import EvaluationError
from graftline.evaluate.scores import AnswerScore, DocumentScore, ItemScore, Scores
from graftline.evaluate.words import characters, words

NUM_CALIBRATION_BINS = 10


def accuracy(items: Sequence[ItemScore]) -> float:
    """Share of items whose most likely option is the correct one."""
    _require(items)
    return sum(item.correct for item in items) / len(items)


def nll_per_token(rows: Sequence[ItemScore] | Sequence[DocumentScore]) -> float:
    """NLL in nats per token: total NLL over total tokens, so long documents weigh more. Perplexity = exp(NLL)."""
    _require(rows)
    return sum(row.nll for row in rows) / sum(row.num_tokens for row in rows)


def perplexity(rows: Sequence[ItemScore] | Sequence[DocumentScore]) -> float:
    """exp(NLL per token)."""
    return math.exp(nll_per_token(rows))


def stop_rate(rows: Sequence[ItemScore] | Sequence[AnswerScore]) -> float:
    """Share of answers after which the model stops.

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
    """One label: its number of items, and precision, recall and F1 (0 where undefined)."""

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
    """One confidence bin: its bounds, such as ``0.9-1.0``, number of items, mean confidence and accuracy."""

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
    """Equal-width bins over confidence in (0, 1], without the empty ones."""
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
    """Mean absolute difference of accuracy and confidence over bins, weighted by items (Guo et al. 2017)."""
    bins = calibration(items, num_bins=num_bins)
    return sum(found.num_items * abs(found.accuracy - found.confidence) for found in bins) / len(items)


def _require(rows: Sequence[object]) -> None:
    if not rows:
        raise EvaluationError("there is nothing scored here; a metric needs at least one item: evaluate first")


# An evaluation as numbers for metrics.json, with details behind the accuracy: confusion by label, calibration.


def summarize(scores: Scores) -> dict[str, Any]:
    """Numbers by name; ``labels`` and ``calibration`` are tables, present only if labels were scored.

    ``labels``: number of items, precision, recall, F1 and chosen labels with counts, by label. ``calibration``: number
    of items, mean confidence and accuracy for each non-empty tenth of confidence, such as ``"0.9-1.0"``.
    """
    summary: dict[str, Any] = {}
    if scores.items:
        summary |= _labels(scores) if scores.labels else {}
        summary |= {"nll": nll_per_token(scores.items), "perplexity": perplexity(scores.items)}
        if any(item.stop is not None for item in scores.items):  # a head for classes writes nothing that could end
            summary |= {"option_stop_rate": stop_rate(scores.items)}
    if scores.documents:
        summary |= {
            "forgetting_nll": nll_per_token(scores.documents),
            "forgetting_perplexity": perplexity(scores.documents),
        }
    if scores.general:
        summary["general_accuracy"] = accuracy(scores.general)
    if scores.answers:
        means = {
            name: sum(getattr(answer, name) for answer in scores.answers) / len(scores.answers)
            for name in ("exact_match", "f1", "rouge_l")
        }
        summary |= means | {"stop_rate": stop_rate(scores.answers)}
        for name in scores.answers[0].own:
            summary[name] = sum(answer.own[name] for answer in scores.answers) / len(scores.answers)
    return summary | dict(scores.numbers)


def _labels(scores: Scores) -> dict[str, Any]:
    counts = confusion(scores.items, len(scores.labels))
    labels = {
        found.label: {
            "items": found.num_items,
            "precision": found.precision,
            "recall": found.recall,
            "f1": found.f1,
            "chosen": {other: count for other, count in zip(scores.labels, row, strict=True) if count},
        }
        for found, row in zip(by_label(scores.items, scores.labels), counts, strict=True)
    }
    return {
        "accuracy": accuracy(scores.items),
        "macro_f1": macro_f1(scores.items, scores.labels),
        "class_nll": sum(item.class_nll for item in scores.items) / len(scores.items),
        "calibration_error": expected_calibration_error(scores.items),
        "labels": labels,
        "calibration": {
            found.name: {"items": found.num_items, "confidence": found.confidence, "accuracy": found.accuracy}
            for found in calibration(scores.items)
        },
    }


# A generated answer against reference texts: exact match, token F1 and ROUGE-L.
#
# Sources: Rajpurkar et al. 2016 (SQuAD v1.1), Lin 2004 (ROUGE-L, F with beta = 1, no stemming). Normalization:
# `graftline.evaluate.words`. In scripts without spaces between words, every letter counts as a word for F1 and ROUGE-L,
# as in the evaluations of MLQA and CMRC. With several references, each measure uses its best one.


def normalize(text: str) -> str:
    """The text's words joined by single spaces: the form that `exact_match` compares."""
    return " ".join(words(text))


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1.0 if the normalized answer equals a normalized reference, else 0.0."""
    return _best(answer, references, lambda a, b: float(normalize(a) == normalize(b)))


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over the bags of words; 1.0 if both are empty."""
    return _best(answer, references, _token_f1)


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """ROUGE-L F: precision and recall of the longest common subsequence of words, articles included."""
    return _best(answer, references, _rouge_l)


def _best(answer: str, references: Sequence[str], measure: Callable[[str, str], float]) -> float:
    if not references:
        raise EvaluationError("an answer has no reference to be compared with; give at least one")
    return max(measure(answer, reference) for reference in references)


def _token_f1(answer: str, reference: str) -> float:
    ours, theirs = ([one for word in words(text) for one in characters(word)] for text in (answer, reference))
    if not ours or not theirs:
        return float(ours == theirs)
    return _f1((Counter(ours) & Counter(theirs)).total(), len(ours), len(theirs))


def _rouge_l(answer: str, reference: str) -> float:
    ours, theirs = (
        [one for word in words(text, articles=True, joined=False) for one in characters(word)]
        for text in (answer, reference)
    )
    if not ours or not theirs:
        return float(ours == theirs)
    return _f1(_common_subsequence(ours, theirs), len(ours), len(theirs))


def _f1(shared: int, num_ours: int, num_theirs: int) -> float:
    return 2 * shared / (num_ours + num_theirs)


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence.

    Source: Hyyrö 2004. Each row of the usual table is one integer, whose zeros are the places where it grows: two
    answers of 30,000 words take a second, not an hour.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    every = (1 << len(first)) - 1
    row = every
    for word in second:
        shared = row & places.get(word, 0)
        row = (row + shared | row - shared) & every
    return len(first) - row.bit_count()
