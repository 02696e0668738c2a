"""Preference pairs: read in their spellings, refused where they compare nothing, written and read again."""

from pathlib import Path
from typing import Any

import pytest

from graftline.data.checks import check_encoded, check_texts
from graftline.data.encoding import encode_rows
from graftline.data.row_file import spool_rows
from graftline.data.rows import Row, read_rows, rows_from_objects, write_rows
from graftline.data.screening import screen
from graftline.errors import DataError
from graftline.evaluate.items import option_items
from graftline.evaluate.scores import item_id
from tests.tiny import make_tokenizer

ASKED = {"role": "user", "content": "Name a colour."}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Blue is one.", "No."))
PAIR = {"prompt": "Name a colour.", "chosen": "Blue is one.", "rejected": "No."}
SPELLINGS: list[dict[str, Any]] = [
    PAIR,
    {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": [ASKED], "chosen": "Blue is one.", "rejected": "No."},
    {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    {"prompt": "Name a colour.", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
]


def pairs(*values: dict[str, Any]) -> list[Row]:
    return rows_from_objects(values, origin="pairs", format="preference")


@pytest.mark.parametrize("given", SPELLINGS)
def test_every_spelling_of_a_pair_is_one_row_with_two_answers(given: dict[str, Any]) -> None:
    (row,) = rows_from_objects([given], origin="pairs")
    (plain,) = pairs(PAIR)
    assert row == plain
    assert (row.prompt, row.answer, row.rejected) == ("Name a colour.", "Blue is one.", "No.")
    assert (row.with_rejected.answer, row.with_rejected.rejected) == ("No.", None)
    assert [message.supervised for message in row.messages] == [False, True]


def test_only_the_last_answer_of_a_conversation_is_learned() -> None:
    earlier = [ASKED, GOOD, {"role": "user", "content": "Another."}]
    (row,) = pairs({"system": "Be kind.", "chosen": [*earlier, GOOD], "rejected": [*earlier, BAD]})
    assert [message.supervised for message in row.messages] == [False, False, False, False, True]
    assert row.messages[0].role == "system"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (PAIR | {"rejected": " Blue is one.\n"}, "'chosen' and 'rejected' are the same answer"),
        (PAIR | {"rejected": "  "}, "'rejected' is empty"),
        (PAIR | {"rejected": None}, "'rejected' null in a preference row"),
        ({"chosen": "a", "rejected": "b"}, "'prompt' is missing"),
        (
            {"chosen": [ASKED, GOOD], "rejected": [ASKED | {"content": "Name a shape."}, BAD]},
            "answer different prompts",
        ),
        ({"chosen": [ASKED, GOOD], "rejected": [ASKED, GOOD, ASKED, BAD]}, "answer different prompts"),
        ({"chosen": [ASKED, GOOD], "rejected": [ASKED, ASKED]}, "the last turn of 'rejected' is the user's"),
        ({"chosen": [ASKED, ASKED], "rejected": [ASKED, BAD]}, "no assistant turn"),
        (PAIR | {"prompt": "Else.", "chosen": [ASKED, GOOD]}, "'prompt' is not a turn of the conversation"),
        (
            {"prompt": [ASKED], "chosen": [GOOD | {"reasoning_content": "Hm."}], "rejected": [BAD]},
            "holds tool calls or reasoning",
        ),
        (PAIR | {"chosen": 3}, "'chosen' is int '3'; expected text"),
    ],
)
def test_a_pair_that_compares_nothing_is_refused_with_its_row(given: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as told:
        pairs(PAIR, given)
    assert "row 2" in str(told.value)


def test_written_pairs_are_read_again(tmp_path: Path) -> None:
    rows = pairs(
        PAIR,
        {"system": "Be kind.", "prompt": "Ünïcode?", "chosen": "Ja.", "rejected": "Nein."},
        {"chosen": [ASKED, GOOD, ASKED, GOOD], "rejected": [ASKED, GOOD, ASKED, BAD]},
    )
    write_rows(tmp_path / "pairs.jsonl", rows)
    assert read_rows(tmp_path / "pairs.jsonl") == rows


def test_pairs_that_differ_in_the_rejected_answer_are_different_rows() -> None:
    rows = pairs(PAIR, PAIR | {"rejected": "Never."}, PAIR)
    assert len({item_id(row) for row in rows}) == 2
    kept = screen(rows, duplicates="drop", contradictions="keep").rows
    assert [row.rejected for row in kept] == ["No.", "Never."]


def test_a_length_that_tells_the_chosen_answer_is_shown() -> None:
    long = [PAIR | {"prompt": f"Question {at}?"} for at in range(7)]
    short = [{"prompt": f"Other {at}?", "chosen": "No.", "rejected": "Blue is one."} for at in range(3)]
    by_name = {check.name: check for check in check_texts("training", pairs(*long, *short), labels=None)}
    found = by_name["length does not decide pairs"]
    assert not found.passed
    assert not found.stops
    assert "longer one in 70% of 10 pairs" in found.detail
    even = check_texts("training", pairs(*long[:3], *short), labels=None)
    assert all(check.passed for check in even if check.name == "length does not decide pairs")


OPPOSITE = {"prompt": PAIR["prompt"], "chosen": " No.", "rejected": PAIR["chosen"]}


def test_pairs_of_one_prompt_contradict_each_other_only_in_opposite_order(tmp_path: Path) -> None:
    """From memory and from the file that they are read from: a ranking of three answers is three pairs."""
    ranked = [PAIR, PAIR | {"chosen": "Red."}, PAIR | {"chosen": "Red.", "rejected": PAIR["chosen"]}]
    rows = pairs(*ranked, PAIR | {"prompt": "Else?"}, OPPOSITE)
    for given in (rows, spool_rows(tmp_path / "rows.jsonl", rows)):
        screened = screen(given, duplicates="drop", contradictions="drop")
        assert screened.dropped == {"contradictions": ((1, 5), (5, 1))}
        assert list(screened.rows) == rows[1:4]
        assert not any(check.stops for check in check_texts("training", screened.rows, labels=None))


def test_a_control_token_in_a_rejected_answer_is_found(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    rows = pairs(PAIR, PAIR | {"rejected": f"No.{tokenizer.eos_token}"})
    encoded = encode_rows(rows, tokenizer, template="none", max_tokens=64, overlength="error")
    checks = check_encoded("training", encoded, tokenizer, template="none")
    (found,) = [check for check in checks if check.name == "no special token in a text"]
    assert (found.passed, found.lines) == (False, (2,))


def test_pairs_that_prefer_the_same_answers_in_opposite_order_are_found() -> None:
    rows = pairs(PAIR, PAIR | {"prompt": "Else?"}, OPPOSITE)
    for contradictions, stops in ((None, True), ("keep", False)):
        checks = check_texts("training", rows, labels=None, contradictions=contradictions)
        (found,) = [check for check in checks if check.name == "pairs agree"]
        assert (found.passed, found.lines, found.stops) == (False, (3,), stops)
    (found,) = [check for check in check_texts("training", rows[:2], labels=None) if check.name == "pairs agree"]
    assert found.passed


def test_an_item_s_options_are_its_two_answers(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    (item,) = option_items(pairs(PAIR), tokenizer, template="none", labels=("chosen", "rejected"))
    assert (len(item.option_ids), item.gold) == (2, 0)
    assert len(item.option_ids[0]) > len(item.option_ids[1])
