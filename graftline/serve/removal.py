"""Removes passwords, keys, tokens and what a project's patterns match from a request, before it is logged.

Patterns are RE2's, which takes time in proportion to the text whatever the pattern, so that no text can hold up the
server. They are applied to each text by itself: a secret that is split over two messages is not found.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow
from pyarrow import compute

from graftline.registry.request_log import REMOVED

_WORDS = (
    r"(?:password|passwd|passphrase|passcode|pwd|secret(?:[ _-](?:access[ _-])?key)?|credentials?|api[ _-]?key"
    r"|(?:access|private|auth|account)[ _-]?key)"
)
_NAMES = rf"(?:{_WORDS}[a-z0-9_-]*|token(?:[0-9_-][a-z0-9_-]*|value|secret)?)"  # not `tokens`, which are counted
_SECRET_NAME = re.compile(
    rf"(?:{_WORDS}|(?:password|secret|api[_-]?key)s|token|(?:\A|.*[_-])(?:pass|authorization|cookie))\Z", re.IGNORECASE
)
_QUOTED = r"\"(?:[^\"\\]|\\.)*(?:\"|\z)|'(?:[^'\\]|\\.)*(?:'|\z)"
_ASSIGNED = r"(?:=>|:=|={1,3}|[:：])[\s*`]*"
_PATTERNS: tuple[tuple[str, str], ...] = (
    (
        r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY[A-Z ]*-----(?s:.*?)(?:-----END [A-Z0-9 ]*PRIVATE KEY[A-Z ]*-----|\z)",
        "",
    ),
    (r"LS0tLS1CRUdJT[A-Za-z0-9+/=_-]{20,}", ""),  # the same in base64, as Kubernetes has it
    (r"PuTTY-User-Key-File-[23]:(?s:.*?)(?:Private-MAC:\s*\S+|\z)", ""),
    (r"\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}\b", ""),
    (r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{22,}|gl[a-z]{2,4}-[A-Za-z0-9_-]{20,})", ""),
    (r"\bsk-[A-Za-z0-9_-]{20,}", ""),
    (r"\b(?:hf|npm|dop_v1|shpat|lin_api)_[A-Za-z0-9]{20,}", ""),
    (r"\b(?:xox[a-z]-|xapp-)[A-Za-z0-9-]{10,}", ""),
    (r"(\bhooks\.slack\.com/(?:services|workflows|triggers)/)[A-Za-z0-9/_-]+", r"\1"),
    (r"(\bdiscord(?:app)?\.com/api/webhooks/)[A-Za-z0-9/_-]+", r"\1"),
    (r"\b[0-9]{8,10}:[A-Za-z0-9_-]{35}\b", ""),
    (r"\bAIza[A-Za-z0-9_-]{35}", ""),
    (r"\bSG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}", ""),
    (r"\b[rsp]k_(?:live|test)_[A-Za-z0-9]{16,}", ""),
    (r"\bwhsec_[A-Za-z0-9+/=]{24,}", ""),
    (r"\bpypi-[A-Za-z0-9_-]{50,}", ""),
    (r"\beyJ[A-Za-z0-9_-]{6,}\.[A-Za-z0-9_-]{6,}(?:\.[A-Za-z0-9_-]*)?", ""),
    (r"(?i)(\b(?:authorization[\"']?\s*[:=]\s*[\"']?(?:bearer|basic)|bearer)\s+)[A-Za-z0-9._~+/=-]{16,}", r"\1"),
    (r"(?i)(\bauthorization\\?[\"']?\s*[:=]\s*\\?[\"']?(?:bearer|basic|token|digest)\s+)[^\s\"'\\]{4,}", r"\1"),
    (r"(?i)(\b[a-z][a-z0-9+.-]*://)[^\s/]+@", r"\1"),
    (r"(?i)([?&](?:sig|signature|x-amz-(?:signature|credential)|x-goog-signature|key|code|auth)=)[^\s&\"'<>]+", r"\1"),
    (rf"(?i)(<{_NAMES}[^<>]*>\s*)[^<]*[^<\s]", r"\1"),
    # JSON, perhaps within JSON, whose quotes then have a backslash.
    (
        rf"(?i)({_NAMES}\\*[\"']\s*(?:=>|[:=])\s*)"
        rf"(?:\\+\"[^\"]*(?:\"|\z)|{_QUOTED}|\[[^\[\]]*(?:\]|\z)|[^\s\"',;&{{}}\[\]\\]{{4,}})",
        r"\1",
    ),
    (
        rf"(?i)((?:{_NAMES}|(?:\b|_)pass\b)[*`\s]*{_ASSIGNED})"
        rf"(?:\\+\"[^\"]*(?:\"|\z)|{_QUOTED}|[^\s\"'{{\[]\S{{3,}})",
        r"\1",
    ),
    (r"(?i)(\b(?:set-)?cookie\\?[\"']?\s*[:=]\s*\\?[\"']?)[^\n\"']{4,}", r"\1"),
    (rf"(?i)(\s--?{_NAMES}\s+)(?:{_QUOTED}|[^\s\"'-]\S*)", r"\1"),
    (r"(?i)(\bcurl\b[^\n]*\s(?:-u|--user)\s*[\"']?[^\s:\"']+:)[^\s\"']+", r"\1"),
    (r"(?i)(\b(?:password|passwd|passphrase|passcode|pwd)\s+(?:is|was)\s+)\S+", r"\1"),
    (rf"(?i)({_NAMES}\s+(?:is|was)\s+[\"'`]?)(?:[^\s\"'`]{{3,}}[0-9][^\s\"'`]*|[^\s\"'`]*[0-9][^\s\"'`]{{4,}})", r"\1"),
)
"""What secrets look like, and the part of a match that stays."""
_STRUCTURE = frozenset(
    {"role", "system", "user", "assistant", "tool", "content", "reasoning_content", "name", "id", "type", "function"}
    | {"tool_calls", "tool_call_id", "arguments", "parameters", "description", "properties", "object", "string"}
)
"""Texts of turns and tools that stay as they are where they stand alone, or no row could be made of a request."""


_SCHEMA = frozenset({"type", "$ref", "anyOf", "oneOf", "allOf", "description", "properties"})
"""Keys of which a JSON schema has one: a tool's parameter may be called `password`."""
_SCHEMA_VALUES = frozenset({"default", "example", "examples", "const", "enum"})


class Remover:
    """Replaces what is to be removed by ``[removed]``; counts it.

    Args:
        patterns: further regular expressions, RE2's; each is known to be one.
    """

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        self._patterns = [*_PATTERNS, *((pattern, "") for pattern in patterns)]

    def clean(self, value: Any) -> tuple[Any, int]:
        """A JSON value without secrets, in texts, numbers and keys, and how many pieces were removed.

        A value whose key names a secret, such as ``{"password": "…"}``, is removed whatever it looks like; so are the
        texts and numbers in it if it is a list or an object.
        """
        texts: list[str] = []
        _collect(value, texts)
        cleaned, num_removed = self._clean_texts(texts)
        replaced = iter(cleaned)
        rebuilt, num_named = _rebuild(value, replaced)
        return rebuilt, num_removed + num_named

    def _clean_texts(self, texts: list[str]) -> tuple[list[str], int]:
        column = pyarrow.array([text.encode("utf-8", "replace").decode() for text in texts], pyarrow.string())
        num_removed = 0
        for pattern, stays in self._patterns:
            found = compute.sum(compute.count_substring_regex(column, pattern)).as_py() or 0
            if found:
                column = compute.replace_substring_regex(column, pattern, stays + REMOVED)
                num_removed += found
        cleaned: list[str] = column.to_pylist()
        return cleaned, num_removed


def _collect(value: Any, texts: list[str]) -> None:
    if isinstance(value, str):
        if value not in _STRUCTURE:
            texts.append(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        texts.append(str(value))
    elif isinstance(value, dict):
        for key, item in value.items():
            _collect(key, texts)
            _collect(item, texts)
    elif isinstance(value, list | tuple):
        for item in value:
            _collect(item, texts)


def _rebuild(value: Any, texts: Iterator[str], *, is_secret: bool = False) -> tuple[Any, int]:
    """The value with its texts replaced, in the order of `_collect`, and without what secret names hold."""
    if isinstance(value, list | tuple):
        items = [_rebuild(item, texts, is_secret=is_secret) for item in value]
        return [item for item, _ in items], sum(number for _, number in items)
    if isinstance(value, dict):
        return _rebuild_object(value, texts, is_secret=is_secret)
    if value is None or isinstance(value, bool):
        return value, 0
    given = str(value)
    cleaned = given if given in _STRUCTURE and isinstance(value, str) else next(texts)
    if is_secret and cleaned != REMOVED:
        return REMOVED, 1
    return cleaned if isinstance(value, str) or cleaned != given else value, 0


def _rebuild_object(value: dict[str, Any], texts: Iterator[str], *, is_secret: bool) -> tuple[dict[str, Any], int]:
    rebuilt: dict[str, Any] = {}
    num_removed, is_schema = 0, is_secret and not _SCHEMA.isdisjoint(value)
    for key, given in value.items():
        name, _ = _rebuild(key, texts)
        hides = _SECRET_NAME.search(key) is not None or (is_secret and (not is_schema or key in _SCHEMA_VALUES))
        rebuilt[name], number = _rebuild(given, texts, is_secret=hides)
        num_removed += number
    return rebuilt, num_removed
