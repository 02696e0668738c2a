"""Token choice against transformers' own warpers, and its edges."""

import numpy as np
import pytest
import scipy.special
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from graftline.serve.sampling import Sampler, SamplingParams

LOGITS = (3 * np.random.default_rng(0).standard_normal(50)).astype(np.float32)


def frequencies(params: SamplingParams, count: int = 20_000) -> np.ndarray:
    sampler = Sampler(params)
    return np.bincount([sampler.choose(LOGITS).token for _ in range(count)], minlength=len(LOGITS)) / count


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.5, 5, 1.0), (1.0, 0, 0.6), (0.9, 8, 0.8)]
)
def test_frequencies_are_the_probabilities_after_transformers_warpers(
    temperature: float, top_k: int, top_p: float
) -> None:
    scores = torch.tensor(LOGITS)[None]
    scores = TemperatureLogitsWarper(temperature)(None, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    expected = scores.softmax(-1)[0].numpy()
    found = frequencies(SamplingParams(temperature, top_p, top_k, seed=1))
    assert (found[expected == 0] == 0).all()
    # Four standard errors of a binomial share.
    assert (np.abs(found - expected) <= 4 * np.sqrt(expected * (1 - expected) / 20_000) + 1e-9).all()


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
