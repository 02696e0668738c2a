"""Turn a stream of tokens into a stream of text that never has to be taken back.

A token can end inside a UTF-8 character, and a stop string can be spread over several tokens: text is held back until
it is known to be complete and not the beginning of a stop string.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens: list[int] = []
        self._context_start = self._context_end = 0
        self._held = ""
        self.stopped = False
        """True once a stop string was met; it and what follows are not part of the text."""

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now certain."""
        self._tokens.append(token)
        # Tokens are decoded behind some that are out already: a tokenizer may treat the first one of a text otherwise.
        context = self._decode(self._context_start, self._context_end)
        text = self._decode(self._context_start, len(self._tokens))
        if text.endswith(_INCOMPLETE):
            return ""
        self._context_start, self._context_end = self._context_end, len(self._tokens)
        return self._release(text[len(context) :])

    def finish(self) -> str:
        """The rest of the text, when no token will follow."""
        if self.stopped:
            return ""
        context = self._decode(self._context_start, self._context_end)
        text = self._held + self._decode(self._context_start, len(self._tokens))[len(context) :]
        self._held = ""
        return text

    def _decode(self, start: int, stop: int) -> str:
        return str(self._tokenizer.decode(self._tokens[start:stop], skip_special_tokens=True))

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
