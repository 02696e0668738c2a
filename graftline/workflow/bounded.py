"""Markdown that fits: what is cut is counted, and what was open is closed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

MAX_BYTES = 60_000
"""Of a comment. GitHub refuses more than 65,536 characters. Bytes are at least as many as characters, however a server
counts those; the rest is room for what it adds."""
_MAX_LINE_BYTES = 4_000
_FENCE = re.compile(r"\s*(`{3,}|~{3,})")


def size(lines: Sequence[str]) -> int:
    """UTF-8 bytes of the lines with their ends."""
    return sum(len(line.encode()) + 1 for line in lines)


def clip(text: str, max_bytes: int) -> str:
    """The beginning of a text, with … where something was left out; never half a character."""
    data = text.encode()
    return text if len(data) <= max_bytes else data[: max_bytes - 3].decode(errors="ignore") + "…"


def clip_pair(old: str, new: str, max_bytes: int) -> tuple[str, str]:
    """Two texts that differ, each cut so that the first difference is still seen."""
    same = next(
        (i for i, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]), min(len(old), len(new))
    )
    start = max(0, same - max_bytes // 8)
    if start and max(size([old]), size([new])) > max_bytes:
        old, new = "…" + old[start:], "…" + new[start:]
    return clip(old, max_bytes), clip(new, max_bytes)


def cut(lines: Sequence[str], max_bytes: int) -> list[str]:
    """The lines, or the first of them that fit with the note that says how many are missing.

    A code block or ``<details>`` that was open at the cut is closed, so that what follows is shown as meant.
    """
    lines = [clip(line, _MAX_LINE_BYTES) for line in lines]
    if size(lines) <= max_bytes:
        return lines
    room = max_bytes - size(_note(len(lines)))
    used, state = 0, _Open()
    for kept, line in enumerate(lines):
        used, after = used + size([line]), state.after(line)
        if used + size(after.closers) > room:
            return [*lines[:kept], *state.closers, *_note(len(lines) - kept)]
        state = after
    return lines


def _note(missing: int) -> list[str]:
    return ["", f"*{missing} more lines are in the run's files.*"]


@dataclass(frozen=True)
class _Open:
    """What is open after some lines of Markdown: the mark that ends a code block, and how many ``<details>``."""

    fence: str = ""
    details: int = 0

    def after(self, line: str) -> "_Open":
        found = _FENCE.match(line)
        if self.fence:
            ends = found and found[1].startswith(self.fence) and not line.strip().strip(self.fence[0])
            return replace(self, fence="") if ends else self
        if found:
            return replace(self, fence=found[1])
        return replace(self, details=max(0, self.details + line.count("<details") - line.count("</details>")))

    @property
    def closers(self) -> list[str]:
        return [*([self.fence] if self.fence else []), *(["", "</details>"] * self.details)]
