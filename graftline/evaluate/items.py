"""Items to score: rows with every label as an answer, and multiple-choice tasks of lm-evaluation-harness."""

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from graftline.data.rows import Row
from graftline.data.template import encode_answers, encode_text, labels_as_answers
from graftline.digest import of_json
from graftline.errors import EvaluationError
from graftline.evaluate.option_tree import OptionItem, Tokens
from graftline.evaluate.scores import ID_DIGITS, item_id

# Rows as items to score: the prompt as it is served, with every label in place of the row's answer.


def option_items(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, template: str, labels: Sequence[str]
) -> list[OptionItem]:
    """One item per row. Its last answer must be one of ``labels``; all labels become options, in their order.

    The options of a preference pair are its two answers, and the chosen one is right.

    Labels keep the white space around the row's answer. If one label's tokens are a prefix of another's ("1" and "10"),
    all labels are scored with the token that ends an answer: without it, the shorter label's probability would include
    the longer's.

    Raises:
        EvaluationError: no rows, fewer than two labels, a duplicate label or row, or an answer that is not a label.
        DataError: the template does not fit a row.
    """
    _require_rows(rows)
    if len(set(labels)) < max(2, len(labels)):
        raise EvaluationError(f"labels are {list(labels)}; expected at least two, each once: check data.labels")
    _refuse_duplicates(rows)
    items = [
        _label_item(row, tokenizer, template=template, labels=labels)
        if row.rejected is None
        else _item(row, tokenizer, template=template, answers=(row.answer, row.rejected), gold=0)
        for row in rows
    ]
    return items if any(map(_has_prefixes, items)) else [_without_end(item) for item in items]


def completion_items(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, template: str) -> list[OptionItem]:
    """One item per row with the row's own answer as its only option, for the NLL of answers that are not labels.

    Raises:
        EvaluationError: no rows, or a duplicate row.
        DataError: the template does not fit a row.
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
    answers = labels_as_answers(row, labels)
    return _item(row, tokenizer, template=template, answers=answers, gold=list(labels).index(label))


def _item(
    row: Row, tokenizer: PreTrainedTokenizerBase, *, template: str, answers: Sequence[str] | None, gold: int
) -> OptionItem:
    prompt, options = encode_answers(row, tokenizer, template=template, texts=answers)
    return OptionItem(item_id(row), tuple(prompt), tuple(map(tuple, options)), gold, ended=True)


def _has_prefixes(item: OptionItem) -> bool:
    """Whether one option, without its end token, is a prefix of another."""
    bare = sorted(option[:-1] for option in item.option_ids)
    # In sorted order, the extensions of an option come right after it.
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


# Multiple-choice tasks of lm-evaluation-harness as items for our scorer, for the gate on general ability.
#
# The harness (optional extra ``harness``) builds prompts, few-shot examples and choices; scoring and comparison are
# ours, paired by item. An item's accuracy is the harness's ``acc``: the choice with the highest log-likelihood, not
# normalized by length.

_INSTALL = "pip install -c constraints.txt 'graftline[harness]'"


def harness_items(
    tasks: Sequence[str | dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_items: int | None,
    task_folder: Path | None = None,
) -> list[OptionItem]:
    """Items of the named tasks, in the harness's order.

    Args:
        tasks: task names of the harness, or task definitions as mappings.
        tokenizer: the model's; as in the harness, a choice's ids are those that it adds to the prompt's.
        max_items: maximum items per task; None: all.
        task_folder: a folder of additional task definitions (YAML).

    Raises:
        EvaluationError: the extra is not installed, a task cannot be loaded, or is not multiple choice with one prompt
            and one right answer.
    """
    items = []
    for name, task in _load(tasks, task_folder).items():
        if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input or task.multiple_target:
            raise EvaluationError(
                f"the harness task {name} is of type {task.OUTPUT_TYPE}, with several prompts or targets: "
                f"{bool(task.multiple_input or task.multiple_target)}; expected multiple_choice with one of each"
            )
        task.build_all_requests(limit=max_items)
        items += list(_items(name, task, tokenizer))
    return items


def _load(tasks: Sequence[str | dict[str, Any]], task_folder: Path | None) -> dict[str, Any]:
    try:
        harness = importlib.import_module("lm_eval.tasks")  # an optional extra that takes seconds to import
    except ImportError as error:
        raise EvaluationError(f"tasks of lm-evaluation-harness need an extra that is missing: {_INSTALL}") from error
    try:
        loaded = harness.TaskManager(include_path=task_folder).load(list(tasks))["tasks"]
    except Exception as error:
        raise EvaluationError(
            f"the harness cannot load {', '.join(map(str, tasks))}: {error}; check the names (lm-eval ls tasks) and "
            "that their data can be reached"
        ) from error
    if not loaded:
        raise EvaluationError(f"the harness knows no task in {list(tasks)}; see: lm-eval ls tasks")
    return dict(loaded)


def _items(name: str, task: Any, tokenizer: PreTrainedTokenizerBase) -> Iterator[OptionItem]:
    instances = sorted(task.instances, key=lambda instance: (instance.doc_id, instance.idx))
    for _, group in groupby(instances, key=lambda instance: instance.doc_id):
        choices = list(group)
        pairs, doc = [instance.args for instance in choices], choices[0].doc
        gold = task.doc_to_target(doc)
        if isinstance(gold, str):
            gold = task.doc_to_choice(doc).index(gold)
        encoded = [_encode(context, choice, tokenizer) for context, choice in pairs]
        item_id = f"{name}-{of_json([pairs, gold]).hex[:ID_DIGITS]}"
        yield OptionItem(item_id, encoded[0][0], tuple(option for _, option in encoded), gold)


def _encode(context: str, choice: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Tokens, Tokens]:
    """Ids of the prompt and of the choice; trailing spaces of the prompt belong to the choice."""
    stripped = context.rstrip()
    choice = context[len(stripped) :] + choice
    prompt = tuple(encode_text(stripped, tokenizer))
    return prompt, tuple(encode_text(stripped + choice, tokenizer)[len(prompt) :])
