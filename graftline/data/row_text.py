"""The text of a field: there, not empty, whole, and not too long."""

from typing import Any

from graftline.data.records import MAX_ROW_BYTES, RecordPlace
from graftline.data.turns import short
from graftline.errors import DataError

FILL = "complete the row, remove it, or set data.empty to drop, which leaves such rows out"
"""What to do about a row that is empty."""


class EmptyRowError(DataError):
    """A row that asks nothing, or has no answer to learn."""


def checked_text(value: Any, field: str, place: RecordPlace) -> str:
    """The text, or an error that names the field and the place.

    Raises:
        EmptyRowError: it is null, empty or only blanks.
        DataError: it is not text, or is damaged or too long.
    """
    if value is None:
        raise EmptyRowError(f"{place}: {field!r} is null; {FILL}")
    if not isinstance(value, str):
        raise DataError(f"{place}: {field!r} is {short(value)}; expected text (a number must be written in quotes)")
    if not value.strip():
        raise EmptyRowError(f"{place}: {field!r} is empty or only blanks; {FILL}")
    if "\0" in value:
        raise DataError(f"{place}: {field!r} holds NUL at character {value.index(chr(0)) + 1}; remove it")
    try:
        num_bytes = len(value.encode())
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: {field!r} holds half a surrogate pair at character {error.start + 1}; repair the text"
        ) from error
    if num_bytes > MAX_ROW_BYTES:
        raise DataError(
            f"{place}: {field!r} has {num_bytes >> 20} MiB, a row may have {MAX_ROW_BYTES >> 20} MiB; split it"
        )
    return value
