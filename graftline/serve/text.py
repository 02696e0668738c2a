"""Turn a stream of tokens into a stream of text that never has to be taken back.

A token can end inside a UTF-8 character, and a stop string can be spread over several tokens: text is held back until
it is known to be complete and not the beginning of a stop string. Each token costs the same however long the answer is,
and however long its bytes make no character.
"""

import codecs
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from graftline.serve.token_bytes import TokenBytes

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4
"""Bytes of a UTF-8 character at most, and so tokens."""


class TextStream:
    """The text of one answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        token_bytes = TokenBytes(tokenizer)
        self._decoder = _ByteDecoder(token_bytes) if token_bytes.is_byte_level else _WindowDecoder(tokenizer)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False
        """True once a stop string was met; it and what follows are not part of the text."""

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now certain."""
        return self._release(self._decoder.push(token))

    def finish(self) -> str:
        """The rest of the text, when no token will follow."""
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
    """Text of tokens whose bytes follow one another."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._bytes.of(token)) if self._bytes.is_text(token) else ""

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowDecoder:
    """Text of tokens that mean something else at the beginning of a text: each is decoded behind some before it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
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
        tokens = self._tokens
        return self._decode(tokens[self._context_start : self._context_end]), self._decode(
            tokens[self._context_start :]
        )

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))
