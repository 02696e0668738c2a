"""Text that somebody else wrote, made safe to print on one line.

Reasons and names are free text. Printed as they are, a line end writes a line that nobody entered, an escape sequence
recolours or erases what stands before it, and a mark of direction shows letters in another order.
"""

import unicodedata

from graftline.errors import ConfigError


def one_line(text: str) -> str:
    r"""The text with every character that is not printable escaped as in Python: ``\n``, ``\x1b``, ``\u202e``."""
    return "".join(letter if _is_shown(letter) else _escaped(letter) for letter in text)


def check_text(what: str, text: str) -> str:
    """Return ``text`` if it can be written as UTF-8.

    Args:
        what: what it was given for, such as ``--reason``.
        text: what was given; a command line hands over bytes that are not UTF-8 as lone surrogates.

    Raises:
        ConfigError: it holds such bytes.
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
    """Spaces of every width are shown; control characters, marks of direction and of no width are not."""
    return letter.isprintable() or unicodedata.category(letter) == "Zs"


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")
