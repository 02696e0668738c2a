"""One request in the scheduler: how its tokens are chosen, how they become text, and its state."""

import codecs
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from graftline.errors import ServingError
from graftline.export.onnx_session import GraphSession, Runner
from graftline.serve.grammar import Constraint, GrammarError
from graftline.serve.token_bytes import TokenBytes


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen.

    Applied in this order: penalties (repetition, then frequency and presence), the grammar, temperature, top-k, top-p,
    min-p; from temperature on as in transformers. Reported log-probabilities are the model's, before all of them.
    """

    temperature: float = 1.0
    """0: the most likely token; otherwise logits are divided by it."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens whose probabilities sum to this or more."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0: from all."""
    seed: int | None = None
    """Equal seeds give equal tokens from equal logits; None: a random seed."""
    top_logprobs: int | None = None
    """How many alternatives to report with each token; None: no log-probabilities."""
    min_p: float = 0.0
    """Sample from tokens at least this share as likely as the most likely one."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that it is in the answer."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token in the answer."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens in the prompt or answer, multiplies negative ones (Keskar 2019, §4.1)."""


@dataclass(frozen=True)
class SampledToken:
    """One chosen token."""

    token: int
    logprob: float | None
    """The model's, in nats."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens with their log-probabilities, best first."""


@dataclass(frozen=True)
class ChosenToken:
    """A token chosen on the logits' device, and what is to be told of it."""

    token: Tensor
    """Shape (1,)."""
    logprobs: Tensor | None
    """Of the token, then of the K most likely ones, shape (1 + K,)."""
    top: Tensor | None
    """The most likely tokens, shape (K,)."""


class Sampler:
    """Chooses the tokens of one request; ``prompt`` counts for the repetition penalty. V = vocabulary."""

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int] = (), constraint: Constraint | None = None
    ) -> None:
        self._params, self._constraint = params, constraint
        self._random = np.random.default_rng(None if params.seed is None else params.seed % 2**64)
        self._counts: Counter[int] = Counter()
        """How often each token was chosen."""
        self._seen = set(prompt)

    def begin(self, logits_V: Tensor) -> ChosenToken:
        """Choose on the device of fp32 logits (V,), which are not changed, without waiting for it.

        Raises:
            GrammarError: the constraint failed.
        """
        scores_V = self._penalized(logits_V)
        if self._constraint is not None:
            allowed_V = torch.from_numpy(self._constraint.allowed(len(scores_V))).to(scores_V.device)
            scores_V = torch.where(allowed_V, scores_V, -torch.inf)
        token = scores_V.max(0, keepdim=True).indices if self._params.temperature == 0 else self._sample(scores_V)
        if self._params.top_logprobs is None:
            return ChosenToken(token, None, None)
        logprobs_V = logits_V.log_softmax(0)
        best = logprobs_V.topk(min(self._params.top_logprobs, len(logprobs_V)))
        return ChosenToken(token, torch.cat([logprobs_V[token], best.values]), best.indices)

    def accept(self, token: int) -> None:
        """Count a token as chosen; GrammarError if the constraint refuses it."""
        if self._constraint is not None:
            self._constraint.accept(token)
        self._counts[token] += 1
        self._seen.add(token)

    def _penalized(self, logits_V: Tensor) -> Tensor:
        params, device = self._params, logits_V.device
        if params.repetition_penalty != 1.0 and self._seen:
            seen = torch.tensor(list(self._seen), device=device)
            values = logits_V[seen]
            divided = torch.where(values < 0, values * params.repetition_penalty, values / params.repetition_penalty)
            logits_V = logits_V.scatter(0, seen, divided)
        if (params.frequency_penalty or params.presence_penalty) and self._counts:
            tokens = torch.tensor(list(self._counts), device=device)
            counts = torch.tensor(list(self._counts.values()), dtype=torch.float32, device=device)
            penalties = params.frequency_penalty * counts + params.presence_penalty
            logits_V = logits_V.scatter_add(0, tokens, -penalties)
        return logits_V

    def _sample(self, logits_V: Tensor) -> Tensor:
        params = self._params
        kept, indices = logits_V.topk(min(params.top_k, len(logits_V))) if params.top_k else (logits_V, None)
        # Shifted first: divided by a tiny temperature, the largest logits would become infinite.
        probabilities = ((kept.double() - kept.max()) / params.temperature).softmax(0)
        if params.top_p < 1.0:
            ordered, order = probabilities.sort(descending=True, stable=True)
            cut = ordered.cumsum(0) - ordered >= params.top_p
            cut[:1] = False  # the most likely one always stays
            probabilities = probabilities.scatter(0, order, ordered.masked_fill(cut, 0.0))
        if params.min_p > 0.0:
            probabilities = probabilities.masked_fill(probabilities < params.min_p * probabilities.max(), 0.0)
        cumulative = probabilities.cumsum(0)
        # Inverse transform sampling: one uniform number a token.
        picked = torch.searchsorted(cumulative, self._random.random() * cumulative[-1:], right=True)
        picked = picked.clamp(max=len(cumulative) - 1)
        return picked if indices is None else indices[picked]


def choose_tokens(samplers: Sequence[Sampler], logits_BV: Tensor) -> list[SampledToken | GrammarError]:
    """The next token of each sequence, or how its constraint failed.

    All are chosen on the device of the fp32 logits, then what was chosen comes to the CPU at once.
    """
    begun: list[ChosenToken | GrammarError] = []
    for sampler, logits_V in zip(samplers, logits_BV, strict=True):
        try:
            begun.append(sampler.begin(logits_V))
        except GrammarError as error:
            begun.append(error)
    told = _to_cpu([choice for choice in begun if isinstance(choice, ChosenToken)])
    found: list[SampledToken | GrammarError] = []
    for sampler, choice in zip(samplers, begun, strict=True):
        try:
            if isinstance(choice, GrammarError):
                raise choice
            chosen = next(told)
            sampler.accept(chosen.token)
            found.append(chosen)
        except GrammarError as error:
            found.append(error)
    return found


def _to_cpu(choices: Sequence[ChosenToken]) -> Iterator[SampledToken]:
    """The choices as numbers: one copy brings all tokens, and one all log-probabilities."""
    if not choices:
        return
    tops = [choice.top for choice in choices if choice.top is not None]
    logprobs = [choice.logprobs for choice in choices if choice.logprobs is not None]
    numbers = iter(torch.cat([*(choice.token for choice in choices), *tops]).tolist())
    tokens = [next(numbers) for _ in choices]
    values = iter(torch.cat(logprobs).tolist() if logprobs else [])
    for token, choice in zip(tokens, choices, strict=True):
        if choice.top is None:
            yield SampledToken(token, None)
        else:
            own = next(values)
            yield SampledToken(token, own, tuple((next(numbers), next(values)) for _ in range(len(choice.top))))


_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4
"""Most bytes of a UTF-8 character, and so most tokens."""


class TextStream:
    """The text of one answer, ended by the strings in ``stop``.

    A token can end inside a UTF-8 character, and a stop string can be spread over several tokens, so text is held back
    until it is complete and cannot be the beginning of a stop string. The cost of a token does not depend on the length
    of the answer. Special tokens have no text, except those in ``shown``.
    """

    def __init__(self, token_bytes: TokenBytes, stop: Sequence[str] = (), shown: frozenset[int] = frozenset()) -> None:
        is_byte_level = token_bytes.is_byte_level
        self._decoder = (_ByteDecoder if is_byte_level else _WindowDecoder)(token_bytes, shown)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False
        """Whether a stop string was found; it and what follows are not part of the text."""

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now certain."""
        return self._release(self._decoder.push(token))

    def finish(self) -> str:
        """The rest of the text, after the last token."""
        if self.stopped:
            return ""
        text = self._held + self._decoder.finish()
        self._held = ""
        return text

    def _release(self, new: str) -> str:
        text = self._held + new
        found = [position for stop in self._stop if (position := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = self._length_to_hold(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _length_to_hold(self, text: str) -> int:
        longest = min(len(text), max((len(stop) for stop in self._stop), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0


class _ByteDecoder:
    """Text of tokens whose bytes can simply be joined."""

    def __init__(self, token_bytes: TokenBytes, shown: frozenset[int]) -> None:
        self._bytes, self._shown = token_bytes, shown
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        has_text = self._bytes.is_text(token) or token in self._shown
        return self._decoder.decode(self._bytes.of(token)) if has_text else ""

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowDecoder:
    """Text of tokens that decode differently at the beginning of a text: each is decoded after the ones before it."""

    def __init__(self, token_bytes: TokenBytes, shown: frozenset[int]) -> None:
        self._bytes, self._shown = token_bytes, shown
        self._tokens: list[int] = []
        self._context_start = self._context_end = 0

    def push(self, token: int) -> str:
        self._tokens.append(token)
        context, text = self._texts()
        is_pending = len(self._tokens) - self._context_end < _LONGEST_CHARACTER
        if text.endswith(_INCOMPLETE) and is_pending:
            return ""
        self._context_start, self._context_end = self._context_end, len(self._tokens)
        return text[len(context) :]

    def finish(self) -> str:
        context, text = self._texts()
        return text[len(context) :]

    def _texts(self) -> tuple[str, str]:
        recent = self._tokens[self._context_start :]
        context = recent[: self._context_end - self._context_start]
        return self._decode(context), self._decode(recent)

    def _decode(self, tokens: list[int]) -> str:
        kept = [token for token in tokens if self._bytes.is_text(token) or token in self._shown]
        return str(self._bytes.tokenizer.decode(kept, skip_special_tokens=False))


FinishReason = Literal["stop", "length", "cancelled", "error"]


class BusyError(ServingError):
    """The server is full; try again after ``retry_after_seconds``."""

    def __init__(self, message: str, retry_after_seconds: int) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


@dataclass(frozen=True)
class Delta:
    """A piece of an answer: its text and tokens; the last one says why the answer ends."""

    text: str = ""
    choices: tuple[SampledToken, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class LoadedModel:
    """What a request runs on. Requests with equal keys share batches."""

    key: str
    """Digest of base graph and adapter, so that no batch mixes two versions of an adapter."""
    session: GraphSession
    runner: Runner


@dataclass(eq=False)
class Generation:
    """A request and its state, which only the scheduler's thread changes."""

    model: LoadedModel
    prompt: tuple[int, ...]
    max_tokens: int
    sampler: Sampler
    text: TextStream
    stop_tokens: frozenset[int]
    emit: Callable[[Delta], None]
    """Called in the scheduler's thread; must return at once."""
    cancelled: bool = False
    """Set from any thread when the client has disconnected."""
    num_prefilled: int = 0
    tokens: list[int] = field(default_factory=list)

    @property
    def num_needed(self) -> int:
        """Cache positions that the request may need."""
        return len(self.prompt) + self.max_tokens

    @property
    def length(self) -> int:
        """Tokens so far, the newest included."""
        return len(self.prompt) + len(self.tokens)

    def accept(self, choice: SampledToken) -> bool:
        """Add the next token and tell the client; returns whether the answer is complete."""
        if choice.token in self.stop_tokens:
            self.emit(Delta(self.text.finish(), (), "stop"))
            return True
        self.tokens.append(choice.token)
        text = self.text.push(choice.token)
        if self.text.stopped:
            self.emit(Delta(text, (choice,), "stop"))
            return True
        if len(self.tokens) >= self.max_tokens:
            self.emit(Delta(text + self.text.finish(), (choice,), "length"))
            return True
        self.emit(Delta(text, (choice,)))
        return False
