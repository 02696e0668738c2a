"""An evaluation as numbers for metrics.json, and what stands behind the accuracy: confusion by label, calibration."""

from typing import Any

from graftline.evaluate.metrics import (
    accuracy,
    by_label,
    calibration,
    confusion,
    expected_calibration_error,
    macro_f1,
    nll_per_token,
    perplexity,
    stop_rate,
)
from graftline.evaluate.scores import Scores


def summarize(scores: Scores) -> dict[str, Any]:
    """Numbers by name; ``labels`` and ``calibration`` are tables and there only where labels were scored.

    ``labels``: for each label its items, precision, recall, F1 and what was chosen for them, by label. ``calibration``:
    for each tenth of confidence that has items, ``"0.9-1.0"``, their number, mean confidence and accuracy.
    """
    summary: dict[str, Any] = {}
    if scores.items:
        summary |= _labels(scores) if scores.labels else {}
        summary |= {"nll": nll_per_token(scores.items), "perplexity": perplexity(scores.items)}
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
        "calibration_error": expected_calibration_error(scores.items),
        "labels": labels,
        "calibration": {
            found.name: {"items": found.num_items, "confidence": found.confidence, "accuracy": found.accuracy}
            for found in calibration(scores.items)
        },
    }
