from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from graftline.data.rows import Message, Row
from graftline.data.template import encode
from graftline.errors import EvaluationError
from graftline.evaluate.items import option_items
from graftline.evaluate.scores import item_id

LABELS = ("animal", "plant", "person")


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_llama)


def row(prompt: str, answer: str, line: int = 1) -> Row:
    messages = (Message("user", prompt, supervised=False), Message("assistant", answer, supervised=True))
    return Row(messages, line)


@pytest.mark.parametrize("template", ["none", "tokenizer", "chatml"])
def test_prompt_and_gold_option_are_the_ids_of_training_without_the_end_token(
    tokenizer: PreTrainedTokenizerBase, template: str
) -> None:
    rows = [row("Definition: a small animal\nCategory:", " animal"), row("Definition: a plant\nCategory:", " plant", 2)]
    for source, item in zip(rows, option_items(rows, tokenizer, template=template, labels=LABELS), strict=True):
        encoded = encode(source, tokenizer, template=template)
        learned = [i for i, kept in zip(encoded.input_ids, encoded.supervised, strict=True) if kept]
        assert list(item.prompt_ids) == encoded.input_ids[: -len(learned)]
        assert list(item.option_ids[item.gold]) == learned[:-1]
        assert LABELS[item.gold] == source.answer.strip()
        assert [tokenizer.decode(option) for option in item.option_ids] == [" animal", " plant", " person"]


@pytest.mark.parametrize("template", ["none", "tokenizer", "chatml"])
@pytest.mark.parametrize("labels", [("1", "10", "2"), ("organ", "organism"), ("no", "yes", "not sure", "no idea")])
def test_labels_of_which_one_begins_another_are_scored_with_their_end(
    tokenizer: PreTrainedTokenizerBase, template: str, labels: tuple[str, ...]
) -> None:
    rows = [row("x", f" {labels[0]}"), row("y", f" {labels[1]}", 2)]
    for source, item in zip(rows, option_items(rows, tokenizer, template=template, labels=labels), strict=True):
        assert item.ended
        assert [tokenizer.decode(option) for option in item.option_ids] == [f" {label}<|im_end|>" for label in labels]
        ids = encode(source, tokenizer, template=template).input_ids
        assert [*item.prompt_ids, *item.option_ids[item.gold]] == ids


def test_labels_of_which_none_begins_another_are_scored_without_their_end(tokenizer: PreTrainedTokenizerBase) -> None:
    assert not option_items([row("x", " plant")], tokenizer, template="none", labels=LABELS)[0].ended
    # White space behind the label ends it already.
    lines = option_items([row("x", "1\n")], tokenizer, template="none", labels=("1", "10"))
    assert not lines[0].ended


def test_labels_are_written_as_the_row_writes_its_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    item = option_items([row("x", "plant\n")], tokenizer, template="none", labels=LABELS)[0]
    assert [tokenizer.decode(option) for option in item.option_ids] == ["animal\n", "plant\n", "person\n"]


def test_ids_depend_on_the_messages_and_not_on_place_or_template(tokenizer: PreTrainedTokenizerBase) -> None:
    assert item_id(row("x", " plant", 1)) == item_id(row("x", " plant", 9))
    assert item_id(row("x", " plant")) != item_id(row("y", " plant"))
    assert item_id(row("x", " plant")) != item_id(row("x", " animal"))
    plain, chat = (
        option_items([row("x", " plant")], tokenizer, template=template, labels=LABELS)[0]
        for template in ("none", "chatml")
    )
    assert plain.item_id == chat.item_id
    assert item_id(replace(row("x", " plant"), tools=({"function": {"name": "f"}},))) != plain.item_id
    assert plain.prompt_ids != chat.prompt_ids


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        ([], LABELS, "empty"),
        ([row("x", " stone", 7)], LABELS, "line 7: the answer is 'stone'.*animal, plant, person"),
        ([row("x", " plant")], ("plant",), "at least two"),
        ([row("x", " plant")], ("plant", "plant", "animal"), "each once"),
        ([row("x", " plant", 3), row("x", " plant", 8)], LABELS, "lines 3 and 8 .*the same"),
        ([replace(row("x", " plant"), messages=row("x", "plant").messages[:1])], LABELS, "by user"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(
    tokenizer: PreTrainedTokenizerBase, rows: list[Row], labels: tuple[str, ...], message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        option_items(rows, tokenizer, template="none", labels=labels)
