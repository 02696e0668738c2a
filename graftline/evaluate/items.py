"""Rows as items to score: the prompt as a server would send it, and every label in the place of the row's answer."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from graftline.data.rows import Row
from graftline.data.template import encode_answers
from graftline.digest import of_json
from graftline.errors import EvaluationError
from graftline.evaluate.option_tree import OptionItem

_ID_DIGITS = 16


def item_id(row: Row) -> str:
    """A name that depends on the row's messages and tools alone: equal rows of two evaluations get equal ids."""
    messages = [(message.role, message.content) for message in row.messages]
    return of_json([messages, row.tools] if row.tools else messages).hex[:_ID_DIGITS]


def option_items(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, template: str, labels: Sequence[str]
) -> list[OptionItem]:
    """One item a row: its last answer must be one of ``labels``, and all labels become options in their order.

    A label is written as the row writes its answer: white space around the answer is kept around every label. Where one
    label's tokens begin another's ("1" and "10"), all labels are scored with the token that ends an answer: without it
    the shorter one would be as likely as both together.

    Raises:
        EvaluationError: no row, fewer than two labels or one twice, an answer that is no label, or a row twice.
        DataError: the template does not suit a row.
    """
    _require_rows(rows)
    if len(set(labels)) < max(2, len(labels)):
        raise EvaluationError(f"labels are {list(labels)}; expected at least two, each once: check data.labels")
    _refuse_duplicates(rows)
    items = [_label_item(row, tokenizer, template=template, labels=labels) for row in rows]
    return items if any(map(_has_prefixes, items)) else [_without_end(item) for item in items]


def completion_items(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, template: str) -> list[OptionItem]:
    """One item a row with the row's own answer as its only option: for the NLL of answers that are no labels.

    Raises:
        EvaluationError: no row, or a row twice.
        DataError: the template does not suit a row.
    """
    _require_rows(rows)
    _refuse_duplicates(rows)
    return [_without_end(_item(row, tokenizer, template=template, answers=None, gold=0)) for row in rows]


def _label_item(row: Row, tokenizer: PreTrainedTokenizerBase, *, template: str, labels: Sequence[str]) -> OptionItem:
    answer = row.messages[-1]
    label = answer.content.strip()
    if answer.role != "assistant" or label not in labels:
        raise EvaluationError(
            f"line {row.source_line}: the answer is {label!r} by {answer.role}; expected one of {', '.join(labels)}: "
            "correct the row or add the label to data.labels"
        )
    start = answer.content.index(label)
    before, after = answer.content[:start], answer.content[start + len(label) :]
    answers = [before + text + after for text in labels]
    return _item(row, tokenizer, template=template, answers=answers, gold=list(labels).index(label))


def _item(
    row: Row, tokenizer: PreTrainedTokenizerBase, *, template: str, answers: Sequence[str] | None, gold: int
) -> OptionItem:
    prompt, options = encode_answers(row, tokenizer, template=template, texts=answers)
    return OptionItem(item_id(row), tuple(prompt), tuple(map(tuple, options)), gold, ended=True)


def _has_prefixes(item: OptionItem) -> bool:
    """Whether an option without its end begins another one."""
    bare = sorted(option[:-1] for option in item.option_ids)
    # In sorted order, what begins with an option stands right behind it.
    return any(later[: len(option)] == option for option, later in pairwise(bare))


def _without_end(item: OptionItem) -> OptionItem:
    return replace(item, option_ids=tuple(option[:-1] for option in item.option_ids), ended=False)


def _require_rows(rows: Sequence[Row]) -> None:
    if not rows:
        raise EvaluationError("the evaluation set is empty; at least one row is needed: check data.evaluation_rows")


def _refuse_duplicates(rows: Sequence[Row]) -> None:
    lines: dict[str, int] = {}
    for row in rows:
        first = lines.setdefault(item_id(row), row.source_line)
        if first != row.source_line:
            raise EvaluationError(
                f"lines {first} and {row.source_line} of the evaluation rows are the same; one item counted twice "
                "makes intervals too narrow: remove one"
            )
