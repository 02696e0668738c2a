"""What a turn holds beside its text: kept for the template, taken out of the loss, or refused by name."""

from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from graftline.data.records import Record, RecordPlace
from graftline.data.row_keys import text_key
from graftline.data.rows import Row, detect_format, read_rows, rows_from_objects, to_row
from graftline.errors import DataError

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
Q, A = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def row(value: dict[str, Any]) -> Row:
    record = Record(RecordPlace("rows.jsonl", "line", 7), value)
    return to_row(record, detect_format(record))


def answer(**fields: Any) -> dict[str, Any]:
    return {"messages": [Q, A | fields, Q, A]}


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": [CALL["function"]]},
        {"tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]},
        {"function_call": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
        {"tool_calls": [CALL], "function_call": None},
    ],
)
def test_tool_calls_of_every_spelling_reach_the_template_and_every_comparison(fields: dict[str, Any]) -> None:
    called = row({"messages": [Q, A | fields]}).messages[-1]
    assert called.turn == {"role": "assistant", "content": "A", "tool_calls": [CALL]}
    assert called.content == 'A\n{"tool_calls": [' + str(CALL).replace("'", '"') + "]}"
    assert row({"messages": [Q, A]}).answer != called.content


def test_a_call_needs_no_text() -> None:
    for content in (None, "", " "):
        called = row({"messages": [Q, {"role": "assistant", "content": content, "tool_calls": [CALL]}]}).messages[-1]
        assert called.turn == {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_results_keep_the_name_of_their_tool_whatever_the_role_is_called() -> None:
    result = {"content": "12 °C", "name": "weather"}
    both = [row({"messages": [Q, A | {"tool_calls": [CALL]}, result | {"role": r}, A]}) for r in ("tool", "function")]
    assert both[0] == both[1]
    assert both[0].messages[2].turn == {"role": "tool", "content": "12 °C", "name": "weather"}


def test_sharegpt_calls_and_results_are_those_of_messages() -> None:
    talk = [
        {"from": "human", "value": "Q"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
        {"from": "observation", "value": "12 °C"},
        {"from": "gpt", "value": "A"},
    ]
    messages = [
        Q,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "12 °C"},
        A,
    ]
    tools = '[{"name": "weather", "parameters": {"type": "object"}}]'
    assert row({"conversations": talk, "tools": tools}) == row({"messages": messages, "tools": [TOOL]})


@pytest.mark.parametrize("key", ["tools", "functions"])
def test_declared_tools_are_part_of_the_row_and_of_its_prompt(key: str) -> None:
    found = row({"messages": [Q, A], key: [TOOL["function"]]})
    assert found.tools == (TOOL,)
    assert "weather" in found.prompt
    assert row({"messages": [Q, A], key: []}).tools == ()


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_one_name_whatever_it_was_called(name: str) -> None:
    thought = row({"messages": [Q, A | {name: "Because."}]}).messages[-1]
    assert thought.turn == {"role": "assistant", "content": "A", "reasoning_content": "Because."}


@pytest.mark.parametrize("key", ["weight", "train", "training", "trainable", "train_on_turn", "loss", "calculate_loss"])
def test_a_flag_of_any_trainer_takes_an_answer_out_of_the_loss(key: str) -> None:
    for value in (False, 0):
        assert [m.supervised for m in row(answer(**{key: value})).messages] == [False, False, False, True]
    for value in (True, 1, None):
        assert [m.supervised for m in row(answer(**{key: value})).messages] == [False, True, False, True]
    talk = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A", key: False}]
    assert [
        m.supervised for m in row({"conversations": [*talk, *talk[:1], {"from": "gpt", "value": "A"}]}).messages
    ] == [
        False,
        False,
        False,
        True,
    ]


def test_a_system_text_beside_the_turns_is_the_first_turn() -> None:
    for value in ({"messages": [Q, A]}, {"prompt": "Q", "completion": "A"}, {"instruction": "Q", "output": "A"}):
        assert [(m.role, m.content) for m in row({**value, "system": "S"}).messages] == [
            ("system", "S"),
            ("user", "Q"),
            ("assistant", "A"),
        ]


def test_content_in_text_parts_is_their_text() -> None:
    parts = [{"type": "text", "text": "Is "}, {"type": "text", "text": "it?"}]
    assert row({"messages": [{"role": "user", "content": parts}, A]}).prompt == "Is it?"


@pytest.mark.parametrize("part", [{"type": "input_text", "text": "Q"}, {"type": "refusal", "refusal": "Q"}, "Q"])
def test_text_in_parts_of_every_api_is_text(part: Any) -> None:
    assert row({"messages": [Q | {"content": [part]}, A]}) == row({"messages": [Q, A]})


def test_tools_that_may_not_be_called_are_not_shown() -> None:
    assert row({"messages": [Q, A], "tools": [TOOL], "tool_choice": "none"}).tools == ()


def test_a_greeting_is_read_and_not_learned_and_instructions_may_come_later() -> None:
    found = row({"messages": [A, Q, {"role": "system", "content": "S"}, A]})
    assert [message.supervised for message in found.messages] == [False, False, False, True]
    assert [message.role for message in found.messages] == ["assistant", "user", "system", "assistant"]


def test_fields_that_change_nothing_are_ignored() -> None:
    about = {"id": "a1", "source": "web", "lang": "en", "label": 0, "loss": 0.25, "mask": "User", "split": "train"}
    turn = {"id": 3, "refusal": None, "trained_by": "Ada", "thinking": "", "call_id": "a1", "images": []}
    assert row({"messages": [Q, A | turn], **about}) == row({"messages": [Q, A]})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mask": (answer(mask=True), "messages 2.mask is bool 'True', which would change what is learned; write \"weight\""),
    "mask 0": (answer(mask=0), "messages 2.mask"),
    "part of a turn": (answer(train_detail=[{"begin_offset": 0}]), "messages 2.train_detail"),
    "weighted tokens": (answer(loss_scale=2.0), "messages 2.loss_scale"),
    "an unwanted turn": (answer(label=False), "messages 2.label is False"),
    "half a weight": (answer(weight=0.5), "messages 2 has weight 0.5; expected 0 or false"),
    "a flag as text": (answer(train="no"), "messages 2 has train 'no'; expected 0 or false"),
    "flags that differ": (answer(train=False, weight=1), "weight 1 and train False, which contradict each other"),
    "a question to learn": ({"messages": [Q | {"train": True}, A]}, "messages 1 is the user's and has train True"),
    "a question that calls": ({"messages": [Q | {"tool_calls": [CALL]}, A]}, "messages 1 is the user's and has tool_"),
    "a broken call": (answer(tool_calls=[{"function": {"arguments": {}}}]), "messages 2.tool_calls holds dict"),
    "arguments in no JSON": (
        answer(function_call={"name": "f", "arguments": "{city: Oslo}"}),
        "messages 2.function_call, arguments of f is str '{city: Oslo}', which is not JSON",
    ),
    "arguments as a list": (answer(tool_calls=[{"name": "f", "arguments": [1]}]), "the arguments of f are list"),
    "both spellings": (answer(tool_calls=[CALL], function_call=CALL["function"]), "keep tool_calls"),
    "reasoning in parts": (answer(reasoning=[{"text": "x"}]), "messages 2.reasoning is list .* as text"),
    "two reasonings": (answer(reasoning="x", thinking="y"), "reasoning and thinking with different texts"),
    "a mask of another name": (answer(train_mask=[0, 1]), "messages 2.train_mask is list"),
    "a flag of another name": (answer(compute_loss=False), "messages 2.compute_loss is bool 'False'.*\"weight\": 0"),
    "reasoning of another name": (
        answer(chain_of_thought="x"),
        "messages 2.chain_of_thought is str 'x'.*reasoning_con",
    ),
    "calls of another name": (answer(function_calls=[CALL]), "messages 2.function_calls is list .* as tool_calls"),
    "tools in a turn": ({"messages": [Q | {"tools": [TOOL]}, A]}, "messages 1.tools is list .* beside the messages"),
    "an image": (answer(images=["a.png"]), "messages 2.images is list .*only text is learned"),
    "an image of the row": ({"prompt": "Q", "completion": "A", "image": "a.png"}, "'image' is str 'a.png'"),
    "calls of the row": ({"prompt": "Q", "completion": "A", "tool_calls": [CALL]}, "put it into that message"),
    "reasoning of the row": ({"prompt": "Q", "completion": "A", "thinking": "x"}, "put it into that message"),
    "an unwanted answer": ({"prompt": "Q", "completion": "A", "label": False}, "'label' is False, .*not wanted"),
    "an unwanted answer of csv": ({"prompt": "Q", "completion": "A", "label": "False"}, "'label' is 'False'"),
    "an unwanted chat": (answer() | {"kto_tag": False}, "'kto_tag' is False"),
    "a weighted row": (answer() | {"weight": 0.3}, "'weight' is float '0.3', which would change what is learned"),
    "a row of weight 0": (answer() | {"sample_weight": 0}, "'sample_weight' is int '0'"),
    "a row not trained on": (answer() | {"train": False}, "'train' is False, so nothing of the row is to be learned"),
    "a mask of tokens": (answer() | {"loss_mask": [0, 1]}, "'loss_mask' is list"),
    "a pair": (answer() | {"rejected": "B"}, "'rejected' is str 'B'.*preference pairs"),
    "documents": (answer() | {"documents": [{"text": "x"}]}, "'documents' is list"),
    "arguments of the template": (answer() | {"chat_template_kwargs": {"thinking": True}}, "'chat_template_kwargs'"),
    "a row of weight 0 in csv": (answer() | {"weight": "0"}, "'weight' is str '0'"),
    "half a row in csv": (answer() | {"sample_weight": "0.5"}, "'sample_weight' is str '0.5'"),
    "a row not trained on in csv": (answer() | {"train": "no"}, "'train' is 'no', so nothing of the row is to be"),
    "a row not trained on by number": (answer() | {"training": 0}, "'training' is 0, so nothing of the row is to be"),
    "arguments with a number beyond JSON": (
        answer(tool_calls=[{"name": "f", "arguments": {"x": [float("nan")]}}]),
        "messages 2.tool_calls, arguments of f hold what JSON does not know",
    ),
    "arguments as JSON with NaN": (
        answer(tool_calls=[{"name": "f", "arguments": '{"x": NaN}'}]),
        "messages 2.tool_calls, arguments of f hold what JSON does not know",
    ),
    "arguments with a key twice": (
        answer(tool_calls=[{"name": "f", "arguments": '{"x": 1, "x": 2}'}]),
        "key 'x' appears twice in one object",
    ),
    "arguments that are a number": (answer(tool_calls=[{"name": "f", "arguments": 0}]), "arguments of f are int '0'"),
    "a call of nothing": (answer(tool_calls=[{"name": " ", "arguments": {}}]), "messages 2.tool_calls holds dict"),
    "tools with half a character": (
        answer() | {"tools": [TOOL | {"function": TOOL["function"] | {"description": "\udc00"}}]},
        "'tools' hold what JSON does not know: .*surrogates not allowed",
    ),
    "tools with a set": (answer() | {"tools": [{"name": "f", "parameters": {"x": {1}}}]}, "'tools' hold what JSON"),
    "tools of both spellings": (answer() | {"tools": [TOOL], "functions": [{"name": "g"}]}, "'functions' differ"),
    "reasoning said twice": (
        answer(reasoning_content="x") | {"messages": [Q, {**A, "content": "<think>y</think>A", "reasoning": "x"}]},
        "messages 2 has reasoning_content, and its content begins with '<think>' too",
    ),
    "a mask of the completion": (answer() | {"completion_mask": [1, 0]}, "'completion_mask' is list"),
    "masks of answers": (answer() | {"answer_masks": [1, 0]}, "'answer_masks' is list .*weight"),
    "weights of turns": (answer() | {"turn_weights": [1, 0]}, "'turn_weights' is list"),
    "an answer that is not wanted": (answer() | {"desirable": False}, "'desirable' is False"),
    "an option of the template": (answer() | {"enable_thinking": False}, "'enable_thinking' is bool 'False'"),
    "a turn to skip": (answer(skip=True), "messages 2.skip is bool"),
    "a rationale": (answer(rationale="Hm."), "messages 2.rationale is str"),
    "a turn of the analysis": (answer(channel="analysis"), "messages 2.channel is 'analysis'"),
    "a turn for a function": (answer(recipient="functions.f"), "messages 2.recipient is 'functions.f'"),
    "tools without a name": (answer() | {"tools": [{"parameters": {}}]}, "tools 1 has no name"),
    "tools in no JSON": (answer() | {"tools": "[weather]"}, "tools is str .* not JSON"),
    "a turn that is left out": (answer(exclude=True), 'messages 2.exclude is True, .*"weight": 0'),
    "a turn that is not taken": (answer(include=False), "messages 2.include is False"),
    "the beginning of an answer": (answer(prefix=True), "messages 2.prefix is True, .*the token that ends it"),
    "an answer that goes on": (answer(end_turn=False), "messages 2.end_turn is False"),
    "an answer that was cut off": (answer(finish_reason="length"), "messages 2 has finish_reason 'length'"),
    "a row whose answer was cut off": (answer() | {"finish_reason": "length"}, "the row has finish_reason 'length'"),
    "calls as text": (answer(tool_call='{"name": "f"}'), "messages 2.tool_call is str .* as tool_calls"),
    "a mask as text": (answer(train_mask="[0, 1]"), "messages 2.train_mask is str"),
    "a plan of calls": (answer(tool_plan="First look."), "messages 2.tool_plan is str .*reasoning_content"),
    "a part that is not learned": (
        {"messages": [Q, A | {"content": [{"type": "text", "text": "A", "train": False}]}]},
        "part 1 of messages 2.content has train False",
    ),
    "a part with a mask": (
        {"messages": [Q, A | {"content": [{"type": "text", "text": "A", "masked": True}]}]},
        "messages 2.content.masked is bool",
    ),
    "a row that is left out": (answer() | {"exclude": True}, "'exclude' is True, so nothing of the row"),
    "a row for no training": (answer() | {"is_train": False}, "'is_train' is False, so nothing of the row"),
    "a row for no training in csv": (answer() | {"no_train": "true"}, "'no_train' is 'true', so nothing of the row"),
    "a row of another weight": (answer() | {"conversation_weight": 2}, "'conversation_weight' is int '2'"),
    "one turn of a row": (answer() | {"last_turn_only": True}, "set data.learned to last-turn"),
    "other turns of a row": (answer() | {"roles_to_train": ["user"]}, "but only answers are learned"),
    "labels of tokens": (answer() | {"labels": [-100, 5]}, "'labels' marks tokens"),
    "tools of another name": (answer() | {"available_tools": [TOOL]}, "'available_tools' is list .* call it tools"),
    "tools of another name as text": (
        answer() | {"tool_definitions": '[{"name": "f", "parameters": {}}]'},
        "'tool_definitions' is str",
    ),
    "a system text of another name": (answer() | {"system_prompt": "Be brief."}, "call it system"),
    "two system texts": (
        {"system": "a", "messages": [{"role": "system", "content": "b"}, Q, A]},
        "'system' and the first turn are two system texts",
    ),
    "another format's history": (answer() | {"history": [["Q", "A"]]}, "'history' belongs to alpaca rows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_change_the_learning_and_cannot_be_honoured_is_refused_by_name(case: str) -> None:
    value, message = REFUSED[case]
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 7: .*{message}"):
        row(value)


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"train_on_inputs": True}, "'train_on_inputs' is True, but prompts are not learned here"),
        ({"train_on_prompt": "true"}, "prompts are not learned here"),
        ({"learn": False}, "nothing of the row is to be learned"),
        ({"supervised": "false"}, "nothing of the row is to be learned"),
        ({"train_on_inputs": "yes"}, "'train_on_inputs' is 'yes', but prompts are not learned here"),
        ({"learn": "0"}, "nothing of the row is to be learned"),
    ],
)
def test_a_row_that_says_what_is_learned_of_it_is_not_misread(more: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        rows_from_objects([{"prompt": "a", "completion": "b", **more}], origin="test")


@pytest.mark.parametrize(
    "more",
    [
        *({"exclude": False}, {"is_train": True}, {"no_train": "false"}, {"conversation_weight": 1}, {"include": True}),
        *({"last_turn_only": False}, {"roles_to_train": ["assistant"]}, {"labels": ["a", "b"]}, {"body_weight": 70}),
        *({"tools_used": ["search"]}, {"tool_choice": {"type": "function"}}, {"finish_reason": "stop"}),
        *({"train_on_inputs": False}, {"learn": True}, {"supervised": "yes"}, {"split": "train"}),
        *({"weight": "1"}, {"weight": "1.0"}, {"train": "TRUE"}, {"loss": "0.0"}, {"label": "no"}),
    ],
)
def test_a_row_that_says_what_is_done_anyway_is_read(more: dict[str, Any]) -> None:
    assert len(rows_from_objects([{"prompt": "a", "completion": "b", **more}], origin="test")) == 1


@pytest.mark.parametrize("more", [{"finish_reason": "stop"}, {"end_turn": True}, {"prefix": False}, {"deleted": False}])
def test_how_an_answer_ended_is_not_taken_for_reasoning(more: dict[str, Any]) -> None:
    assert row({"messages": [Q, A | more]}) == row({"messages": [Q, A]})


@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}])
def test_a_refusal_is_what_the_answer_says_as_in_requests(content: dict[str, Any]) -> None:
    (found,) = row({"messages": [Q, {"role": "assistant", "refusal": "I may not."} | content]}).messages[1:]
    assert (found.content, found.supervised, found.fields) == ("I may not.", True, {})


def test_a_system_text_that_stands_in_both_places_is_there_once() -> None:
    system = {"role": "system", "content": "Be brief."}
    once = row({"messages": [system, Q, A]})
    assert row({"messages": [system, Q, A], "system": "Be brief."}) == once
    assert row({"messages": [system, Q, A], "system_prompt": "Be brief."}) == once


@pytest.mark.parametrize("more", [{"answer_masks": [0, 1]}, {"is_train": False}, {"loss_on": ["user"]}])
def test_a_column_that_changes_what_is_learned_is_read_whatever_its_name(more: dict[str, Any], tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": [Q, A], **more}]), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=next(iter(more))):
        read_rows(tmp_path / "rows.parquet")


def test_the_developer_s_turn_is_the_system_s() -> None:
    messages = [{"role": role, "content": role} for role in ("developer", "user", "assistant")]
    (row,) = rows_from_objects([{"messages": messages}], origin="test")
    assert [message.role for message in row.messages] == ["system", "user", "assistant"]


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_speaker_s_name_reaches_the_template_and_is_no_part_of_the_text(role: str) -> None:
    asked, answered = (turn | ({"name": "ada"} if turn["role"] == role else {}) for turn in (Q, A))
    named, plain = row({"messages": [asked, answered]}), row({"messages": [Q, A]})
    assert [turn.turn for turn in named.messages] == [asked, answered]
    assert (named.prompt, named.answer) == (plain.prompt, plain.answer)
    assert text_key(named) != text_key(plain)
    assert row({"messages": [turn.turn for turn in named.messages]}) == named
