import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftline.errors import ConfigError
from graftline.plain_text import check_text, one_line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("größer, 15 % “better” 好 👍", "größer, 15 % “better” 好 👍"),
        ("a\u00a0b\u202fc", "a\u00a0b\u202fc"),
        ("bad\n   4  2026", "bad\\n   4  2026"),
        ("bad\r\nx\ty", "bad\\r\\nx\\ty"),
        ("\x1b[2K\x1b[1A", "\\x1b[2K\\x1b[1A"),
        ("\x9b31m", "\\x9b31m"),
        ("a\u2028b\u2029c\x85d\x0be\x0cf", "a\\u2028b\\u2029c\\x85d\\x0be\\x0cf"),
        ("\u202edet\u2066ecart", "\\u202edet\\u2066ecart"),
        ("zero\u200bwidth\ufeff", "zero\\u200bwidth\\ufeff"),
        ("caf\udce9", "caf\\udce9"),
    ],
)
def test_what_is_not_printable_is_escaped(text: str, shown: str) -> None:
    assert one_line(text) == shown


@given(st.text(alphabet=st.characters(codec=None)))
def test_any_text_is_one_line_that_can_be_written(text: str) -> None:
    shown = one_line(text)
    shown.encode()
    assert shown.splitlines() in ([], [shown])
    assert one_line(shown) == shown


def test_bytes_that_are_not_utf_8_are_refused_with_their_place() -> None:
    assert check_text("--reason", "größer") == "größer"
    with pytest.raises(ConfigError, match=r"--reason 'caf.*' holds bytes that are not UTF-8, from position 3 on"):
        check_text("--reason", os.fsdecode(b"caf\xe9"))
