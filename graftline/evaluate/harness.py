"""Multiple-choice tasks of lm-evaluation-harness as items for our scorer, for the gate on general ability.

The harness (optional extra ``harness``) makes prompts, few-shot examples and choices; scoring and comparison are ours,
paired by item. An item's accuracy is the harness's ``acc``: the choice with the highest log-likelihood, not normalized
by length.
"""

import importlib
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftline.data.template import encode_text
from graftline.digest import of_json
from graftline.errors import EvaluationError
from graftline.evaluate.option_tree import OptionItem, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ID_DIGITS = 16
_INSTALL = "pip install -c constraints.txt 'graftline[harness]'"


def harness_items(
    tasks: Sequence[str | dict[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_items: int | None,
    task_folder: Path | None = None,
) -> list[OptionItem]:
    """Items of the named tasks, in the harness's order.

    Args:
        tasks: names that the harness knows, or its task definitions as mappings.
        tokenizer: the model's; a choice is what its ids add to those of the prompt, as in the harness.
        max_items: items of each task, at most; None: all.
        task_folder: a folder of further task definitions (YAML).

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


def _items(name: str, task: Any, tokenizer: "PreTrainedTokenizerBase") -> Iterator[OptionItem]:
    instances = sorted(task.instances, key=lambda instance: (instance.doc_id, instance.idx))
    for _, group in groupby(instances, key=lambda instance: instance.doc_id):
        choices = list(group)
        pairs, doc = [instance.args for instance in choices], choices[0].doc
        gold = task.doc_to_target(doc)
        if isinstance(gold, str):
            gold = task.doc_to_choice(doc).index(gold)
        encoded = [_encode(context, choice, tokenizer) for context, choice in pairs]
        item_id = f"{name}-{of_json([pairs, gold]).hex[:_ID_DIGITS]}"
        yield OptionItem(item_id, encoded[0][0], tuple(option for _, option in encoded), gold)


def _encode(context: str, choice: str, tokenizer: "PreTrainedTokenizerBase") -> tuple[Tokens, Tokens]:
    """Ids of the prompt, and what the choice adds; spaces at the prompt's end belong to the choice."""
    stripped = context.rstrip()
    choice = context[len(stripped) :] + choice
    prompt = tuple(encode_text(stripped, tokenizer))
    return prompt, tuple(encode_text(stripped + choice, tokenizer)[len(prompt) :])
