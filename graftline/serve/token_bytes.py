"""The bytes of single tokens.

A token may end inside a UTF-8 character; decoded alone it becomes U+FFFD and its bytes are lost. They follow from the
kind of the tokenizer's decoder: byte level (each character of a token's name stands for a byte, as in GPT-2) or byte
fallback (``<0xE2>`` is a byte, "▁" a space, as in SentencePiece).
"""

import json
import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
_BYTE_NAME = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BLANK = "\N{LOWER ONE EIGHTH BLOCK}"


class TokenBytes:
    """The bytes of a tokenizer's tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether a text's bytes are simply those of its tokens, joined."""
        return "ByteLevel" in self._decoders

    def of(self, token: int) -> bytes:
        """The bytes of a token; none for an unknown id."""
        if token in self._added:
            return self._added[token].encode()
        name = self.tokenizer.convert_ids_to_tokens(token)
        if not isinstance(name, str):
            return b""
        if self.is_byte_level:
            return b"".join(
                bytes([_BYTE_OF[character]]) if character in _BYTE_OF else character.encode() for character in name
            )
        if self._decoders & {"ByteFallback", "Metaspace"}:
            byte = _BYTE_NAME.fullmatch(name) if "ByteFallback" in self._decoders else None
            return bytes([int(byte[1], 16)]) if byte else name.replace(_BLANK, " ").encode()
        return str(self.tokenizer.decode([token])).encode()

    def is_text(self, token: int) -> bool:
        """Whether a token appears in answers: special tokens do not."""
        return token not in self._special

    def special(self, texts: Iterable[str]) -> frozenset[int]:
        """The special tokens among ``texts``."""
        wanted = set(texts)
        return frozenset(token for token in self._special if self._added.get(token) in wanted)

    def text(self, token: int) -> str:
        r"""A token's bytes as text; ``bytes:\xe2\x80``, as OpenAI writes it, where they end inside a character.

        Different tokens have different texts unless their bytes are equal.
        """
        data = self.of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    @cached_property
    def _decoders(self) -> frozenset[str]:
        """The kinds of the tokenizer's decoders."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        decoder = backend.decoder if backend is not None else None
        return frozenset(_kinds(json.loads(decoder.__getstate__()))) if decoder is not None else frozenset()

    @cached_property
    def _added(self) -> dict[int, str]:
        return {token: added.content for token, added in self.tokenizer.added_tokens_decoder.items()}

    @cached_property
    def _special(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset(self.tokenizer.all_special_ids) | {token for token, one in added if one.special}


def _kinds(decoder: dict[str, Any]) -> list[str]:
    return [decoder["type"], *(kind for one in decoder.get("decoders", ()) for kind in _kinds(one))]
