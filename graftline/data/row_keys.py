"""Digests that tell rows apart, as columns, made in one pass without holding any row.

A row costs 104 bytes, in a temporary file that is mapped into memory. Digests have 128 bits: among 10⁹ rows, two
different texts with the same one are expected once in 10²⁰ sets.
"""

import contextlib
import hashlib
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy
from numpy.typing import NDArray

from graftline.data.near import normalize, scratch_space_told
from graftline.data.rows import Message, Row
from graftline.digest import canonical_json
from graftline.logs import OnProgress, silent

Integers = NDArray[numpy.int64]
Keys = NDArray[Any]
"""(R,) of `KEYS`, or one of its columns."""
_DIGEST = "S16"
KEYS = numpy.dtype(
    [
        ("text", _DIGEST),  # equal for rows that are equal, letter by letter
        ("question", _DIGEST),  # …that ask the same question, letter by letter and turn by turn
        ("prompt", _DIGEST),  # …whose prompts are the same text
        ("normal", _DIGEST),  # …whose prompts differ in case, width and white space only
        ("answer", _DIGEST),  # …whose last answers are the same but for outer blanks
        ("rejected", _DIGEST),  # …of pairs, whose rejected answers are; nothing for other rows
        ("line", "<i8"),  # the row's source line
    ]
)
_BATCH_ROWS = 1000


def text_key(row: Row) -> str:
    """Equal for rows that are equal, letter by letter; pairs count with both answers."""
    return hashlib.sha256(_said(row, row.messages) + _rejected(row)).hexdigest()


@dataclass(frozen=True, eq=False, slots=True)
class RowKeys:
    """``whole``: (R,) of `KEYS`. ``numbers``: the numbers of the rows that are meant; None: all of them."""

    whole: Keys
    numbers: Integers | None = None

    def __getitem__(self, name: str) -> Keys:
        """(R,) one column."""
        column: Keys = self.whole[name]
        return column if self.numbers is None else column[self.numbers]

    @property
    def of_pairs(self) -> bool:
        """Whether the rows are preference pairs."""
        return bool((self["rejected"] != b"").any())


def make_keys(rows: Iterable[Row], num_rows: int, *, on_progress: OnProgress = silent) -> Keys:
    """(R,) of `KEYS`, in order.

    Args:
        rows: read once.
        num_rows: how many there are, for ``on_progress``.
        on_progress: called with the rows done and the rows in all.

    Raises:
        DataError: the folder for temporary files is full.
    """
    iterator, done = iter(rows), 0
    with contextlib.ExitStack() as opened:
        with scratch_space_told():
            file = opened.enter_context(tempfile.TemporaryFile())
        while batch := [_keys_of(row) for row in islice(iterator, _BATCH_ROWS)]:
            with scratch_space_told():
                file.write(numpy.array(batch, dtype=KEYS).data)
                file.flush()
            done += len(batch)
            on_progress(done, num_rows)
        return numpy.asarray(numpy.memmap(file, KEYS, "r")) if done else numpy.zeros(0, dtype=KEYS)


def first_of(keys: Keys) -> Integers:
    """(R,) number of the first row with the same key, which may be the row itself."""
    order = numpy.argsort(keys, kind="stable")
    ordered = keys[order]
    begins = numpy.r_[True, ordered[1:] != ordered[:-1]][: len(keys)]
    found = numpy.empty(len(keys), dtype=numpy.int64)
    found[order] = order[begins][numpy.cumsum(begins) - 1]
    return found


def opposite_of(questions: Keys, chosen: Keys, rejected: Keys) -> Integers:
    """(R,) number of the first pair that prefers the same two answers in opposite order; its own where none does."""
    count = len(questions)
    answers = first_of(numpy.concatenate([chosen, rejected]))
    orders = numpy.empty(2 * count, dtype=[(name, "<i8") for name in ("question", "better", "worse")])
    orders["question"] = numpy.tile(first_of(questions), 2)
    orders["better"] = answers
    orders["worse"] = numpy.roll(answers, count)
    found = first_of(orders)[count:]
    return numpy.where(found < count, found, numpy.arange(count))


def pairs(lines: Integers, at: Integers, other: Integers) -> tuple[tuple[int, int], ...]:
    """Source lines of the rows ``at``, each with that of the row ``other``."""
    return tuple(zip(lines[at].tolist(), lines[other].tolist(), strict=True))


def _keys_of(row: Row) -> tuple[bytes | int, ...]:
    prompt, question = row.prompt, _said(row, row.messages[:-1])
    return (
        _digest(question + _said(row, row.messages[-1:]) + _rejected(row)),
        _digest(question),
        _digest(_bytes(prompt)),
        _digest(_bytes(normalize(prompt))),
        _digest(_bytes(row.answer.strip())),
        b"" if row.rejected is None else _digest(_bytes(row.rejected.strip())),
        row.source_line,
    )


def _said(row: Row, messages: Sequence[Message]) -> bytes:
    # A tool's name is in its content; another speaker's is not.
    turns = [
        [message.role, message.content, *([message.fields["name"]] if message.is_text and message.fields else [])]
        for message in messages
    ]
    return canonical_json([row.tools, turns])


def _rejected(row: Row) -> bytes:
    return b"" if row.rejected is None else canonical_json(row.rejected)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:16]
