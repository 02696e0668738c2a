"""Held-out rows with several models' answers side by side, for people who prefer reading to averages.

The candidate's worst rows come first: those that the reference answered better, then those that the candidate got wrong
with the most confidence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graftline.data.rows import Row
from graftline.evaluate.scores import CANDIDATE, AnswerScore, ItemScore, Scores, item_id
from graftline.settings.gate_metrics import PRODUCTION

NUM_SHOWN = 10


@dataclass(frozen=True)
class ShownAnswer:
    """One model's answer: ``text`` is None if texts are hidden; ``score`` is in [0, 1], 1 is correct."""

    text: str | None
    score: float


@dataclass(frozen=True)
class ShownRow:
    """One held-out row: ``answers`` by model name, None if a model was not asked.

    ``line``: in the evaluation rows, from 1. ``prompt`` and ``expected`` are None if texts are hidden.
    """

    line: int
    prompt: str | None
    expected: str | None
    answers: Mapping[str, ShownAnswer | None]


def worst_first(
    rows: Sequence[Row],
    candidate: Scores,
    references: Mapping[str, Scores],
    *,
    metric: str,
    with_texts: bool = True,
    limit: int = NUM_SHOWN,
) -> list[ShownRow]:
    """The rows on which the candidate did worst, at most ``limit``.

    Args:
        rows: the evaluation rows, in the order of their file.
        candidate: its scores; rows without one are left out.
        references: scores of other models by name. The first one determines the order.
        metric: the pipeline's metric: `accuracy` compares chosen labels, the others generated answers.
        with_texts: whether prompts and answers may be shown.
        limit: maximum number of rows.
    """
    of_candidate = _by_id(candidate, metric)
    others = {name: _by_id(scores, metric) for name, scores in references.items()}
    first = next(iter(others.values()), {})
    found = [(item_id(row), line, row) for line, row in enumerate(rows, start=1)]

    def badness(each: tuple[str, int, Row]) -> tuple[float, float, float, int]:
        score, certainty = _value(of_candidate[each[0]], metric)
        before = _value(first[each[0]], metric)[0] if each[0] in first else score
        return score - before, score, -certainty, each[1]

    asked = sorted((each for each in found if each[0] in of_candidate), key=badness)[:limit]
    models = {name: (scores, references[name].labels) for name, scores in others.items()}
    models[CANDIDATE] = (of_candidate, candidate.labels)
    return [
        ShownRow(
            line=line,
            prompt=row.prompt.strip() if with_texts else None,
            expected=row.answer.strip() if with_texts else None,
            answers={
                name: _shown(scored[id_], labels, metric, with_texts) if id_ in scored else None
                for name, (scored, labels) in models.items()
            },
        )
        for id_, line, row in asked
    ]


def in_production(scores: Mapping[str, Scores]) -> dict[str, Scores]:
    """Production's scores under its name; the base's if nothing was in production."""
    name = PRODUCTION if PRODUCTION in scores else "base"
    return {name: scores[name]}


def _by_id(scores: Scores, metric: str) -> Mapping[str, ItemScore | AnswerScore]:
    if metric == "accuracy":
        return {item.item_id: item for item in scores.items}
    # A base revision may have been measured before the pipeline had this metric.
    return {each.item_id: each for each in scores.answers if metric in each.own or hasattr(each, metric)}


def _value(item: ItemScore | AnswerScore, metric: str) -> tuple[float, float]:
    """The item's score, and the margin of the chosen over the gold option (nats; 0 if not measured)."""
    if isinstance(item, ItemScore):
        return float(item.correct), item.log_likelihoods[item.chosen] - item.log_likelihoods[item.gold]
    return float(item.own[metric] if metric in item.own else getattr(item, metric)), 0.0


def _shown(item: ItemScore | AnswerScore, labels: Sequence[str], metric: str, with_texts: bool) -> ShownAnswer:
    text = labels[item.chosen] if isinstance(item, ItemScore) else item.answer
    return ShownAnswer(text if with_texts else None, _value(item, metric)[0])
