"""Held-out rows beside each other: which come first, and what is hidden."""

from dataclasses import replace

import pytest

from graftline.data.rows import Message, Row
from graftline.digest import of_bytes
from graftline.evaluate.scores import AnswerScore, ItemScore, Scores, item_id
from graftline.evaluate.side_by_side import ShownAnswer, ShownRow, worst_first

LABELS = ("animal", "plant")
ROWS = [
    Row((Message("user", prompt, supervised=False), Message("assistant", "plant", supervised=True)), number)
    for number, prompt in enumerate(("lost", "sure and wrong", "wrong", "right", "won"), start=1)
]
LOST, SURE, WRONG, RIGHT, WON = ROWS


def chosen(row: Row, label: int, margin: float = 1.0) -> ItemScore:
    likelihoods = (-1.0, -1.0 - margin) if label == 0 else (-1.0 - margin, -1.0)
    return ItemScore(item_id(row), likelihoods, label, 1, label == 1, -likelihoods[1], 1)


def scores(*items: ItemScore) -> Scores:
    return Scores(template=of_bytes(b"template"), labels=LABELS, items=items)


CANDIDATE = scores(
    chosen(RIGHT, 1), chosen(WON, 1), chosen(WRONG, 0), chosen(SURE, 0, margin=5.0), chosen(LOST, 0, margin=0.1)
)
PRODUCTION = scores(chosen(LOST, 1), chosen(SURE, 0), chosen(WRONG, 0), chosen(RIGHT, 1), chosen(WON, 0))


def prompts(shown: list[ShownRow]) -> list[str | None]:
    return [row.prompt for row in shown]


def test_rows_that_the_reference_answered_better_come_first_then_the_surest_mistakes() -> None:
    shown = worst_first(ROWS, CANDIDATE, {"production": PRODUCTION}, metric="accuracy")
    assert prompts(shown) == ["lost", "sure and wrong", "wrong", "right", "won"]
    first = ShownRow(
        1, "lost", "plant", {"production": ShownAnswer("plant", 1.0), "candidate": ShownAnswer("animal", 0.0)}
    )
    assert shown[0] == first
    assert prompts(worst_first(ROWS, CANDIDATE, {"production": PRODUCTION}, metric="accuracy", limit=2)) == [
        "lost",
        "sure and wrong",
    ]


def test_the_order_of_scores_does_not_matter() -> None:
    turned = replace(CANDIDATE, items=CANDIDATE.items[::-1])
    references = {"production": PRODUCTION}
    assert worst_first(ROWS, turned, references, metric="accuracy") == worst_first(
        ROWS, CANDIDATE, references, metric="accuracy"
    )


def test_a_model_that_was_not_asked_has_no_answer() -> None:
    others = {"production": scores(chosen(RIGHT, 1)), "base revision": PRODUCTION}
    shown = worst_first(ROWS, CANDIDATE, others, metric="accuracy")
    assert list(shown[0].answers) == ["production", "base revision", "candidate"]
    assert [row.answers["production"] is None for row in shown] == [row.prompt != "right" for row in shown]
    assert worst_first(ROWS, scores(), others, metric="accuracy") == []


def test_without_texts_lines_and_scores_remain() -> None:
    shown = worst_first(ROWS, CANDIDATE, {"production": PRODUCTION}, metric="accuracy", with_texts=False)
    assert [row.line for row in shown] == [1, 2, 3, 4, 5]
    assert shown[0] == ShownRow(
        1, None, None, {"production": ShownAnswer(None, 1.0), "candidate": ShownAnswer(None, 0.0)}
    )


@pytest.mark.parametrize(("metric", "first"), [("exact_match", "wrong"), ("f1", "lost"), ("rouge_l", "right")])
def test_generated_answers_are_ordered_by_the_pipeline_s_metric(metric: str, first: str) -> None:
    def answer(row: Row, exact: float, f1: float, rouge_l: float) -> AnswerScore:
        return AnswerScore(item_id(row), f"answer to {row.prompt}", exact, f1, rouge_l, 3, stop=True)

    made = [answer(WRONG, 0.0, 0.9, 0.9), answer(LOST, 1.0, 0.1, 0.8), answer(RIGHT, 1.0, 0.8, 0.2)]
    candidate = replace(scores(), answers=tuple(made))
    shown = worst_first(ROWS, candidate, {}, metric=metric)
    assert prompts(shown)[0] == first
    assert len(shown) == 3
    assert shown[0].answers["candidate"] is not None
    assert shown[0].answers["candidate"].text == f"answer to {first}"


def test_a_model_that_was_scored_before_the_pipeline_had_its_metric_is_shown_without_answers() -> None:
    def answer(row: Row, **own: float) -> AnswerScore:
        return AnswerScore(item_id(row), "{}", 0.0, 0.0, 0.0, 1, stop=True, own=own)

    candidate = replace(scores(), answers=(answer(RIGHT, json_equal=1.0), answer(LOST, json_equal=0.0)))
    before = replace(scores(), answers=(answer(RIGHT), answer(LOST)))
    shown = worst_first(ROWS, candidate, {"base revision": before}, metric="json_equal")
    assert prompts(shown) == ["lost", "right"]
    assert [row.answers["base revision"] for row in shown] == [None, None]
