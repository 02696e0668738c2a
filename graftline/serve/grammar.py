"""Answers of a certain form: at each step only tokens that can still lead to a text of that form are allowed.

The forms are a JSON schema and calls of tools as the model writes them (`graftline.data.answer_parts`). llguidance
(MIT, the extra ``structured``) decides which tokens are allowed; a server without it refuses such requests. JSON is
written without spaces between its parts, as in OpenAI's structured outputs.
"""

import json
import re
import threading
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from graftline.data.answer_parts import CallFormat
from graftline.errors import ServingError
from graftline.serve.body import FieldError
from graftline.serve.token_bytes import TokenBytes

_OPTIONS: dict[str, Any] = {"whitespace_flexible": False}


class GrammarError(ServingError):
    """A grammar failed while an answer was generated."""


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
        self._lock = threading.Lock()
        self._guide: Any = None
        self._end = -1
        """The token that stands for an answer's end in the library; chosen with the first grammar."""

    def constraint(self, schema: Mapping[str, Any], ends: frozenset[int]) -> Constraint:
        """A constraint that makes one answer match a JSON schema; the first call takes a second for a large vocabulary.

        Args:
            schema: the schema.
            ends: the model's tokens that end an answer. A request's own stop tokens are not among them: they end it
                where the form allows them as text.

        Raises:
            FieldError: llguidance is not installed or cannot express the schema, or the model has no end token.
        """
        matcher = _library("response_format").LLMatcher
        try:
            grammar = matcher.grammar_from_json_schema(json.dumps(schema), defaults=_OPTIONS)
        except ValueError as error:
            raise FieldError("response_format", f"this schema cannot be kept: {error}") from error
        return self._matched(grammar, ends, "response_format")

    def calls(
        self, form: CallFormat, tools: Mapping[str, Mapping[str, Any]], ends: frozenset[int], *, must_call: bool
    ) -> Constraint:
        """A constraint under which each call is of one of ``tools`` (a schema of the arguments by name) and matches it.

        Args:
            form: how the model writes a call.
            tools: schemas by name.
            ends: as in `constraint`.
            must_call: the answer is one call; otherwise words, with calls where the model wants them.

        Raises:
            FieldError: as in `constraint`, or it is not known how the model writes calls.
        """
        field = "tool_choice" if must_call else "tools"
        library = _library(field)
        if form.written is None:
            raise FieldError(field, "it is not known how this model writes calls, so none can be enforced; use auto")
        before, between, after = form.written
        head = form.tags.opens or "{"
        opens, rest = self._literal(head), before.removeprefix(head)
        schemas = {name: json.dumps({"x-guidance": _OPTIONS, "type": "object", **tools[name]}) for name in tools}
        bodies = " | ".join(
            f"({self._literal(rest + name + between)} %json {schema} {self._literal(after)})"
            for name, schema in schemas.items()
        )
        lines = ["%llguidance {}", f"body: {bodies}"]
        if must_call:
            lines += [f"start: {opens} body"]
        elif not form.tags.opens:
            lines += [f"start: TEXT | {opens} body", r"TEXT: /([^{\s](.|\n)*)?/"]
        else:
            is_text = opens.startswith('"')
            lines += [
                "start: call* TEXT",
                r"TEXT: /(.|\n)*/",
                *([f"head[lazy]: TEXT {opens}", "call: head body"] if is_text else [f"call: TEXT {opens} body"]),
            ]
        return self._matched(library.LLMatcher.grammar_from_lark("\n".join(lines)), ends, field)

    def _matched(self, grammar: str, ends: frozenset[int], field: str) -> Constraint:
        library = _library(field)
        if not ends:
            raise FieldError(field, "this model has no token that ends an answer, so its form cannot be kept")
        with self._lock:
            if self._guide is None:
                self._end = min(ends)
                self._guide = library.LLTokenizer(
                    self._tokenizer.backend_tokenizer.to_str(), n_vocab=self._num_tokens, eos_token=self._end
                )
        try:
            matcher = library.LLMatcher(self._guide, grammar, log_level=0)
        except ValueError as error:
            raise FieldError(field, f"this schema cannot be kept: {error}") from error
        if matcher.is_error():
            raise FieldError(field, f"this schema cannot be kept: {matcher.get_error()}")
        return _Matched(matcher, ends, self._end)

    def _literal(self, text: str) -> str:
        """A text in a grammar; special tokens by their ids, since their texts stand for nothing else."""
        pieces = self._specials.split(text) if self._special_ids else [text]
        return " ".join(
            f"<[{self._special_ids[piece]}]>" if piece in self._special_ids else json.dumps(piece, ensure_ascii=False)
            for piece in pieces
            if piece
        )

    @cached_property
    def _special_ids(self) -> dict[str, int]:
        added = self._tokenizer.added_tokens_decoder
        return {token.content: number for number, token in added.items() if token.special}

    @cached_property
    def _specials(self) -> re.Pattern[str]:
        return re.compile("(" + "|".join(map(re.escape, sorted(self._special_ids, key=len, reverse=True))) + ")")


def _library(field: str) -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise FieldError(
            field, "this needs a package that the server lacks (graftline[structured]); leave it out"
        ) from error
    return llguidance


class AfterReasoning:
    """A constraint that begins once the reasoning is closed; until then everything but an end is allowed."""

    def __init__(self, inner: Constraint, closes: str, token_bytes: TokenBytes, ends: frozenset[int]) -> None:
        self._inner, self._closes, self._bytes = inner, closes.encode(), token_bytes
        self._ends = sorted(ends)
        self._tail, self._is_open = b"", True

    def allowed(self, num_tokens: int) -> np.ndarray:
        """As in `Constraint`."""
        if not self._is_open:
            return self._inner.allowed(num_tokens)
        allowed_V = np.ones(num_tokens, bool)
        allowed_V[self._ends] = False
        return allowed_V

    def accept(self, token: int) -> None:
        """As in `Constraint`."""
        if not self._is_open:
            self._inner.accept(token)
            return
        text = self._tail + self._bytes.of(token)
        self._is_open = self._closes not in text
        if text.partition(self._closes)[2].strip():
            raise GrammarError("one token closes the reasoning and begins the answer")
        self._tail = text[-len(self._closes) :]


class _Matched:
    """A constraint by llguidance's matcher."""

    def __init__(self, matcher: Any, ends: frozenset[int], end: int) -> None:
        self._matcher, self._ends, self._end = matcher, sorted(ends), end

    def allowed(self, num_tokens: int) -> np.ndarray:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed_V = np.unpackbits(bits, bitorder="little", count=num_tokens).astype(bool)
        # The matcher knows one end token, but any of them may end the answer here.
        may_end = allowed_V[self._end]
        allowed_V[self._end] = False
        allowed_V[self._ends] = may_end
        self._check()
        return allowed_V

    def accept(self, token: int) -> None:
        if token not in self._ends:
            self._matcher.consume_token(token)
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"the grammar failed: {self._matcher.get_error()}")
