"""Token choice against transformers' own warpers, and its edges."""

import numpy as np
import pytest
import scipy.special
import torch
from torch._subclasses import FakeTensorMode
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from graftline.serve.generation import SampledToken, Sampler, SamplingParams, choose_tokens
from graftline.serve.grammar import GrammarError

LOGITS = (3 * np.random.default_rng(0).standard_normal(50)).astype(np.float32)


def choose(sampler: Sampler, logits: np.ndarray) -> SampledToken:
    """The next token of one sequence."""
    (chosen,) = choose_tokens([sampler], torch.from_numpy(logits)[None])
    assert isinstance(chosen, SampledToken)
    return chosen


def frequencies(params: SamplingParams, count: int = 20_000) -> np.ndarray:
    sampler = Sampler(params)
    return np.bincount([choose(sampler, LOGITS).token for _ in range(count)], minlength=len(LOGITS)) / count


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
        assert choose(sampler, certain).token == token
    return sampler._penalized(torch.from_numpy(logits)).numpy()


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
    choices = [choose(sampler, LOGITS) for _ in range(3)]
    assert (before == LOGITS).all()
    assert len({choice.token for choice in choices}) > 1
    expected = scipy.special.log_softmax(LOGITS.astype(np.float64))
    for choice in choices:
        assert choice.logprob == pytest.approx(expected[choice.token], abs=1e-5)
        assert choice.top[0][0] == LOGITS.argmax()


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300])
def test_a_tiny_temperature_takes_the_most_likely_token(temperature: float) -> None:
    sampler = Sampler(SamplingParams(temperature, seed=0))
    assert {choose(sampler, LOGITS).token for _ in range(5)} == {int(LOGITS.argmax())}


def test_temperature_zero_takes_the_most_likely_token() -> None:
    assert choose(Sampler(SamplingParams(temperature=0)), LOGITS).token == LOGITS.argmax()


@pytest.mark.parametrize("top_p", [1e-9, 0.0])
def test_a_tiny_top_p_still_leaves_one_token(top_p: float) -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, top_p=top_p, seed=0))
    assert {choose(sampler, LOGITS).token for _ in range(50)} == {int(LOGITS.argmax())}


def test_the_same_seed_gives_the_same_tokens() -> None:
    first, second, other = (Sampler(SamplingParams(seed=seed)) for seed in (-7, -7, 7))
    tokens = [[choose(sampler, LOGITS).token for _ in range(40)] for sampler in (first, second, other)]
    assert tokens[0] == tokens[1] != tokens[2]


def test_logprobs_are_the_models_before_temperature_and_cuts() -> None:
    choice = choose(Sampler(SamplingParams(temperature=0.2, top_k=1, top_logprobs=3)), LOGITS)
    expected = scipy.special.log_softmax(LOGITS.astype(np.float64))
    assert choice.logprob == pytest.approx(expected[choice.token], abs=1e-5)
    assert [token for token, _ in choice.top] == np.argsort(-LOGITS)[:3].tolist()
    assert [value for _, value in choice.top] == pytest.approx(np.sort(expected)[::-1][:3], abs=1e-5)


def test_huge_logits_do_not_overflow() -> None:
    logits = np.array([1e30, -1e30, 0, np.float32(3e38)], np.float32)
    assert choose(Sampler(SamplingParams(temperature=0.01, seed=0, top_logprobs=4)), logits).token == 3


def test_sequences_that_are_chosen_for_together_get_the_tokens_that_they_get_alone() -> None:
    params = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.8, top_p=0.7, seed=1, top_logprobs=2),
        SamplingParams(temperature=1.2, top_k=6, seed=2, repetition_penalty=1.4),
        SamplingParams(temperature=0, presence_penalty=1.5, top_logprobs=0),
    ]
    logits = torch.from_numpy((3 * np.random.default_rng(1).standard_normal((4, 50))).astype(np.float32))
    together, apart = ([Sampler(one, [3]) for one in params] for _ in range(2))
    for _ in range(12):
        found = choose_tokens(together, logits)
        assert found == [choose(sampler, row.numpy()) for sampler, row in zip(apart, logits, strict=True)]
    assert [len(choice.top) for choice in found if isinstance(choice, SampledToken)] == [0, 2, 0, 0]


class Fails:
    """A constraint that fails before a choice, or after it."""

    def __init__(self, *, late: bool) -> None:
        self._late = late

    def allowed(self, num_tokens: int) -> np.ndarray:
        if not self._late:
            raise GrammarError("no token is left")
        return np.ones(num_tokens, bool)

    def accept(self, token: int) -> None:
        raise GrammarError("not of the grammar")


def test_a_constraint_that_fails_fails_its_own_sequence_alone() -> None:
    samplers = [
        Sampler(SamplingParams(temperature=0), constraint=constraint)
        for constraint in (Fails(late=False), None, Fails(late=True), None)
    ]
    found = choose_tokens(samplers, torch.from_numpy(LOGITS).expand(4, -1))
    best = SampledToken(int(LOGITS.argmax()), None)
    assert [str(choice) if isinstance(choice, GrammarError) else choice for choice in found] == [
        "no token is left",
        best,
        "not of the grammar",
        best,
    ]


@pytest.mark.parametrize("params", [SamplingParams(top_p=0.9, min_p=0.01), SamplingParams(top_k=5, top_logprobs=3)])
def test_a_choice_waits_for_its_device_only_when_it_is_brought_to_the_cpu(params: SamplingParams) -> None:
    sampler = Sampler(params, [1, 2])
    with FakeTensorMode():  # values cannot be read: an operation that needs one fails
        begun = sampler.begin(torch.empty(50))
    assert begun.token.shape == (1,)
