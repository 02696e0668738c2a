"""Choose the next token from logits.

Order: penalties (repetition, then frequency and presence), what a grammar allows, temperature, top-k, top-p, min-p;
from temperature on as in transformers. Probabilities that are reported are those before any of them (OpenAI's logprobs
are the model's). Temperature 0 takes the most likely token.

Dimensions: V = vocabulary.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graftline.serve.grammar import Constraint


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen."""

    temperature: float = 1.0
    """0: the most likely token. Otherwise logits are divided by it."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens whose probabilities sum to this or more."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0: from all."""
    seed: int | None = None
    """Equal seeds give equal tokens from equal logits; None: another one each time."""
    top_logprobs: int | None = None
    """How many alternatives to report with each token; None: no log-probabilities at all."""
    min_p: float = 0.0
    """Sample from tokens at least this share as likely as the most likely one."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time that the answer has it already."""
    presence_penalty: float = 0.0
    """Taken from the logit of each token that the answer has already."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that prompt or answer have, multiplies negative ones (Keskar 2019, §4.1)."""


@dataclass(frozen=True)
class Choice:
    """One chosen token."""

    token: int
    logprob: float | None
    """Of the model, before penalties, temperature and cuts, in nats."""
    top: tuple[tuple[int, float], ...] = ()
    """Most likely tokens with their log-probabilities, best first."""


class Sampler:
    """The choices of one request.

    Args:
        params: how to choose.
        prompt: the tokens before the first choice, for the repetition penalty.
        constraint: what may be chosen at all; None: everything.
    """

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int] = (), constraint: Constraint | None = None
    ) -> None:
        self._params, self._constraint = params, constraint
        self._random = np.random.default_rng(params.seed)
        self._counts: Counter[int] = Counter()
        """How often each token was chosen."""
        self._seen = set(prompt)

    def choose(self, logits_V: np.ndarray) -> Choice:
        """Choose from fp32 logits (V,), which stay as they are.

        Raises:
            GrammarError: the constraint failed.
        """
        scores_V = self._penalized(logits_V)
        if self._constraint is not None:
            scores_V = np.where(self._constraint.allowed(len(scores_V)), scores_V, np.float32(-np.inf))
        token = int(scores_V.argmax()) if self._params.temperature == 0 else self._sample(scores_V)
        if self._constraint is not None:
            self._constraint.accept(token)
        self._counts[token] += 1
        self._seen.add(token)
        if self._params.top_logprobs is None:
            return Choice(token, None)
        logprobs_V = _log_softmax(logits_V)
        best = _top_indices(logprobs_V, self._params.top_logprobs)
        return Choice(token, float(logprobs_V[token]), tuple((int(i), float(logprobs_V[i])) for i in best))

    def _penalized(self, logits_V: np.ndarray) -> np.ndarray:
        params = self._params
        if params.repetition_penalty != 1.0 and self._seen:
            seen = np.fromiter(self._seen, np.int64)
            values = logits_V[seen]
            logits_V = logits_V.copy()
            logits_V[seen] = np.where(
                values < 0, values * params.repetition_penalty, values / params.repetition_penalty
            )
        if (params.frequency_penalty or params.presence_penalty) and self._counts:
            tokens = np.fromiter(self._counts, np.int64)
            counts = np.fromiter(self._counts.values(), np.float32)
            logits_V = logits_V.copy()
            logits_V[tokens] -= params.frequency_penalty * counts + params.presence_penalty
        return logits_V

    def _sample(self, logits_V: np.ndarray) -> int:
        params = self._params
        indices = _top_indices(logits_V, params.top_k) if params.top_k else None
        kept = logits_V if indices is None else logits_V[indices]
        # Shifted first: divided by a tiny temperature, the largest logits would be infinite and their differences lost.
        probabilities = np.exp(_log_softmax((kept.astype(np.float64) - kept.max()) / params.temperature))
        if params.top_p < 1.0:
            order = np.argsort(-probabilities, kind="stable")
            before = np.cumsum(probabilities[order]) - probabilities[order]
            probabilities[order[before >= params.top_p]] = 0.0
        if params.min_p > 0.0:
            probabilities[probabilities < params.min_p * probabilities.max()] = 0.0
        cumulative = np.cumsum(probabilities)
        # Inverse transform: one uniform number a token, whatever the vocabulary's size.
        picked = int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))
        picked = min(picked, len(cumulative) - 1)
        return picked if indices is None else int(indices[picked])


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def _top_indices(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the ``count`` largest values, largest first."""
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    chosen = np.argpartition(-values, count)[:count]
    return chosen[np.argsort(-values[chosen], kind="stable")]
