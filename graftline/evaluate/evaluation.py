"""One model, scored on everything that a pipeline's evaluation names."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftline.data.rows import Row
from graftline.data.template import stop_ids, template_digest
from graftline.evaluate.forgetting import score_documents
from graftline.evaluate.generation import answer_items, generate_answers
from graftline.evaluate.harness import harness_items
from graftline.evaluate.items import completion_items, option_items
from graftline.evaluate.scores import AnswerScore, DocumentScore, ItemScore, Scores
from graftline.evaluate.scoring import score_options
from graftline.progress import OnProgress, silent
from graftline.settings.model import Evaluate

Progress = Callable[[str, str], OnProgress]
"""What is being scored and its unit, to a callback for it."""


@dataclass(frozen=True)
class Plan:
    """What every model of one comparison is scored on.

    ``rows``: the held-out rows; ``labels``: every allowed answer, none where answers are free; ``texts``: general text,
    one document each; ``evaluate``: the pipeline's section; ``task_folder``: where its ``harness.folder`` lies.
    """

    rows: Sequence[Row]
    template: str
    labels: tuple[str, ...]
    texts: Sequence[str]
    evaluate: Evaluate
    task_folder: Path | None = None


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    *,
    progress: Progress = lambda what, unit: silent,
) -> Scores:
    """Score a model.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        plan: what to score.
        progress: makes the callback of each part.

    Raises:
        EvaluationError: nothing to score, a label that is not allowed, or scores that are not finite.
        DataError: the template does not suit a row.
    """
    return Scores(
        template=template_digest(tokenizer, plan.template),
        labels=plan.labels,
        items=tuple(_items(model, tokenizer, plan, progress)),
        general=tuple(_general(model, tokenizer, plan, progress)),
        documents=tuple(_documents(model, tokenizer, plan, progress)),
        answers=tuple(_answers(model, tokenizer, plan, progress)),
    )


def _items(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan, progress: Progress
) -> list[ItemScore]:
    """The labels behind every prompt; without labels the row's own answer, for its NLL."""
    items = (
        option_items(plan.rows, tokenizer, template=plan.template, labels=plan.labels)
        if plan.labels
        else completion_items(plan.rows, tokenizer, template=plan.template)
    )
    ends = stop_ids(tokenizer, template=plan.template)
    return score_options(
        model, items, stop_ids=ends, batch_tokens=plan.evaluate.batch_tokens, on_progress=progress("score", "items")
    )


def _general(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan, progress: Progress
) -> list[ItemScore]:
    harness = plan.evaluate.harness
    if harness is None:
        return []
    items = harness_items(harness.tasks, tokenizer, max_items=harness.max_items, task_folder=plan.task_folder)
    return score_options(
        model, items, batch_tokens=plan.evaluate.batch_tokens, on_progress=progress("general tasks", "items")
    )


def _documents(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan, progress: Progress
) -> list[DocumentScore]:
    if not plan.texts:
        return []
    return score_documents(
        model,
        tokenizer,
        plan.texts,
        batch_tokens=plan.evaluate.batch_tokens,
        on_progress=progress("general text", "windows"),
    )


def _answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan, progress: Progress
) -> list[AnswerScore]:
    section = plan.evaluate.answers
    if section is None:
        return []
    return generate_answers(
        model,
        tokenizer,
        answer_items(plan.rows[: section.max_rows], tokenizer, template=plan.template),
        stop_ids=stop_ids(tokenizer, template=plan.template),
        max_new_tokens=section.max_new_tokens,
        batch_tokens=plan.evaluate.batch_tokens,
        on_progress=progress("answers", "rows"),
    )
