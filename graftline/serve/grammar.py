"""Answers that match a JSON schema: at each step only tokens that can still lead to a matching text are allowed.

llguidance (MIT, the extra ``structured``) decides which; a server without it refuses such requests. JSON is written
without spaces between its parts, as in OpenAI's structured outputs.
"""

import json
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from graftline.errors import ServingError

_OPTIONS: dict[str, Any] = {"whitespace_flexible": False}


class GrammarError(ServingError):
    """A grammar cannot be used, or failed."""


class Constraint(Protocol):
    """Which tokens may come next in one answer."""

    def allowed(self, num_tokens: int) -> np.ndarray:
        """Whether each of the ``num_tokens`` = V token ids may come next, bool (V,)."""

    def accept(self, token: int) -> None:
        """Record the token that was chosen."""


class Grammars:
    """Grammars over the tokens of one model, which has logits for ``num_tokens`` ids (the tokenizer may have fewer)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> None:
        self._tokenizer, self._num_tokens = tokenizer, num_tokens
        self._guide: Any = None

    def constraint(self, schema: Mapping[str, Any], stop_tokens: frozenset[int]) -> Constraint:
        """A constraint that makes one answer match a JSON schema; the first call takes a second for a large vocabulary.

        Raises:
            GrammarError: llguidance is not installed or cannot express the schema, or the model has no end token.
        """
        try:
            import llguidance
        except ImportError as error:
            raise GrammarError(
                "response_format needs a package that this server lacks (graftline[structured]); leave it out"
            ) from error
        if not stop_tokens:
            raise GrammarError("response_format: this model has no token that ends an answer")
        if self._guide is None:
            self._guide = llguidance.LLTokenizer(
                self._tokenizer.backend_tokenizer.to_str(), n_vocab=self._num_tokens, eos_token=min(stop_tokens)
            )
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=_OPTIONS)
            matcher = llguidance.LLMatcher(self._guide, grammar, log_level=0)
        except ValueError as error:
            raise GrammarError(f"response_format: this schema cannot be kept: {error}") from error
        if matcher.is_error():
            raise GrammarError(f"response_format: this schema cannot be kept: {matcher.get_error()}")
        return _Matched(matcher, stop_tokens)


class _Matched:
    """A constraint by llguidance's matcher."""

    def __init__(self, matcher: Any, stop_tokens: frozenset[int]) -> None:
        self._matcher, self._stop_tokens = matcher, stop_tokens

    def allowed(self, num_tokens: int) -> np.ndarray:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed_V = np.unpackbits(bits, bitorder="little", count=num_tokens).astype(bool)
        # The matcher knows one end token, but any of them may end the answer here.
        stops = sorted(self._stop_tokens)
        allowed_V[stops] = allowed_V[min(stops)]
        self._check()
        return allowed_V

    def accept(self, token: int) -> None:
        if token not in self._stop_tokens:
            self._matcher.consume_token(token)
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"the grammar failed: {self._matcher.get_error()}")
