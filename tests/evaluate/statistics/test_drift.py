"""The test for drift of prompts: exact ranks, fair bets, and few false alarms however often somebody looks."""

import math
from itertools import pairwise

import numpy as np
import pytest

from graftline.evaluate.statistics.drift import NUMBERS, Bets, DriftTest, Prompt, Ranks, Usual


def prompts(rng: np.random.Generator, number: int, *, length: float = 12.0, topics: float = 0.2) -> list[Prompt]:
    """About two topics, the second with probability ``topics``; every topic has words of its own beside common ones."""
    found = []
    for _ in range(number):
        first = 1000 * (1 + int(rng.random() < topics))
        num_tokens = 4 + int(rng.poisson(length))
        words = {int(token) for token in rng.zipf(1.5, num_tokens // 2) % 300}
        words |= {int(token) for token in first + rng.integers(0, 40, num_tokens // 3)}
        found.append(Prompt(num_tokens, tuple(sorted(words))))
    return found


def looked_at(seed: int, number: int, **drift: float) -> DriftTest:
    rng = np.random.default_rng(seed)
    test = DriftTest(prompts(rng, 200), alpha=0.05)
    for prompt in prompts(rng, number, **drift):
        test.add_numbers(test.numbers(prompt), float(rng.random()))
    return test


def test_a_rank_counts_what_is_below_and_draws_among_equals() -> None:
    ranks = Ranks([1.0, 2.0, 4.0])
    assert ranks.add(3.0, 0.5) == pytest.approx(2.5 / 4)
    assert ranks.add(3.0, 0.5) == pytest.approx((2 + 0.5 * 2) / 5), "the first one counts among the others now"
    assert Ranks([7.0, 7.0]).add(7.0, 0.25) == pytest.approx(0.25)


def test_no_bet_gains_on_average_while_ranks_are_uniform() -> None:
    middles = (np.arange(10_000) + 0.5) / 10_000
    bets = Bets(len(middles))
    assert bets.add(middles).mean() == pytest.approx(1.0, abs=1e-6)
    assert (bets.wealth_JBR >= 0).all()
    one = Bets()
    before = one.add(np.array([0.93]))[0]
    after = [wealth.add(np.array([rank]))[0] for rank in middles[::100] if (wealth := Bets()).add(np.array([0.93])) > 0]
    assert np.mean(after) == pytest.approx(before, abs=0.02)


def test_looking_after_every_prompt_raises_few_false_alarms() -> None:
    """10,000 sequences of 500 prompts from the same distribution; a third of the prompts are equal to others."""
    rng, num_sequences, alpha = np.random.default_rng(3), 10_000, 0.05
    bets, highest = Bets(num_sequences), np.zeros(num_sequences)
    for _ in range(500):
        highest = np.maximum(highest, bets.add(rng.random(num_sequences)))
    alarms = int((highest >= 1 / alpha).sum())
    # Three standard errors of 0.05 above it: 0.0565.
    assert alarms / num_sequences <= 0.0565
    assert alarms > 0, "a test that never alarms shows nothing"


def test_ranks_among_few_equal_values_are_uniform_and_independent() -> None:
    """Ranks of 2,000 sequences with many ties: each quarter has a fourth of them, also after a high one."""
    rng = np.random.default_rng(4)
    last, before = [], []
    for _ in range(2_000):
        ranks = Ranks(rng.integers(0, 3, 20).tolist())
        found = [ranks.add(float(rng.integers(0, 3)), float(rng.random())) for _ in range(5)]
        last.append(found[-1])
        before.append(found[-2])
    quarters = np.histogram(last, 4, (0, 1))[0] / 2_000
    assert np.abs(quarters - 0.25).max() < 0.03
    assert abs(np.corrcoef(last, before)[0, 1]) < 0.07


@pytest.mark.parametrize(
    ("drift", "expected"),
    [({"length": 18.0}, "length"), ({"topics": 0.9}, "unusual tokens")],
)
def test_a_drift_is_found_and_named(drift: dict[str, float], expected: str) -> None:
    tests = [looked_at(seed, 120, **drift) for seed in range(3)]
    assert all(expected in test.found for test in tests)
    assert all(len(test.highest) == len(test.mean_ranks) == len(NUMBERS) for test in tests)


def test_words_that_the_training_rows_do_not_have_are_found() -> None:
    rng = np.random.default_rng(5)
    test = DriftTest(prompts(rng, 200), alpha=0.05)
    for prompt in prompts(rng, 60):
        foreign = Prompt(prompt.length, tuple(50_000 + token for token in prompt.tokens))
        test.add_numbers(test.numbers(foreign), float(rng.random()))
    assert "unusual tokens" in test.found
    assert test.mean_ranks[1] > 0.85


def test_without_drift_nothing_is_found() -> None:
    assert [looked_at(seed, 120).found for seed in range(5)] == [()] * 5


def test_empty_prompts_have_numbers_too() -> None:
    assert Usual([Prompt(0, ())]).numbers(Prompt(0, ())) == [0.0] * len(NUMBERS)
    assert len(Usual([Prompt(1, (3,)), Prompt(2, (4,))]).numbers(Prompt(9, (8, 9)))) == len(NUMBERS)


FEW = [Prompt(3, (2, 9)), Prompt(5, (3, 9)), Prompt(2, (9,))]
"""Token 9 is in all three, 2 and 3 in one each."""


def test_the_numbers_of_a_prompt_by_hand() -> None:
    half = 1 / math.sqrt(2)
    mean = [(1 + 2 * half) / 3, half / 3, half / 3]  # of 9, 2 and 3: the commonest token first
    usual = Usual(FEW, [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    seldom = (-math.log(1.5 / 4) - math.log(0.5 / 4)) / 2  # token 2 in one of three prompts, token 8 in none
    expected = [7.0, seldom, -mean[0], 1 - mean[1], -mean[2]]
    assert usual.numbers(Prompt(7, (2, 8))) == [round(number, 9) for number in expected]
    expected = [4.0, -math.log(3.5 / 4), 1 - mean[0], -mean[1], -mean[2]]
    assert usual.numbers(Prompt(4, (9,))) == [round(number, 9) for number in expected]


def test_the_directions_are_those_in_which_the_prompts_differ_most() -> None:
    chosen = prompts(np.random.default_rng(0), 12, length=3.0)
    usual = Usual(chosen)
    counts: dict[int, int] = {}
    for token in (token for prompt in chosen for token in prompt.tokens):
        counts[token] = counts.get(token, 0) + 1
    common = sorted(counts, key=lambda token: (-counts[token], token))
    rows = np.array([[token in prompt.tokens for token in common] for prompt in chosen], dtype=float)
    rows /= np.sqrt(rows.sum(axis=1, keepdims=True))
    oracle = np.linalg.svd(rows - rows.mean(axis=0))[2][:3]
    np.testing.assert_allclose(np.abs(oracle @ np.array(usual.directions)), np.eye(3), atol=1e-6)
    again = Usual(chosen, usual.directions)
    assert [again.numbers(prompt) for prompt in chosen] == [usual.numbers(prompt) for prompt in chosen]
    turned = Usual(chosen, [[-value for value in row] for row in usual.directions])
    assert turned.numbers(chosen[0])[2:] == [-value for value in usual.numbers(chosen[0])[2:]]
    with pytest.raises(ValueError, match="reshape"):
        Usual(FEW, usual.directions)


def test_two_tokens_have_two_directions() -> None:
    usual = Usual([Prompt(1, (3,)), Prompt(2, (4,))])
    assert np.array(Usual([Prompt(1, (3,)), Prompt(2, (4,))], usual.directions).directions).shape == (2, 2)
    assert usual.numbers(Prompt(9, (3,)))[4] == 0.0


def test_the_wealth_of_two_sequences_is_that_of_each_bet_by_bet() -> None:
    slopes, curves = (0.0, 0.9, -0.9, 0.4, -0.4, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0, 0.0, 0.8, -0.8)
    sequences = [(0.2, 0.9, 0.6, 0.95), (0.5, 0.1, 0.3, 0.05)]
    bets = Bets(len(sequences))
    found = [bets.add(np.array(ranks)) for ranks in zip(*sequences, strict=True)]
    for number, ranks in enumerate(sequences):
        wealth = {jump: [1 / 14] * 7 for jump in (0.001, 0.02)}
        for step, rank in enumerate(ranks):
            for jump, held in wealth.items():
                mean = sum(held) / len(held)
                gains = [
                    1 + slope * (2 * rank - 1) + curve * (6 * rank * (rank - 1) + 1)
                    for slope, curve in zip(slopes, curves, strict=True)
                ]
                wealth[jump] = [((1 - jump) * one + jump * mean) * gain for one, gain in zip(held, gains, strict=True)]
            assert found[step][number] == pytest.approx(sum(map(sum, wealth.values())), rel=1e-12)


def test_wealth_stays_finite_however_long_ago_the_alarm_was() -> None:
    bets = Bets()
    for _ in range(2000):
        total = bets.add(np.array([0.999]))
    assert bets.wealth_JBR.max() == 1e100
    assert np.isfinite(total).all()


def test_one_half_of_the_training_prompts_says_what_is_usual_and_the_other_is_compared() -> None:
    training = prompts(np.random.default_rng(1), 7)
    test = DriftTest(training, alpha=0.05)
    usual = Usual(training[:3])
    assert test.directions == usual.directions
    assert test.numbers(training[0]) == usual.numbers(training[0])
    turned = [[-value for value in row] for row in usual.directions]
    assert DriftTest(training, alpha=0.05, directions=turned).numbers(training[0])[2:] == [
        -value for value in usual.numbers(training[0])[2:]
    ]
    references = [Ranks(column) for column in zip(*map(usual.numbers, training[3:]), strict=True)]
    bets, highest, ranks = Bets(len(NUMBERS)), [np.ones(len(NUMBERS))], []
    for prompt, draw in zip(prompts(np.random.default_rng(2), 6), (0.3, 0.9, 0.1, 0.5, 0.7, 0.2), strict=True):
        test.add_numbers(test.numbers(prompt), draw)
        ranks.append([one.add(n, draw) for one, n in zip(references, usual.numbers(prompt), strict=True)])
        highest.append(np.maximum(highest[-1], bets.add(np.array(ranks[-1]))))
        assert test.num_prompts == len(ranks)
        np.testing.assert_allclose(test.highest, highest[-1], rtol=1e-12)
        np.testing.assert_allclose(test.mean_ranks, np.mean(ranks, axis=0), rtol=1e-12)
    assert any((after == before).any() for before, after in pairwise(highest)), "the highest, not the latest"
