"""An answer's text is taken apart into reasoning, words and calls, however it is cut into pieces."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from graftline.data import answer_parts
from graftline.data.answer_parts import AnswerFormat, AnswerReader, Call, CallFormat, Said, Tags, answer_format, joined
from graftline.data.chat import Renderer
from graftline.data.rows import Message
from tests.data import chat_templates
from tests.tiny import CHATML, make_tokenizer

TOOLS = {
    "weather": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    "now": {},
}
DECLARED = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in TOOLS.items()]
TEMPLATES = {
    "qwen3": chat_templates.QWEN3,
    "llama3": chat_templates.LLAMA3_TOOLS,
    "mistral": chat_templates.MISTRAL_TOOLS,
    "granite": chat_templates.GRANITE,
}
HERMES = CallFormat(Tags("<tool_call>", "</tool_call>"))
THINK = Tags("<think>", "</think>")
QWEN3 = AnswerFormat(THINK, HERMES)
OSLO = {"city": "Oslo \N{SNOWFLAKE}", "days": 3}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def read(form: AnswerFormat, text: str, *, size: int = 0, in_reasoning: bool = False, several: bool = True) -> Said:
    reader = AnswerReader(form, TOOLS, in_reasoning=in_reasoning, several=several)
    pieces = [text[at : at + size] for at in range(0, len(text), size)] if size else [text]
    return joined([*map(reader.push, pieces), reader.push("", final=True)])


def read_in_any_pieces(form: AnswerFormat, text: str, **given: bool) -> Said:
    found = {read(form, text, size=size, **given) for size in (0, 1, 2, 3, 5, 8, 13)}
    assert len(found) == 1, found
    return found.pop()


def calls(*given: tuple[str, dict[str, object]]) -> tuple[Call, ...]:
    return tuple(
        Call(at, name, json.dumps(arguments, ensure_ascii=False)) for at, (name, arguments) in enumerate(given)
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_call_is_read_back_from_what_the_template_writes(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = TEMPLATES[name]
    form = answer_format(tokenizer, "tokenizer")
    assert form.calls is not None
    render = Renderer(tokenizer, "tokenizer", DECLARED, day=None)
    question = Message("user", "Is it cold?", supervised=False)
    call = {"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": OSLO}}
    asked = render([question], opening=True)
    answer = render([question, Message("assistant", "", supervised=False, fields={"tool_calls": [call]})])
    written = answer.removeprefix(asked).partition(tokenizer.eos_token)[0]
    assert read_in_any_pieces(form, written).calls == calls(("weather", OSLO))
    assert read_in_any_pieces(form, written).words == ""
    # What a grammar would enforce is what the template writes.
    assert form.calls.written is not None
    before, between, after = form.calls.written
    enforced = f"{before}weather{between}{json.dumps(OSLO, ensure_ascii=False)}{after}"
    assert enforced.replace("a1b2c3d4e", "abcdefghi") == written[written.index(before[:3]) :]


def test_what_a_template_does_not_show_is_not_looked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    for template in (CHATML, chat_templates.LLAMA3, chat_templates.GEMMA, chat_templates.PHI):
        tokenizer.chat_template = template
        assert answer_format(tokenizer, "tokenizer") == AnswerFormat()
    tokenizer.chat_template = chat_templates.QWEN3
    assert answer_format(tokenizer, "tokenizer").reasoning == THINK
    assert answer_format(tokenizer, "chatml") == answer_format(tokenizer, "none") == AnswerFormat()


def test_a_template_that_only_tells_how_calls_are_written_is_believed(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = (
        "{% if tools %}Call with <tool_call>…</tool_call>: {{ tools | tojson }}{% endif %}" + CHATML
    )
    found = answer_format(tokenizer, "tokenizer").calls
    assert found == HERMES  # and since no call was seen, none can be enforced


WEATHER = '{"name": "weather", "arguments": {"city": "Oslo \N{SNOWFLAKE}", "days": 3}}'
NOW = '{"name": "now", "arguments": {}}'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello <b>\n", Said("Hello <b>\n")),
        ("  Hello", Said("  Hello")),
        ("a < b <th", Said("a < b <th")),
        (
            "<think>\nIt is\n\ncold.\n</think>\n\nYes.\n<tool_call>\n" + WEATHER + "\n</tool_call>",
            Said("Yes.", "It is\n\ncold.", calls(("weather", OSLO))),
        ),
        ("\n<think>\n\n</think>\n\nYes </think>", Said("Yes </think>")),
        ("<think>cut <", Said(reasoning="cut <")),
        ("Yes <think>later</think>", Said("Yes <think>later</think>")),
        (
            f"<tool_call>{WEATHER}</tool_call>\n<tool_call>{NOW}</tool_call>\n",
            Said(calls=calls(("weather", OSLO), ("now", {}))),
        ),
        (f"<tool_call>[{WEATHER}, {NOW}]</tool_call> Done.", Said("Done.", "", calls(("weather", OSLO), ("now", {})))),
        (f"<tool_call>\n{NOW}", Said(calls=calls(("now", {})))),  # the closing tag was the end token
        (
            "<tool_call><function=weather>\n<parameter=city>\nOslo \N{SNOWFLAKE}\n</parameter>\n<parameter=days>\n3\n"
            "</parameter>\n</function></tool_call>",
            Said(calls=calls(("weather", OSLO))),
        ),
        (
            # A text that looks like a number, and what is not of its parameter's type.
            "<tool_call><function=weather><parameter=city>12</parameter><parameter=days>NaN</parameter></function>"
            "</tool_call>\nDone. \n",
            Said("Done.", "", calls(("weather", {"city": "12", "days": "NaN"}))),
        ),
        (
            '<tool_call>{"name": "weather", "arguments": {"city": "\\"</tool_call>"}}</tool_call> Done.',
            Said("Done.", "", calls(("weather", {"city": '"</tool_call>'}))),
        ),
        ('<tool_call>{"name": "now", "arguments": "{}"}</tool_call>', Said(calls=calls(("now", {})))),
        # Not calls: cut, not JSON, another function, arguments that are no object, a constant that JSON does not have.
        *(
            (f"So:\n<tool_call>{body}</tool_call> then", Said(f"So:\n<tool_call>{body}</tool_call> then"))
            for body in (
                '{"name": "now", "argum',
                "now()",
                '{"name": "unknown", "arguments": {}}',
                '{"name": "now", "arguments": [1]}',
                '{"name": "now", "arguments": {"a": NaN}}',
                '{"arguments": {}}',
                "[1]",
                "[" * 100_000,
                "",
            )
        ),
    ],
)
def test_reasoning_words_and_calls_are_separated(text: str, expected: Said) -> None:
    if len(text) > 10_000:
        assert read(QWEN3, text, size=1000) == expected
    else:
        assert read_in_any_pieces(QWEN3, text) == expected


def test_reasoning_that_the_prompt_opened_ends_at_its_tag() -> None:
    assert read_in_any_pieces(QWEN3, "\nhm\n</think>\n\nYes", in_reasoning=True) == Said("Yes", "hm")
    assert read_in_any_pieces(QWEN3, "hm", in_reasoning=True) == Said(reasoning="hm")
    spoken = AnswerFormat(Tags("[THINK]", "[/THINK]"))
    assert read_in_any_pieces(spoken, "[THINK]hm[/THINK]Yes") == Said("Yes", "hm")


def test_of_several_calls_only_the_first_counts_where_one_was_asked_for() -> None:
    text = f"<tool_call>{NOW}</tool_call><tool_call>{WEATHER}</tool_call>"
    assert read_in_any_pieces(QWEN3, text, several=False) == Said(calls=calls(("now", {})))
    assert read_in_any_pieces(QWEN3, f"<tool_call>[{NOW},{WEATHER}]</tool_call>", several=False).calls == calls(
        ("now", {})
    )


LLAMA3 = AnswerFormat(calls=CallFormat(Tags("", "")))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "now", "parameters": {}}', Said(calls=calls(("now", {})))),
        ('<|python_tag|>{"name": "now", "parameters": {}}', Said(calls=calls(("now", {})))),
        (f"\n{NOW}; {WEATHER}", Said(calls=calls(("now", {}), ("weather", OSLO)))),
        ('{"name": "Ada", "age": 36}', Said('{"name": "Ada", "age": 36}')),
        ("It is {now}.", Said("It is {now}.")),
    ],
)
def test_of_llama_3_a_whole_answer_is_a_call_or_words(text: str, expected: Said) -> None:
    assert read_in_any_pieces(LLAMA3, text) == expected


MISTRAL = AnswerFormat(calls=CallFormat(Tags("[TOOL_CALLS]", "")))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f'[TOOL_CALLS] [{NOW[:-1]}, "id": "abcdefghi"}}, {WEATHER}]', calls(("now", {}), ("weather", OSLO))),
        (
            "[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]"
            '{"city": "Oslo \N{SNOWFLAKE}", "days": 3}',
            calls(("now", {}), ("weather", OSLO)),
        ),
    ],
)
def test_both_of_mistral_s_forms_are_read(text: str, expected: tuple[Call, ...]) -> None:
    assert read_in_any_pieces(MISTRAL, text) == Said(calls=expected)
    assert read_in_any_pieces(MISTRAL, f"Let me see. {text}") == Said("Let me see.", "", expected)


def test_text_is_passed_on_as_soon_as_it_cannot_be_a_tag() -> None:
    reader = AnswerReader(QWEN3, TOOLS)
    assert reader.push("He") == Said("He")
    assert reader.push("llo <tool") == Said("llo")
    assert reader.push("box>") == Said(" <toolbox>")
    plain = AnswerReader()
    assert plain.is_plain
    assert plain.push("<think>a</think> ") == Said("<think>a</think> ")


def test_special_tokens_that_separate_parts_are_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.chat_template = chat_templates.MISTRAL_TOOLS
    assert answer_format(tokenizer, "tokenizer").markers == ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
    assert QWEN3.markers == ("<think>", "</think>", "<tool_call>", "</tool_call>")


def test_a_call_whose_arguments_hold_its_own_tag_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The characters in which quotes are counted grow with the answer's length, not with its square."""
    counted, escaped = 0, answer_parts._ESCAPED

    class Counting:
        def sub(self, new: str, text: str) -> str:
            nonlocal counted
            counted += len(text)
            return escaped.sub(new, text)

    monkeypatch.setattr(answer_parts, "_ESCAPED", Counting())
    work = []
    for number in (20, 80):
        counted = 0
        city = "</tool_call> " * number + '\\"'
        call = json.dumps({"name": "weather", "arguments": {"city": city}})
        said = read(QWEN3, f"<tool_call>{call}</tool_call>", size=4)
        assert said.calls == (Call(0, "weather", json.dumps({"city": city})),)
        work.append(counted)
    assert work[1] < 5 * work[0]
