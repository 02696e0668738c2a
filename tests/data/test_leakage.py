"""Evaluation rows that training rows already hold."""

import functools
import random

import pytest

from graftline.data.near import NEAR, NearIndex, normalize
from graftline.data.rows import Message, Row
from graftline.data.split import Leak, find_leaks

TEXT = "the front part of the human leg between the knee and the ankle"


def row(prompt: str, line: int) -> Row:
    return Row((Message("user", prompt, False), Message("assistant", "A", True)), line)


def test_each_kind_of_leak_is_found_with_both_lines() -> None:
    training = [row("Other things altogether", 1), row(TEXT, 2), row(TEXT, 3)]
    evaluation = [
        row("Nothing like it at all, a new question", 10),
        row(TEXT, 11),
        row(f"  {TEXT.upper()}\n", 12),
        row(TEXT + "s", 13),
    ]
    found = find_leaks(training, evaluation)
    assert [(leak.kind, leak.training_line, leak.evaluation_line) for leak in found] == [
        ("exact", 2, 11), ("normalized", 2, 12), ("near", 2, 13),
    ]  # fmt: skip
    assert 0.8 <= found[2].similarity < 1


def test_the_most_similar_training_row_is_named() -> None:
    training = [row(TEXT.replace("ankle", "ankles now"), 1), row(TEXT + "s", 2)]
    assert find_leaks(training, [row(TEXT, 5)])[0].training_line == 2


def test_full_width_letters_are_the_same_letters() -> None:
    assert normalize("\uff21\uff22 \u212b\u00a0x") == "ab å x"
    assert find_leaks([row("AB", 1)], [row("\uff21\uff22", 2)]) == (Leak("normalized", 1, 2, 1.0),)


def test_symbols_that_carry_the_meaning_are_not_normalized_away() -> None:
    assert find_leaks([row("1 + 1 =", 1)], [row("1 - 1 =", 2)]) == ()


def test_a_frame_that_all_prompts_share_does_not_make_them_similar() -> None:
    chooser = random.Random(0)

    def letters(count: int) -> str:
        return "".join(chooser.choices("abcdefghijklmnopqrstuvwxyz ", k=count))

    frame = letters(900) + "\nDefinition: {}\nCategory:"
    words = [letters(60).strip() for _ in range(60)]
    training = [row(frame.format(word), line) for line, word in enumerate(words[:40], start=1)]
    evaluation = [row(frame.format(word), line) for line, word in enumerate(words[40:], start=100)]
    close = row(frame.format(words[0] + "s"), 200)
    assert [(leak.kind, leak.evaluation_line) for leak in find_leaks(training, [*evaluation, close])] == [("near", 200)]


@functools.cache
def similar_texts() -> tuple[list[str], set[tuple[int, int]]]:
    """500 texts, and the pairs of the definition: J computed for every pair."""
    chooser = random.Random(2)
    texts: list[str] = []
    for _ in range(100):
        letters = [chooser.choice("abcdefghij ") for _ in range(80)]
        for edits in range(5):
            changed = letters.copy()
            for _ in range(edits):
                changed[chooser.randrange(80)] = chooser.choice("abcdefghij ")
            texts.append("".join(changed))
    grams = [{normalize(t)[i : i + 5] for i in range(len(normalize(t)) - 4)} for t in texts]
    pairs = {
        (a, b) for a in range(500) for b in range(a) if len(grams[a] & grams[b]) >= NEAR * len(grams[a] | grams[b])
    }
    return texts, pairs


def pairs_of(index: NearIndex) -> set[tuple[int, int]]:
    found: set[tuple[int, int]] = set()
    for at in range(500):
        found |= {(at, other) for other, _ in index.near(at)}
        index.add(at)
    return found


def test_pairs_are_those_of_the_definition_on_500_texts() -> None:
    """None is reported wrongly, and all are found (one in 20,000 may be missed)."""
    texts, pairs = similar_texts()
    assert len(pairs) > 100
    assert pairs_of(NearIndex(texts)) == pairs
    assert pairs_of(NearIndex([normalize(text) for text in texts], normalized=True)) == pairs


@pytest.mark.parametrize("some", [range(400, 500), range(3), range(0)])
def test_where_one_of_a_few_texts_is_meant_all_their_pairs_are_found_and_little_else_is_compared(some: range) -> None:
    texts, pairs = similar_texts()
    index = NearIndex(texts, one_of=slice(some.start, some.stop))
    assert set(index.candidates()) < set(NearIndex(texts).candidates())
    assert {pair for pair in pairs_of(index) if set(pair) & set(some)} == {
        pair for pair in pairs if set(pair) & set(some)
    }


@pytest.mark.parametrize("some", [slice(1), slice(1, 2)])
def test_a_text_that_holds_another_one_and_a_quarter_more_is_just_near_to_it(some: slice) -> None:
    letters = "".join(chr(at) for at in range(0x4E00, 0x4E00 + 104))
    index = NearIndex([letters[:84], letters], one_of=some)  # 80 5-grams, and 20 more
    index.add(0)
    assert list(index.near(1)) == [(0, 0.8)]
