"""Token choice against transformers' own warpers, and its edges."""

import numpy as np
import pytest
import scipy.special
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from graftline.serve.generation import Sampler, SamplingParams

LOGITS = (3 * np.random.default_rng(0).standard_normal(50)).astype(np.float32)


def frequencies(params: SamplingParams, count: int = 20_000) -> np.ndarray:
    sampler = Sampler(params)
    return np.bincount([sampler.choose(LOGITS).token for _ in range(count)], minlength=len(LOGITS)) / count


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.7, 0, 1.0, 0.0),
        (1.5, 5, 1.0, 0.0),
        (1.0, 0, 0.6, 0.0),
        (0.9, 8, 0.8, 0.0),
        (1.0, 0, 1.0, 0.1),
        (1.8, 0, 1.0, 0.3),
        (1.3, 12, 0.9, 0.2),
    ],
)
def test_frequencies_are_the_probabilities_after_transformers_warpers(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    scores = torch.tensor(LOGITS)[None]
    scores = TemperatureLogitsWarper(temperature)(None, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    expected = scores.softmax(-1)[0].numpy()
    found = frequencies(SamplingParams(temperature, top_p, top_k, seed=1, min_p=min_p))
    assert (found[expected == 0] == 0).all()
    # Four standard errors of a binomial share.
    assert (np.abs(found - expected) <= 4 * np.sqrt(expected * (1 - expected) / 20_000) + 1e-9).all()


def penalized(params: SamplingParams, prompt: list[int], chosen: list[int], logits: np.ndarray = LOGITS) -> np.ndarray:
    """Scores after the penalties, when some tokens were chosen."""
    sampler = Sampler(params, prompt)
    for token in chosen:
        certain = np.full(len(logits), -1e9, np.float32)
        certain[token] = 1e9
        assert sampler.choose(certain).token == token
    return sampler._penalized(logits)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
@pytest.mark.parametrize(("prompt", "chosen"), [([], []), ([3, 3, 7], []), ([], [11, 11, 2]), ([3, 7, 49], [7, 11])])
def test_the_repetition_penalty_is_transformers_over_prompt_and_answer(
    penalty: float, prompt: list[int], chosen: list[int]
) -> None:
    found = penalized(SamplingParams(temperature=0, repetition_penalty=penalty), prompt, chosen)
    ids = torch.tensor([[*prompt, *chosen]], dtype=torch.long)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, torch.tensor(LOGITS)[None])[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_frequency_and_presence_penalties_are_openais_formula_over_the_answer_alone() -> None:
    params = SamplingParams(temperature=0, frequency_penalty=0.7, presence_penalty=-0.4)
    found = penalized(params, [5, 5, 6], [9, 9, 9, 20])
    # mu[j] -> mu[j] - c[j] * alpha_frequency - (c[j] > 0) * alpha_presence
    counts = np.bincount([9, 9, 9, 20], minlength=len(LOGITS))
    np.testing.assert_allclose(found, LOGITS - counts * 0.7 + (counts > 0) * 0.4, rtol=1e-6)


def test_penalties_leave_the_models_logits_and_log_probabilities_as_they_are() -> None:
    before = LOGITS.copy()
    params = SamplingParams(temperature=0, presence_penalty=2.0, repetition_penalty=3.0, top_logprobs=2)
    sampler = Sampler(params, range(len(LOGITS)))
    choices = [sampler.choose(LOGITS) for _ in range(3)]
    assert (before == LOGITS).all()
    assert len({choice.token for choice in choices}) > 1
    expected = scipy.special.log_softmax(LOGITS.astype(np.float64))
    for choice in choices:
        assert choice.logprob == pytest.approx(expected[choice.token], abs=1e-5)
        assert choice.top[0][0] == LOGITS.argmax()


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300])
def test_a_tiny_temperature_takes_the_most_likely_token(temperature: float) -> None:
    sampler = Sampler(SamplingParams(temperature, seed=0))
    assert {sampler.choose(LOGITS).token for _ in range(5)} == {int(LOGITS.argmax())}


def test_temperature_zero_takes_the_most_likely_token() -> None:
    assert Sampler(SamplingParams(temperature=0)).choose(LOGITS).token == LOGITS.argmax()


def test_a_tiny_top_p_still_leaves_one_token() -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, top_p=1e-9, seed=0))
    assert {sampler.choose(LOGITS).token for _ in range(50)} == {int(LOGITS.argmax())}


def test_the_same_seed_gives_the_same_tokens() -> None:
    first, second, other = (Sampler(SamplingParams(seed=seed)) for seed in (7, 7, 8))
    tokens = [[sampler.choose(LOGITS).token for _ in range(40)] for sampler in (first, second, other)]
    assert tokens[0] == tokens[1] != tokens[2]


def test_logprobs_are_the_models_before_temperature_and_cuts() -> None:
    choice = Sampler(SamplingParams(temperature=0.2, top_k=1, top_logprobs=3)).choose(LOGITS)
    expected = scipy.special.log_softmax(LOGITS.astype(np.float64))
    assert choice.logprob == pytest.approx(expected[choice.token], abs=1e-5)
    assert [token for token, _ in choice.top] == np.argsort(-LOGITS)[:3].tolist()
    assert [value for _, value in choice.top] == pytest.approx(np.sort(expected)[::-1][:3], abs=1e-5)


def test_huge_logits_do_not_overflow() -> None:
    logits = np.array([1e30, -1e30, 0, np.float32(3e38)], np.float32)
    assert Sampler(SamplingParams(temperature=0.01, seed=0, top_logprobs=4)).choose(logits).token == 3
