"""Rows as token ids: answers and their end are learned, nothing else, and serving's prompt is training's prompt."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from graftline.data.encoding import encode_rows
from graftline.data.rows import Message, Row
from graftline.data.template import (
    TEMPLATES,
    encode,
    encode_prompt,
    encode_text,
    stop_ids,
    template_digest,
)
from graftline.errors import DataError

CHAT = ("tokenizer", "chatml")
END = "<|im_end|>"


@pytest.fixture
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def shared_tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_llama)


def row(*texts: str, line: int = 1) -> Row:
    """User and assistant take turns."""
    roles = ["user", "assistant"]
    return Row(tuple(Message(roles[i % 2], text, i % 2 == 1) for i, text in enumerate(texts)), line)


def learned(found: Row, tokenizer: PreTrainedTokenizerBase, template: str) -> list[str]:
    """The supervised runs, decoded."""
    encoded = encode(found, tokenizer, template=template)
    runs: list[list[int]] = [[]]
    for token, supervised in zip(encoded.input_ids, encoded.supervised, strict=True):
        if supervised:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_answer_and_its_end_are_learned_and_nothing_else(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    assert learned(row("Category:", " animal"), tokenizer, template) == [" animal" + END]


@pytest.mark.parametrize("template", CHAT)
def test_every_answer_of_a_conversation_is_learned_with_its_end(
    tokenizer: PreTrainedTokenizerBase, template: str
) -> None:
    assert learned(row("Q1", "A1", "Q2", "A2"), tokenizer, template) == ["A1" + END, "A2" + END]


def test_an_answer_that_is_not_supervised_stays_in_the_text_only(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = row("Q1", "A1", "Q2", "A2").messages
    silent = Row((messages[0], Message("assistant", "A1", supervised=False), *messages[2:]), 1)
    assert learned(silent, tokenizer, "tokenizer") == ["A2" + END]
    both, one = (encode(r, tokenizer, template="tokenizer") for r in (row("Q1", "A1", "Q2", "A2"), silent))
    assert both.input_ids == one.input_ids


def test_template_none_is_prompt_then_completion_then_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = encode(row("Category:", " animal"), tokenizer, template="none")
    prompt = tokenizer("Category:").input_ids
    assert encoded.input_ids == [
        *prompt,
        *tokenizer(" animal", add_special_tokens=False).input_ids,
        tokenizer.eos_token_id,
    ]


def test_the_tokens_that_a_tokenizer_puts_before_a_text_stand_before_the_prompt_once(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    encoded = encode(row("a", "b"), tokenizer, template="none")
    assert tokenizer.decode(encoded.input_ids) == "<|im_start|>ab<|im_end|>"
    assert encode_prompt(row("a", "b"), tokenizer, template="none") == tokenizer("a").input_ids[:-1]
    assert encode_text("a b", tokenizer) == tokenizer("a b").input_ids[:-1]


@pytest.mark.parametrize("template", CHAT)
def test_the_ids_are_those_that_transformers_renders(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    conversation = row("Q1", "A1", "Q2", "A2")
    turns = [{"role": m.role, "content": m.content} for m in conversation.messages]
    rendered = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    found = encode(conversation, tokenizer, template=template).input_ids
    assert rendered[: len(found)] == found
    assert (
        tokenizer.decode(rendered[len(found) :]) == "\n"
    )  # The template's line end after the last answer teaches nothing.
    prompt = tokenizer.apply_chat_template(turns[:-1], tokenize=True, add_generation_prompt=True, return_dict=False)
    assert encode_prompt(conversation, tokenizer, template=template) == prompt


def test_no_token_spans_prompt_and_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    joint = tokenizer("Category").input_ids
    assert len(joint) == 1  # One token, if the text were tokenized as a whole.
    encoded = encode(row("Cat", "egory"), tokenizer, template="none")
    assert encode_prompt(row("Cat", "egory"), tokenizer, template="none") == tokenizer("Cat").input_ids
    assert learned(row("Cat", "egory"), tokenizer, "none") == ["egory" + END]
    assert tokenizer.decode(encoded.input_ids) == "Category" + END


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0<"), min_size=1, max_size=12).filter(
    str.strip
)


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(TEXT, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0),
    template=st.sampled_from(CHAT),
)
def test_the_learned_text_is_the_answers_whatever_they_say(
    shared_tokenizer: PreTrainedTokenizerBase, texts: list[str], template: str
) -> None:
    conversation = row(*texts)
    assert learned(conversation, shared_tokenizer, template) == [text + END for text in texts[1::2]]
    prompt = encode_prompt(conversation, shared_tokenizer, template=template)
    assert encode(conversation, shared_tokenizer, template=template).input_ids[: len(prompt)] == prompt


@settings(max_examples=150, deadline=None)
@given(prompt=TEXT, completion=TEXT)
def test_without_a_template_the_ids_decode_to_the_text_and_begin_with_the_prompt_alone(
    shared_tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str
) -> None:
    encoded = encode(row(prompt, completion), shared_tokenizer, template="none")
    alone = shared_tokenizer(prompt).input_ids
    assert shared_tokenizer.decode(encoded.input_ids) == prompt + completion + END
    assert encoded.input_ids[: len(alone)] == alone
    assert encoded.supervised == [False] * len(alone) + [True] * (len(encoded.input_ids) - len(alone))


FORGETFUL = (  # Shows the last answer only: like templates that strip the reasoning of earlier turns.
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'user' or loop.last %}{{ m['content'] }}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDLESS = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_template_that_changes_earlier_turns_is_refused_with_the_line(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = FORGETFUL
    assert learned(row("Q1", "A1"), tokenizer, "tokenizer") == ["A1" + END]
    with pytest.raises(DataError, match=r"line 9: the chat template renders turn 2 differently.*give earlier answers"):
        encode(row("Q1", "A1", "Q2", "A2", line=9), tokenizer, template="tokenizer")


def test_a_template_that_changes_an_answer_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'] | upper")
    with pytest.raises(DataError, match=r"line 1: the chat template does not show turn 1 \(user\) as it is written"):
        encode(row("q", "lower"), tokenizer, template="tokenizer")


def test_a_template_that_does_not_end_answers_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = ENDLESS
    with pytest.raises(DataError, match=r"ends an answer with .* not with a special token"):
        encode(row("q", "a"), tokenizer, template="tokenizer")


def test_a_template_that_refuses_a_conversation_says_why(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}"
        + tokenizer.chat_template
    )
    conversation = Row((Message("system", "S", False), *row("Q", "A").messages), 1)
    with pytest.raises(DataError, match="refuses a conversation of system, user: no system turn here"):
        encode(conversation, tokenizer, template="tokenizer")


def test_a_missing_or_unknown_template_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="template 'alpaca' is not known; expected none, tokenizer, chatml"):
        encode_rows([row("q", "a")], tokenizer, template="alpaca", max_tokens=99, overlength="error")
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template; set none or chatml"):
        template_digest(tokenizer, "tokenizer")


def test_chatml_needs_its_two_tokens(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda _: {"<|im_start|>": 1})
    with pytest.raises(DataError, match=r"has no token <\|im_end\|>"):
        template_digest(tokenizer, "chatml")


def test_a_tokenizer_without_eos_is_refused_where_nothing_else_ends_an_answer(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no EOS token"):
        encode(row("q", "a"), tokenizer, template="none")
    assert stop_ids(tokenizer, template="tokenizer") == (2,)


def test_template_none_refuses_a_conversation(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(
        DataError,
        match="line 5: template 'none' takes one prompt and one completion, the row has user, assistant, user",
    ):
        encode(row("Q1", "A1", "Q2", "A2", line=5), tokenizer, template="none")


def test_the_end_of_a_turn_and_another_eos_both_stop(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.eos_token = "<|endoftext|>"
    assert stop_ids(tokenizer, template="tokenizer") == (2, 0)
    assert learned(row("Q", "A"), tokenizer, "tokenizer") == ["A" + END]
    assert learned(row("Q", "A"), tokenizer, "none") == ["A<|endoftext|>"]


ROWS = [row("a", "b", line=1), row("a" * 40, "b", line=2), row("a", "b" * 40, line=3)]


def test_a_row_that_is_too_long_is_an_error_that_names_lines(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(
        DataError,
        match=r"2 of 3 rows have more than 10 tokens \(the longest has 42\): lines 2, 3; raise data.max_tokens",
    ):
        encode_rows(ROWS, tokenizer, template="none", max_tokens=10, overlength="error")


def test_dropped_rows_are_listed_and_the_others_keep_their_order(tokenizer: PreTrainedTokenizerBase) -> None:
    found = encode_rows(ROWS, tokenizer, template="none", max_tokens=10, overlength="drop")
    assert (found.dropped_lines, found.truncated_lines) == ((2, 3), ())
    assert tuple(found.rows) == (ROWS[0],)
    assert found.encoded == (encode(ROWS[0], tokenizer, template="none"),)


def test_truncated_rows_keep_their_start_and_are_listed(tokenizer: PreTrainedTokenizerBase) -> None:
    found = encode_rows(ROWS, tokenizer, template="none", max_tokens=10, overlength="truncate")
    assert (found.dropped_lines, found.truncated_lines) == ((), (2, 3))
    assert [len(encoded.input_ids) for encoded in found.encoded] == [3, 10, 10]
    assert [encoded.num_supervised for encoded in found.encoded] == [2, 0, 9]
    assert found.encoded[2].input_ids == encode(ROWS[2], tokenizer, template="none").input_ids[:10]


def test_dropping_every_row_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="3 of 3 rows"):
        encode_rows(ROWS, tokenizer, template="none", max_tokens=1, overlength="drop")


def test_the_digest_changes_with_what_changes_the_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    digests = {template_digest(tokenizer, template) for template in TEMPLATES}
    tokenizer.eos_token = "<|endoftext|>"
    digests |= {template_digest(tokenizer, template) for template in TEMPLATES}
    tokenizer.chat_template += " "
    digests.add(template_digest(tokenizer, "tokenizer"))
    assert len(digests) == 7


def test_the_digest_is_the_same_for_the_same_tokenizer_read_twice(
    tokenizer: PreTrainedTokenizerBase, tiny_llama: Path
) -> None:
    again = AutoTokenizer.from_pretrained(tiny_llama)
    assert template_digest(tokenizer, "tokenizer") == template_digest(again, "tokenizer")
