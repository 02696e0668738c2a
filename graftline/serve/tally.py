"""What can be read from an OpenAI-compatible answer that is only passed on: its end, its beginning, its tokens."""

import json
from typing import Any

from graftline.serve.rollouts import REFUSAL_CHARACTERS

_MAX_BYTES = 4 << 20
"""Bytes of a whole answer that are kept to be parsed; a longer one is passed on unread."""


class Tally:
    """Reads an answer's bytes as they pass: a JSON body, or server-sent events."""

    def __init__(self, *, is_stream: bool) -> None:
        self._is_stream, self._rest = is_stream, b""
        self.id: str | None = None
        self.beginning = ""
        self.finish_reason: str | None = None
        self.tokens: int | None = None
        self.failed = False
        """Whether an error came after the answer had begun."""
        self._events = 0

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        if self._is_stream:
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                if line.startswith(b"data:") and (text := line[5:].strip()) != b"[DONE]":
                    self._read(text)
        if len(self._rest) > _MAX_BYTES:
            self._rest = b""
        elif not self._is_stream:
            self._rest += data

    def end(self) -> None:
        """Note that there are no more bytes; again changes nothing."""
        if not self._is_stream:
            self._read(self._rest)
            self._rest = b""
        if self.tokens is None and self._events:
            self.tokens = self._events

    def _read(self, text: bytes) -> None:
        try:
            value: Any = json.loads(text)
            if isinstance(found := value.get("id"), str):
                self.id = self.id or found
            self.failed = self.failed or "error" in value
            if usage := value.get("usage"):
                self.tokens = int(usage["completion_tokens"])
            for choice in value.get("choices", ()):
                self.finish_reason = choice.get("finish_reason") or self.finish_reason
                part = choice.get("text") or (choice.get("delta") or choice.get("message") or {}).get("content")
                self._events += bool(part) and self._is_stream
                if len(self.beginning) < REFUSAL_CHARACTERS:
                    self.beginning += part or ""
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return  # not an answer that can be parsed; it was passed on unchanged
