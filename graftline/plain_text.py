"""Text for people: numbers with nouns, and untrusted text made safe to print on one line."""

import unicodedata

from graftline.errors import ConfigError

# Untrusted text, made safe to print on one line.
#
# Reasons and names are free text. Printed raw, a newline can fake a line, an escape sequence can recolour or erase
# earlier text, and a direction mark can reorder letters.


def one_line(text: str) -> str:
    r"""The text with every character that is not printable escaped as in Python: ``\n``, ``\x1b``, ``\u202e``."""
    return "".join(letter if _is_shown(letter) else _escaped(letter) for letter in text)


def check_text(what: str, text: str) -> str:
    """Return ``text`` if it can be written as UTF-8.

    Args:
        what: what the text was given for, such as ``--reason``.
        text: what was given; non-UTF-8 bytes of a command line arrive as lone surrogates.

    Raises:
        ConfigError: it contains such bytes.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{what} '{one_line(text)}' holds bytes that are not UTF-8, from position {error.start} on; write it in "
            "UTF-8, or set the terminal's encoding"
        ) from error
    return text


def _is_shown(letter: str) -> bool:
    """Spaces of every width are shown; control characters, direction marks and zero-width characters are not."""
    return letter.isprintable() or unicodedata.category(letter) == "Zs"


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


# Numbers with their nouns, for pages and messages.


def count(number: int, noun: str) -> str:
    """``1 pipeline``, ``2 pipelines``, ``0 entries``: the noun is given in the singular."""
    if number == 1:
        return f"1 {noun}"
    ending_in_y = noun.endswith("y") and noun[-2:-1] not in "aeiou"
    return f"{number} {noun[:-1]}ies" if ending_in_y else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """A rounded duration in the largest unit that gives at least two: ``45 seconds``, ``90 minutes``, ``3 hours``."""
    rounded = round(seconds)
    if rounded < 120:
        return count(rounded, "second")
    return count(round(seconds / 60), "minute") if rounded < 7200 else count(round(seconds / 3600), "hour")
