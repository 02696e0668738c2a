from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftline.errors import EvaluationError
from graftline.evaluate.metrics import exact_match, normalize, rouge_l, token_f1


def test_the_normal_form_drops_case_punctuation_articles_and_spaces() -> None:
    assert normalize("  The  U.S. Dollar,\nan  answer! ") == "us dollar answer"


SAME = [
    ("The Animal.", "animal"),
    ("A cat", "cat"),
    ('"Paris"', "Paris"),
    ("**Paris**", "Paris"),
    ("`main`", "main"),
    ("(in 1990)", "in 1990"),
    ("it's", "its"),
    ("twenty-one", "twentyone"),
    ("50 %", "50%"),
    ("1,000", "1000"),
    ("12,345.6.", "12345.6"),
    ("\u22121", "-1"),
    ("1\u20132", "1-2"),
    ("cafe\u0301", "caf\u00e9"),
    ("\uff21\uff22\uff23\uff01", "abc"),
    ("\uff76\uff9e", "\u30ac"),
    ("\u732b\u3002", "\u732b"),
    ("\u300c\u732b\u300d", "\u732b"),
    ("oui !", "oui"),
    ("Stra\u00dfe\u200b", "stra\u00dfe"),
    ("\u043a\u043e\u0442?", "\u041a\u043e\u0442"),
    ("yes\u2014no", "yes no"),
    ("red,green", "red, green"),
    ("Ph.D.", "PhD"),
    ("5'", "5\u2032"),
    ("\ufe635", "-5"),
    ("\ufe62", "+"),
    ("6'2\"", "6\u20322\u2033"),
    ('about "5"', "about 5"),
    ("'90s'", "90s"),
    ("50 \u066a", "50\u066a"),
    ("\u2764\ufe0f", "\u2764"),
    ("\u2067\u05e9\u05dc\u05d5\u05dd\u2069", "\u05e9\u05dc\u05d5\u05dd"),
]
"""Pairs of texts that mean the same."""
DIFFERENT = [
    ("", "A"),
    ("the", "A"),
    ("", "The"),
    ("vitamin A", "vitamin"),
    ("A, B", "B"),
    ("+", "-"),
    (">", "<"),
    (">=", ">"),
    ("!=", "="),
    ("?", "!"),
    ("(", ")"),
    ("...", ""),
    ("-1", "1"),
    ("\u22121", "1"),
    ("1.5", "15"),
    (".5", "5"),
    ("1,5", "15"),
    ("3-2", "32"),
    ("1/2", "12"),
    ("12:30", "1230"),
    ("50%", "50"),
    ("$5", "5"),
    ("$5", "\u20ac5"),
    ("10\u00b0", "10"),
    ("[0, 1)", "(0, 1]"),
    ("x - y", "x y"),
    ("x + y", "x - y"),
    ("2*3", "23"),
    ("2\u00b2", "22"),
    ("C", "C++"),
    ("C", "C#"),
    ("A+", "A"),
    ("A-", "A"),
    ("r\u00e9sum\u00e9", "resume"),
    ("\u0915\u093f", "\u0915\u093e"),
    ("\u0e01\u0e48", "\u0e01\u0e49"),
    ("\u05d0\u05b8", "\u05d0\u05b7"),
    ("foo_bar", "foobar"),
    ("__init__", "init"),
    ("**A** or B", "or B"),
    ("a@b", "ab"),
    ("file.txt", "filetxt"),
    ("example.org", "exampleorg"),
    ("np.sum", "npsum"),
    ("!done", "done"),
    ("5\u066a", "5"),
    ("\ufe635", "5"),
    ("5\ufe6a", "5"),
    ("5\u2031", "5"),
    ("5\u2032", "5\u2033"),
    ("5'", '5"'),
    ("5'", "5"),
    ("f\u2032", "f"),
    ("\U0001f44d\U0001f3fb", "\U0001f44d\U0001f3ff"),
    ("\U0001f1e9\U0001f1ea", "\U0001f1ea\U0001f1e9"),
]
"""Pairs of texts that mean different things, and that a normal form has been seen to make one."""


@pytest.mark.parametrize(("one", "other"), SAME)
def test_texts_that_mean_the_same_are_one(one: str, other: str) -> None:
    assert exact_match(one, [other]) == exact_match(other, [one]) == 1.0
    assert token_f1(one, [other]) == 1.0


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_texts_that_mean_different_things_are_not_one(one: str, other: str) -> None:
    for measure in (exact_match, token_f1, rouge_l):
        assert measure(one, [other]) < 1.0
        assert measure(other, [one]) < 1.0
        assert measure(one, [one]) == measure(other, [other]) == 1.0


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("\u5317\u4eac\u5e02", "\u5317\u4eac", 0.8),  # Chinese: 2 of 3 and 2 of 2 letters
        ("\u6771\u4eac\u3067\u3059\u3002", "\u6771\u4eac", 2 / 3),  # Japanese: 2 of 4
        (
            "\u0e01\u0e23\u0e38\u0e07\u0e40\u0e17\u0e1e",
            "\u0e01\u0e23\u0e38\u0e07",
            2 * 3 / (6 + 3),
        ),  # Thai, a mark with its letter
        ("\u65e5\u3005\u3005", "\u65e5\u3005", 0.8),  # a mark that repeats a letter
        ("\u4e8c\u3007\u3007", "\u4e8c\u3007", 0.8),  # zeros of a year
        ("iPhone\u624b\u673a", "iPhone", 0.5),
        ("\uc11c\uc6b8 \ud0c0\uc6cc", "\uc11c\uc6b8", 2 / 3),  # Korean has blanks
        ("\U0001f600\U0001f621", "\U0001f600", 2 / 3),  # emoji
        ("\U0001f44d\U0001f3fd\u2764\ufe0f", "\U0001f44d\U0001f3fd", 2 / 3),  # a skin colour with its emoji
        ("\U0001f468\u200d\U0001f467\U0001f1e9\U0001f1ea", "\U0001f1e9\U0001f1ea", 2 / 3),  # a family, a flag
    ],
)
def test_letters_are_counted_where_a_script_puts_no_blanks_between_words(
    answer: str, reference: str, expected: float
) -> None:
    assert token_f1(answer, [reference]) == pytest.approx(expected)
    assert rouge_l(answer, [reference]) == pytest.approx(expected)


@given(st.text(max_size=20), st.text(max_size=20))
def test_every_text_equals_itself_and_blanks_around_it_do_not_matter(one: str, other: str) -> None:
    for measure in (exact_match, token_f1, rouge_l):
        assert measure(one, [f" {one}\n"]) == 1.0
        assert measure(one, [other]) == measure(other, [one])


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [("The Animal.", ["animal"], 1.0), ("animals", ["animal"], 0.0), ("b", ["a b c", "b"], 1.0), ("", ["the"], 0.0)],
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
        ("the", "a", 0.0),
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
    assert rouge_l("…", ["!"]) == 0.0


def test_an_answer_without_references_is_refused() -> None:
    with pytest.raises(EvaluationError, match="no reference"):
        token_f1("x", [])


@pytest.mark.parametrize("text", ["(" * 5000 + "a" + ")" * 5000, "*a " * 5000, "`a " * 5000, "w " * 5000])
def test_the_text_of_a_broken_model_is_compared_in_linear_time(text: str) -> None:
    # Quadratic work would take minutes, and recursion ended in a traceback.
    assert exact_match(text, [text]) == token_f1(text, [text]) == rouge_l(text, [text]) == 1.0
    assert rouge_l(text, ["other words"]) == 0.0


@given(st.lists(st.sampled_from("abc"), max_size=9), st.lists(st.sampled_from("abc"), max_size=9))
def test_the_longest_common_subsequence_is_the_longest(one: list[str], other: list[str]) -> None:
    def subsequences(words: list[str]) -> set[tuple[str, ...]]:
        return {part for size in range(len(words) + 1) for part in combinations(words, size)}

    longest = max(map(len, subsequences(one) & subsequences(other)))
    expected = 2 * longest / (len(one) + len(other)) if one or other else 1.0
    assert rouge_l(" ".join(one), [" ".join(other)]) == pytest.approx(expected)
