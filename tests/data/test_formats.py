"""The four formats of a row, and what makes a row unusable."""

import string
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftline.data.records import Record, RecordPlace
from graftline.data.rows import FORMATS, Message, Row, detect_format, to_row
from graftline.data.turns import ROW_FIELDS
from graftline.errors import DataError


def record(value: Any, line: int = 7) -> Record:
    return Record(RecordPlace("rows.jsonl", "line", line), value)


def row(value: Any) -> Row:
    return to_row(record(value), detect_format(record(value)))


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


ALL_THE_SAME = {
    "prompt-completion": {"prompt": "Q", "completion": "A", "id": 3},
    "prompt-completion of messages": {"prompt": turns(("user", "Q")), "completion": turns(("assistant", "A"))},
    "messages": {"messages": turns(("user", "Q"), ("assistant", "A"))},
    "alpaca": {"instruction": "Q", "input": "", "output": "A", "history": [], "system": ""},
    "sharegpt": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
}


@pytest.mark.parametrize("name", ALL_THE_SAME)
def test_each_format_says_the_same_conversation(name: str) -> None:
    value = ALL_THE_SAME[name]
    assert detect_format(record(value)) == name.split(" ")[0]
    assert row(value) == Row((Message("user", "Q", False), Message("assistant", "A", True)), source_line=7)


def test_an_alpaca_row_holds_system_history_and_input() -> None:
    value = {"instruction": "Q2", "input": "I", "output": "A2", "system": "S", "history": [["Q1", "A1"]]}
    found = row(value)
    assert [(m.role, m.content) for m in found.messages] == [
        ("system", "S"), ("user", "Q1"), ("assistant", "A1"), ("user", "Q2\nI"), ("assistant", "A2"),
    ]  # fmt: skip
    assert [m.supervised for m in found.messages] == [False, False, True, False, True]


def test_answers_inside_a_prompt_are_not_learned() -> None:
    value = {
        "prompt": turns(("user", "Q1"), ("assistant", "A1"), ("user", "Q2")),
        "completion": turns(("assistant", "A2")),
    }
    assert [m.supervised for m in row(value).messages] == [False, False, False, True]


def test_weight_0_takes_an_answer_out_of_the_loss() -> None:
    messages = turns(("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2"))
    messages[1]["weight"] = 0  # type: ignore[assignment]
    assert [m.supervised for m in row({"messages": messages}).messages] == [False, False, False, True]


def test_prompt_and_answer_of_a_row() -> None:
    found = row({"messages": turns(("system", "S"), ("user", "Q"), ("assistant", "A"))})
    assert (found.prompt, found.answer) == ("S\nQ", "A")


USER_AND_BOT = {"messages": turns(("user", "Q"), ("assistant", "A"))}
BAD: dict[str, tuple[Any, str]] = {
    "a list": ([1], "a row is list, expected an object"),
    "a text": ("x", "a row is str"),
    "null": (None, "a row is NoneType"),
    "no keys": ({}, "no known format has the keys no keys"),
    "misspelt key": ({"promt": "Q", "completion": "A"}, "'promt' may be meant as 'prompt'"),
    "two formats": (
        USER_AND_BOT | {"prompt": "Q", "completion": "A"},
        "fit prompt-completion and messages; set data.format",
    ),
    "plain text": ({"text": "abc"}, "'text' means plain text"),
    "tokenized": ({"input_ids": [1], "labels": [1]}, "'input_ids' means already tokenized rows"),
    "empty prompt": ({"prompt": "", "completion": "A"}, "'prompt' is empty or only blanks"),
    "blank completion": ({"prompt": "Q", "completion": " \n\t"}, "'completion' is empty or only blanks"),
    "number": ({"prompt": "Q", "completion": 3}, "'completion' is int '3'; expected text"),
    "true": ({"prompt": True, "completion": "A"}, "'prompt' is bool"),
    "NUL in text": ({"prompt": "a\0b", "completion": "A"}, "'prompt' holds NUL at character 2"),
    "half surrogate": ({"prompt": "a\ud800", "completion": "A"}, "half a surrogate pair at character 2"),
    "9 MiB": ({"prompt": "a" * (9 << 20), "completion": "A"}, "'prompt' has 9 MiB, a row may have 8 MiB"),
    "text and messages": (
        {"prompt": "Q", "completion": turns(("assistant", "A"))},
        "must both be text or both be lists",
    ),
    "unknown role": (
        {"messages": turns(("user", "Q"), ("bot", "A"))},
        "messages 2 has the unknown role 'bot'; expected system",
    ),
    "tool last": (
        {"messages": turns(("user", "Q"), ("assistant", "A"), ("tool", "12 °C"))},
        "the last turn is the tool's",
    ),
    "no role": ({"messages": [{"content": "Q"}]}, "unknown role None"),
    "role is a list": ({"messages": [{"role": ["user"], "content": "Q"}]}, "unknown role"),
    "unknown sender": (
        {"conversations": [{"from": "robot", "value": "Q"}]},
        "unknown role 'robot' in 'from'; expected system, human",
    ),
    "sender is a list": ({"conversations": [{"from": [], "value": "Q"}]}, "unknown role"),
    "no turns": ({"messages": []}, "'messages' is empty; expected a list"),
    "turns as text": ({"messages": '[{"role": "user"}]'}, "'messages' is str .*csv cannot hold one"),
    "turn is a text": ({"messages": ["Q", "A"]}, "messages 1 is str, expected an object"),
    "no content": (
        {"messages": [{"role": "user"}, {"role": "assistant", "content": "A"}]},
        "'messages 1.content' is missing",
    ),
    "an image": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "image", "url": "x"}]},
                {"role": "assistant", "content": "A"},
            ]
        },
        "'messages 1.content' is list",
    ),
    "weight 2": ({"messages": [{"role": "assistant", "content": "A", "weight": 2}]}, "weight 2; expected 0"),
    "weight as text": ({"messages": [{"role": "assistant", "content": "A", "weight": "0"}]}, "weight '0'"),
    "no assistant": ({"messages": turns(("user", "Q"))}, "no assistant turn among user; nothing to learn"),
    "only an answer": ({"messages": turns(("assistant", "A"))}, "an answer stands before any user turn"),
    "question last": (
        {"messages": turns(("user", "Q"), ("assistant", "A"), ("user", "Q"))},
        "the last turn is the user's",
    ),
    "every weight 0": (
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "weight": 0}]},
        "every assistant turn has weight 0 or train false",
    ),
    "history of texts": ({"instruction": "Q", "output": "A", "history": ["x"]}, "'history' must be a list of"),
    "history of one": ({"instruction": "Q", "output": "A", "history": [["x"]]}, "'history' must be a list of"),
    "history with a hole": (
        {"instruction": "Q", "output": "A", "history": [["x", ""]]},
        "'history 1, answer' is empty",
    ),
    "empty output": ({"instruction": "Q", "output": ""}, "'output' is empty"),
    "system is a number": ({"instruction": "Q", "output": "A", "system": 5}, "'system' is int"),
    "input is a list": ({"instruction": "Q", "input": ["x"], "output": "A"}, "'input' is list"),
}


def test_either_name_of_a_conversation_may_stand_over_turns_in_either_words() -> None:
    ours = turns(("user", "Q"), ("assistant", "A"))
    theirs = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    rows = [row({key: said}) for key in ("messages", "conversations") for said in (ours, theirs)]
    assert all(each == rows[0] for each in rows)


@pytest.mark.parametrize("case", BAD)
def test_an_unusable_row_is_refused_with_its_place(case: str) -> None:
    value, message = BAD[case]
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 7: .*{message}"):
        row(value)


def test_a_row_of_another_format_is_refused_and_the_other_one_is_named() -> None:
    with pytest.raises(
        DataError, match=r"'messages' missing in a messages row.*it looks like alpaca: one file holds one format"
    ):
        to_row(record(ALL_THE_SAME["alpaca"]), "messages")


TURN_FIELDS = ["role", "content", "from", "value", "name", "type", "function", "arguments", *ROW_FIELDS]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.sampled_from(["user", "assistant", "human", "gpt"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TURN_FIELDS), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    *ROW_FIELDS,
    "prompt",
    "completion",
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "history",
    "system",
    "x",
]


@settings(max_examples=500, deadline=None)
@given(value=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=5), name=st.sampled_from(FORMATS))
def test_any_json_is_a_row_or_a_data_error(value: dict[str, Any], name: str) -> None:
    try:
        found = to_row(record(value), name)
    except DataError:
        return
    assert found.messages[-1].role == "assistant"
    assert any(message.supervised for message in found.messages)
    assert all(message.content.strip() for message in found.messages)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.text(string.ascii_letters, min_size=1), min_size=2, max_size=6).filter(
        lambda texts: len(texts) % 2 == 0
    )
)
def test_messages_and_sharegpt_of_one_conversation_are_the_same_row(texts: list[str]) -> None:
    roles = ["user", "assistant"] * (len(texts) // 2)
    names = ["human", "gpt"] * (len(texts) // 2)
    messages = {"messages": turns(*zip(roles, texts, strict=True))}
    sharegpt = {"conversations": [{"from": n, "value": t} for n, t in zip(names, texts, strict=True)]}
    assert row(messages) == row(sharegpt)
