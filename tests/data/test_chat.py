"""What is learned of a conversation with tools, reasoning and many turns, and behind which prompt."""

import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from graftline.data import chat
from graftline.data.encoding import encode_rows
from graftline.data.rows import Row, rows_from_objects
from graftline.data.template import (
    check_template,
    encode,
    encode_answers,
    encode_conversation,
    encode_prompt,
    stop_ids,
    template_digest,
)
from graftline.data.validation import marked_text
from graftline.errors import DataError
from tests.data import chat_templates as templates

END = "<|im_end|>"
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 2}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
ASK = {"role": "user", "content": "Wet in Oslo?"}
RESULT = {"role": "tool", "content": "rain, 12 °C", "name": "weather"}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
YES = {"role": "assistant", "content": "Yes."}
LOOKUP = [ASK, CALLING, RESULT, YES]


@pytest.fixture
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_llama)


def row(*messages: dict[str, Any], **beside: Any) -> Row:
    return rows_from_objects([{"messages": list(messages), **beside}], origin="rows")[0]


def marked(found: Row, tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    tokenizer.chat_template = template
    return marked_text(encode(found, tokenizer, template="tokenizer"), tokenizer)


def test_calls_and_answers_are_learned_behind_tools_and_results(tokenizer: PreTrainedTokenizerBase) -> None:
    assert marked(row(*LOOKUP, tools=[TOOL]), tokenizer, templates.QWEN3) == (
        '<|im_start|>system\n# Tools\n{"type": "function", "function": {"name": "weather", "parameters": '
        '{"type": "object"}}}\n<|im_end|>\n<|im_start|>user\nWet in Oslo?<|im_end|>\n<|im_start|>assistant\n'
        '⟦<think>\n\n</think>\n\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n'
        "</tool_call><|im_end|>⟧\n<|im_start|>user\n<tool_response>\nrain, 12 °C\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nYes.<|im_end|>⟧"
    )


def test_a_call_that_is_learned_is_shown_by_each_template_in_its_own_words(tokenizer: PreTrainedTokenizerBase) -> None:
    assert '⟦{"name": "weather", "parameters": {"city": "Oslo", "days": 2}}<|im_end|>⟧' in marked(
        row(*LOOKUP), tokenizer, templates.LLAMA3
    )


def test_a_template_that_joins_arguments_as_text_is_given_text(tokenizer: PreTrainedTokenizerBase) -> None:
    joining = templates.QWEN3.replace("call.function.arguments | tojson", "call.function.arguments")
    assert '"arguments": {"city": "Oslo", "days": 2}}\n' in marked(row(*LOOKUP, tools=[TOOL]), tokenizer, joining)


def test_a_template_for_tools_is_taken_for_rows_with_tools(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = {"default": templates.GEMMA, "tool_use": templates.QWEN3}
    texts = [
        tokenizer.decode(encode(found, tokenizer, template="tokenizer").input_ids)
        for found in (row(ASK, YES), row(ASK, YES, tools=[TOOL]))
    ]
    assert ["model\n" in text for text in texts] == [True, False]
    assert ["# Tools" in text for text in texts] == [False, True]
    one, digest = tokenizer.chat_template["tool_use"], template_digest(tokenizer, "tokenizer")
    tokenizer.chat_template = {"default": templates.GEMMA, "tool_use": one + " "}
    assert template_digest(tokenizer, "tokenizer") != digest
    tokenizer.chat_template = {"rag": templates.GEMMA}
    with pytest.raises(DataError, match="has the chat templates rag and none called default"):
        encode(row(ASK, YES), tokenizer, template="tokenizer")


def test_reasoning_is_learned_where_the_template_shows_it(tokenizer: PreTrainedTokenizerBase) -> None:
    thought = row(ASK, YES | {"reasoning": "It rains."})
    assert marked(thought, tokenizer, templates.QWEN3).endswith("⟦<think>\nIt rains.\n</think>\n\nYes.<|im_end|>⟧")


REFUSED: dict[str, tuple[str, Row, str]] = {
    "tools that are not shown": (
        templates.LLAMA3,
        row(*LOOKUP, tools=[TOOL]),
        r"does not show the row's tools \(weather\)",
    ),
    "calls that are not shown": (templates.GEMMA, row(ASK, CALLING), "does not show the tool_calls of turn 2"),
    "words beside a call that are not shown": (
        templates.LLAMA3,
        row(ASK, CALLING | {"content": "I look."}),
        r"does not show turn 2 \(assistant\) as it is written",
    ),
    "reasoning that is not shown": (
        templates.GEMMA,
        row(ASK, YES | {"reasoning_content": "It rains."}),
        "does not show the reasoning_content of turn 2, so it would not be learned",
    ),
    "results that are not shown": (
        templates.MISTRAL,
        row(ASK, YES, RESULT, YES),
        r"does not show turn 3 \(tool\) as it is written",
    ),
    "a system text that moves": (
        templates.MISTRAL,
        row({"role": "system", "content": "Be short."}, ASK, YES),
        "shows what stands before turn 3 differently once that turn follows.*put a system text into the user's turn",
    ),
    "reasoning that an earlier answer loses": (
        templates.QWEN3,
        row(ASK, YES, ASK, YES),
        'renders turn 2 differently once later turns follow.*give earlier answers "weight": 0',
    ),
    "an answer that is asked for with reasoning": (
        templates.R1,
        row(ASK, YES),
        r"asks for an answer with '<\|im_start\|>assistant\\n<think>\\n' and shows turn 2 without it.*begin the answer",
    ),
    "a template that ends conversations, not answers": (
        templates.PHI,
        row(ASK, YES, ASK, YES),
        "renders turn 2 differently",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_learned_otherwise_than_it_is_written_is_refused_with_a_remedy(
    tokenizer: PreTrainedTokenizerBase, case: str
) -> None:
    tokenizer.chat_template, found, message = REFUSED[case]
    with pytest.raises(DataError, match=f"line 1: the chat template {message}"):
        encode(found, tokenizer, template="tokenizer")


def test_our_own_chatml_refuses_what_it_cannot_show(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="line 1: the chat template does not show the tool_calls of turn 2"):
        encode(row(ASK, CALLING), tokenizer, template="chatml")
    with pytest.raises(
        DataError, match=r"line 1: template 'none' takes .* the row has user, assistant, .*reasoning_con"
    ):
        encode(row(ASK, YES | {"thinking": "x"}), tokenizer, template="none")
    with pytest.raises(DataError, match=r"the row has user, assistant, tools; set base\.template"):
        encode(row(ASK, YES, tools=[TOOL]), tokenizer, template="none")


def test_earlier_answers_that_are_not_learned_may_be_shown_as_a_server_will(tokenizer: PreTrainedTokenizerBase) -> None:
    """The remedy that the refusals name."""
    thought = YES | {"reasoning_content": "It rains."}
    found = row(ASK, thought | {"weight": 0}, ASK, thought)
    assert marked(found, tokenizer, templates.QWEN3) == (
        "<|im_start|>user\nWet in Oslo?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
        "<|im_start|>user\nWet in Oslo?<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\nIt rains.\n</think>\n\nYes.<|im_end|>⟧"
    )


def test_an_answer_that_is_asked_for_with_reasoning_is_learned_if_it_begins_with_it(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    found = row(ASK, {"role": "assistant", "content": "<think>\nIt rains.\n</think>\n\nYes."})
    assert marked(found, tokenizer, templates.R1) == (
        "<|im_start|><|im_start|>user\nWet in Oslo?<|im_start|>assistant\n<think>\n"
        "⟦It rains.\n</think>\n\nYes.<|im_end|>⟧"
    )


SERVED = {
    "QWEN3": (row(*LOOKUP, tools=[TOOL])),
    "LLAMA3": (row({"role": "system", "content": "Be short."}, *LOOKUP)),
    "MISTRAL": (row(ASK, YES, ASK, YES)),
    "GEMMA": (row(ASK, YES, ASK, YES)),
    "PHI": (row({"role": "system", "content": "Be short."}, ASK, YES)),
    "R1": (row(ASK, {"role": "assistant", "content": "<think>\nIt rains.\n</think>\n\nYes."})),
    "ROUNDS": (row(*[ASK, YES] * 20)),
}


@pytest.mark.parametrize("name", SERVED)
def test_the_last_answer_is_learned_behind_the_very_ids_that_a_server_sends(
    tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    tokenizer.chat_template = getattr(templates, name)
    found = SERVED[name]
    turns = [message.turn for message in found.messages[:-1]]
    served = tokenizer.apply_chat_template(
        turns, tools=found.tools or None, add_generation_prompt=True, tokenize=False
    ).replace(f"{datetime.now():%d %b %Y}", f"{chat.DAY:%d %b %Y}")
    prompt = encode_prompt(found, tokenizer, template="tokenizer")
    assert prompt == tokenizer(served, add_special_tokens=False).input_ids
    same, (answer,) = encode_answers(found, tokenizer, template="tokenizer")
    assert same == prompt
    assert encode(found, tokenizer, template="tokenizer").input_ids == prompt + answer
    assert answer[-1] == stop_ids(tokenizer, template="tokenizer")[0]


@pytest.mark.parametrize("name", ["MISTRAL", "R1"])
def test_a_prompt_is_what_the_template_asks_with_whatever_it_does_to_answers(
    tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    tokenizer.chat_template = getattr(templates, name)
    found = row({"role": "system", "content": "Be short."}, ASK, YES)
    turns = [message.turn for message in found.messages[:-1]]
    served = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    prompt = encode_prompt(found, tokenizer, template="tokenizer")
    assert prompt == tokenizer(served, add_special_tokens=False).input_ids
    assert stop_ids(tokenizer, template="tokenizer") == (tokenizer.eos_token_id,)


def test_prompt_and_answers_in_place_of_the_rows_own_have_the_ids_of_training(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    for template in ("none", "tokenizer", "chatml"):
        rows = [row(ASK, {"role": "assistant", "content": text}) for text in (" wet", " dry")]
        prompt, answers = encode_answers(rows[0], tokenizer, template=template, texts=[" wet", " dry"])
        assert [prompt + answer for answer in answers] == [
            encode(one, tokenizer, template=template).input_ids for one in rows
        ]


def test_speakers_names_are_shown_where_the_template_shows_them(tokenizer: PreTrainedTokenizerBase) -> None:
    shows_names = """{%- for m in messages %}
{{- '<|im_start|>' + m.role + (' ' + m.name if m.name and m.role == 'user' else '') + '\n' + m.content + '<|im_end|>' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
    found = row(ASK | {"name": "ada"}, YES | {"name": "bot"})
    assert marked(found, tokenizer, shows_names).startswith("<|im_start|>user ada\nWet in Oslo?")
    prompt, (answer,) = encode_answers(found, tokenizer, template="tokenizer", texts=["Yes."])
    assert prompt + answer == encode(found, tokenizer, template="tokenizer").input_ids
    assert encode(found, tokenizer, template="none") == encode(row(ASK, YES), tokenizer, template="none")


@pytest.mark.parametrize("name", ["LLAMA3", "GEMMA", "ROUNDS", "MISTRAL"])
def test_long_conversations_have_the_ids_of_rendering_every_beginning(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    tokenizer.chat_template = getattr(templates, name)
    turns = [
        turn
        for at in range(30)
        for turn in (
            {"role": "user", "content": f"{at} + {at}?"},
            {"role": "assistant", "content": f" {2 * at}\n", "weight": int(at % 3 > 0)},
        )
    ]
    fast = encode(row(*turns), tokenizer, template="tokenizer")
    monkeypatch.setattr(chat, "_EXACT_ANSWERS", 100)
    assert encode(row(*turns), tokenizer, template="tokenizer") == fast


@pytest.mark.parametrize("name", [None, "ROUNDS"])
def test_the_work_on_a_conversation_grows_with_its_length_and_not_with_its_square(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    tokenizer.chat_template = getattr(templates, name) if name else tokenizer.chat_template
    work = {"rendered": 0, "tokenized": 0}
    render, tokenize = chat.Renderer._render, type(tokenizer).__call__

    def rendering(self: chat.Renderer, turns: list[dict[str, Any]], opening: bool) -> str:
        work["rendered"] += len(turns)
        return render(self, turns, opening)

    def tokenizing(self: PreTrainedTokenizerBase, text: str, **given: Any) -> Any:
        work["tokenized"] += len(text)
        return tokenize(self, text, **given)

    monkeypatch.setattr(chat.Renderer, "_render", rendering)
    monkeypatch.setattr(type(tokenizer), "__call__", tokenizing)

    def measure(num_answers: int) -> dict[str, int]:
        work.update(rendered=0, tokenized=0)
        encode(row(*[ASK, YES] * num_answers), tokenizer, template="tokenizer")
        encode_prompt(row(*[ASK, YES] * num_answers), tokenizer, template="tokenizer")
        return dict(work)

    short, long = measure(100), measure(400)
    assert all(long[what] < 4.4 * short[what] for what in work)


def test_a_template_that_changes_its_mind_late_is_found(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = (
        "{{ 'Long.' if messages | length > 35 else 'Short.' }}" + tokenizer.chat_template  # type: ignore[operator]
    )
    with pytest.raises(DataError, match="shows what stands before turn 36 differently"):
        encode(row(*[ASK, YES] * 20), tokenizer, template="tokenizer")


@pytest.mark.parametrize("number", ["loop.revindex", "messages | length", "messages | length - loop.index"])
def test_numbers_that_change_with_the_turns_to_come_are_found(tokenizer: PreTrainedTokenizerBase, number: str) -> None:
    tokenizer.chat_template = templates.ROUNDS.replace("loop.index0 // 2 + 1", number)
    with pytest.raises(DataError, match=r"renders turn .* differently once later turns follow|what stands before turn"):
        encode(row(*[ASK, YES] * 20), tokenizer, template="tokenizer")


def test_a_server_gives_the_template_what_it_reads(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = templates.QWEN3
    assert chat.template_options(tokenizer, "tokenizer") == {"enable_thinking"}
    messages = row(ASK, YES).messages[:1]
    off: dict[str, Any] = {"enable_thinking": False}
    quiet = encode_conversation(messages, tokenizer, template="tokenizer", options=off)
    theirs = tokenizer.apply_chat_template([ASK], add_generation_prompt=True, return_dict=False, **off)
    assert quiet == theirs != encode_conversation(messages, tokenizer, template="tokenizer")
    assert chat.template_options(tokenizer, "chatml") == frozenset()
    # What a template sets itself unless it is told, and a tag of transformers that Jinja does not know.
    tokenizer.chat_template = (
        "{% if date_string is not defined %}{% set date_string = strftime_now('%Y') %}{% endif %}{{ bos_token }}"
        "{% for m in messages %}{% generation %}{{ m.content ~ date_string ~ padding }}{% endgeneration %}{% endfor %}"
    )
    assert chat.template_options(tokenizer, "tokenizer") == {"date_string"}


class TestDay:
    def test_what_a_template_writes_does_not_depend_on_the_day(
        self, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = marked(row(ASK, YES), tokenizer, templates.LLAMA3)
        assert "Today: 26 Jul 2024" in text
        for zone in ("Pacific/Midway", "Pacific/Kiritimati"):  # never on the same day
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            assert marked(row(ASK, YES), tokenizer, templates.LLAMA3) == text
        monkeypatch.undo()
        time.tzset()

    def test_a_server_writes_today(self, tokenizer: PreTrainedTokenizerBase) -> None:
        tokenizer.chat_template = templates.LLAMA3.replace("%d %b %Y", "%Y")
        messages = row(ASK, YES).messages[:1]
        ids = encode_conversation(messages, tokenizer, template="tokenizer")
        rendered = tokenizer.apply_chat_template([ASK], add_generation_prompt=True, return_dict=False)
        assert ids == rendered
        assert ids != encode_conversation(messages, tokenizer, template="tokenizer", day=datetime(1999, 1, 1))

    @pytest.mark.parametrize(
        ("expression", "written"),
        [
            ("strftime_now('%Y-%m-%d')", "2024-07-26"),
            ('strftime_now("%A %H:%M")', "Friday 00:00"),
            ("strftime_now(format='%d')", "26"),
            ("'%s' % strftime_now('%B %Y')", "July 2024"),
            ("strftime_now('%d ' + '%b')", "26 Jul"),
            ("strftime_now('%Y' ~ '-%m')", "2024-07"),
            (r"strftime_now('%d\n%Y')", "26\n2024"),
            ("strftime_now('100 %%d, %-m')", "100 %d, 7"),
            ("strftime_now('today')", "today"),
            ("strftime_now('%s')", "1721952000"),  # in every time zone
        ],
    )
    def test_every_way_to_ask_for_the_day_is_answered(
        self, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, expression: str, written: str
    ) -> None:
        monkeypatch.setenv("TZ", "Pacific/Midway")
        time.tzset()
        tokenizer.chat_template = "\n{{ " + expression + " }};" + tokenizer.chat_template  # type: ignore[operator]
        found = encode(row(ASK, YES), tokenizer, template="tokenizer").input_ids
        monkeypatch.undo()
        time.tzset()
        assert tokenizer.decode(found).startswith(f"\n{written};<|im_start|>user")

    @pytest.mark.parametrize("drawn", ["['Hi', 'Hello'] | random", "lipsum(1)"])
    def test_a_template_that_draws_at_random_is_refused(self, tokenizer: PreTrainedTokenizerBase, drawn: str) -> None:
        tokenizer.chat_template = "{{ " + drawn + " }}" + str(tokenizer.chat_template)
        with pytest.raises(DataError, match=r"draws at random .*: remove that from the template"):
            check_template(tokenizer, "tokenizer")


def test_every_row_that_a_template_refuses_is_named_with_its_line(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = templates.GEMMA
    system = {"role": "system", "content": "Be short."}
    rows = rows_from_objects(
        [{"messages": [system, ASK, YES] if at in (3, 5, 9) else [ASK, YES]} for at in range(12)]
        + [{"messages": [ASK, ASK, YES]}] * 9,
        origin="rows",
    )
    with pytest.raises(DataError) as caught:
        encode_rows(rows, tokenizer, template="tokenizer", max_tokens=9, overlength="error")
    told = str(caught.value).splitlines()
    assert told[0] == "21 rows: 13 problems:"
    assert [line.split(":")[0].strip() for line in told[1:5]] == ["line 4", "line 6", "line 10", "line 13"]
    assert "System role not supported" in told[1]
    assert "must alternate" in told[4]
    assert told[-1].strip() == "and 3 more"
