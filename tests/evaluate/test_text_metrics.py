import pytest

from graftline.errors import EvaluationError
from graftline.evaluate.text_metrics import exact_match, normalize, rouge_l, token_f1


def test_squads_normal_form_drops_case_punctuation_articles_and_spaces() -> None:
    assert normalize("  The  U.S. Dollar,\nan  answer! ") == "us dollar answer"


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [("The Animal.", ["animal"], 1.0), ("animals", ["animal"], 0.0), ("b", ["a b c", "b"], 1.0), ("", ["the"], 1.0)],
)
def test_exact_match(answer: str, references: list[str], expected: float) -> None:
    assert exact_match(answer, references) == expected


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("the cat sat", "cat", 2 / 3),
        ("cat cat", "cat dog", 0.5),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("the", "a", 1.0),
    ],
)
def test_token_f1_counts_shared_words_as_a_bag(answer: str, reference: str, expected: float) -> None:
    assert token_f1(answer, [reference]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("police kill the gunman", 0.75), ("the gunman kill police", 0.5), ("the gunman police killed", 0.5)],
)
def test_rouge_l_equals_the_papers_examples(answer: str, expected: float) -> None:
    """Lin 2004, section 3.1: reference "police killed the gunman"."""
    assert rouge_l(answer, ["police killed the gunman"]) == pytest.approx(expected)


def test_rouge_l_ignores_case_and_punctuation_and_takes_the_best_reference() -> None:
    assert rouge_l("A Cat, sat!", ["dog", "a cat sat"]) == 1.0
    assert rouge_l("", ["a"]) == 0.0
    assert rouge_l("…", ["!"]) == 1.0


def test_an_answer_without_references_is_refused() -> None:
    with pytest.raises(EvaluationError, match="no reference"):
        token_f1("x", [])
