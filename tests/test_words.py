import pytest

from graftline.plain_text import count, duration


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [(1, "pipeline", "1 pipeline"), (0, "pipeline", "0 pipelines"), (2, "entry", "2 entries"), (2, "day", "2 days")],
)
def test_a_noun_goes_with_its_number(number: int, noun: str, text: str) -> None:
    assert count(number, noun) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 seconds"), (1.2, "1 second"), (119, "119 seconds"), (120, "2 minutes"), (5400, "90 minutes")],
)
def test_a_duration_has_a_unit_of_which_there_are_two(seconds: float, text: str) -> None:
    assert duration(seconds) == text
