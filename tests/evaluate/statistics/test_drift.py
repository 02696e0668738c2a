"""The test for drift of prompts: exact ranks, fair bets, and few false alarms however often somebody looks."""

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
