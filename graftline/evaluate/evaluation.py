"""One model, scored on everything that a pipeline's evaluation names."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from graftline.data.rows import Row
from graftline.data.template import encode_answers, encode_prompt, stop_ids, template_digest
from graftline.errors import EvaluationError
from graftline.evaluate.items import completion_items, harness_items, option_items
from graftline.evaluate.metrics import exact_match, rouge_l, token_f1
from graftline.evaluate.option_tree import Tokens
from graftline.evaluate.scores import AnswerScore, DocumentScore, ItemScore, Scores, check_unique, item_id
from graftline.evaluate.scoring import evaluating, score_documents, score_options
from graftline.logs import OnProgress, silent
from graftline.settings.model import BATCH_TOKENS, Evaluate
from graftline.weights.model_folder import max_positions

# Greedy answers in batches, scored against references.
#
# Decoding is transformers' own (`generate`, no sampling). Prompts are padded on the left, so that every answer starts
# in the same column; batches hold prompts of similar length.


@dataclass(frozen=True)
class AnswerItem:
    """A prompt and the texts that count as right."""

    item_id: str
    prompt_ids: Tokens
    references: tuple[str, ...]


def answer_items(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, template: str) -> list[AnswerItem]:
    """One item a row: its last answer is the reference; one with calls or reasoning as the template writes it.

    Raises:
        DataError: the template does not suit a row.
    """
    return [_answer_item(row, tokenizer, template) for row in rows]


def _answer_item(row: Row, tokenizer: PreTrainedTokenizerBase, template: str) -> AnswerItem:
    if not row.messages[-1].fields:
        return AnswerItem(item_id(row), tuple(encode_prompt(row, tokenizer, template=template)), (row.answer,))
    prompt, (answer,) = encode_answers(row, tokenizer, template=template)
    return AnswerItem(item_id(row), tuple(prompt), (str(tokenizer.decode(answer, skip_special_tokens=True)),))


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[AnswerItem],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    batch_tokens: int = BATCH_TOKENS,
    on_progress: OnProgress = silent,
) -> list[AnswerScore]:
    """Answer every item greedily and score it, in the order of ``items``.

    Args:
        model: a causal language model.
        tokenizer: decodes answers; special tokens are left out of the text.
        items: what to answer; ids must be unique.
        stop_ids: tokens that end an answer. `AnswerScore.stop` is false where none came within ``max_new_tokens``.
        max_new_tokens: the longest answer.
        batch_tokens: upper bound on rows × (prompt and answer columns); one item alone may exceed it.
        on_progress: called with items done and in all.

    Raises:
        EvaluationError: no item, an id twice, no stop token, or a prompt that leaves no room for the answer.
    """
    if not items or not stop_ids:
        raise EvaluationError(
            f"{len(items)} items and {len(stop_ids)} stop tokens; generation needs at least one of each: "
            "check data.evaluation_rows and the tokenizer's EOS token"
        )
    check_unique([item.item_id for item in items])
    _check_room(model, items, max_new_tokens)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(stop_ids), pad_token_id=stop_ids[0]
    )
    scores: dict[str, AnswerScore] = {}
    with evaluating(model):
        for batch in _batches(items, max_new_tokens, batch_tokens):
            for item, answer in zip(batch, _generate(model, batch, config), strict=True):
                scores[item.item_id] = _score(item, answer, tokenizer, stop_ids)
            on_progress(len(scores), len(items))
    return [scores[item.item_id] for item in items]


def timed_answer(model: PreTrainedModel, prompt_ids: Tokens, *, num_tokens: int) -> Callable[[], object]:
    """A call that answers one prompt with exactly ``num_tokens`` tokens, for `guards.latency_numbers`."""
    input_ids = torch.tensor([prompt_ids], device=model.device)
    config = GenerationConfig(do_sample=False, max_new_tokens=num_tokens, min_new_tokens=num_tokens)
    generate: Any = model.generate  # transformers types it as a tensor

    def call() -> object:
        with evaluating(model):
            out = generate(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config)
        return out.tolist()  # waits for the device

    return call


def _check_room(model: PreTrainedModel, items: Sequence[AnswerItem], max_new_tokens: int) -> None:
    longest = max(items, key=lambda item: len(item.prompt_ids))
    if len(longest.prompt_ids) + max_new_tokens > max_positions(model.config):
        raise EvaluationError(
            f"item {longest.item_id} has {len(longest.prompt_ids)} tokens and may get {max_new_tokens} more, the model "
            f"takes {max_positions(model.config)}; shorten the prompt or allow fewer new tokens"
        )


def _batches(items: Sequence[AnswerItem], max_new_tokens: int, batch_tokens: int) -> Iterator[list[AnswerItem]]:
    """Longest first: memory is at its peak in the first batch."""
    batch: list[AnswerItem] = []
    for item in sorted(items, key=lambda item: (-len(item.prompt_ids), item.item_id)):
        if batch and (len(batch) + 1) * (len(batch[0].prompt_ids) + max_new_tokens) > batch_tokens:
            yield batch
            batch = []
        batch.append(item)
    yield batch


def _generate(model: PreTrainedModel, batch: Sequence[AnswerItem], config: GenerationConfig) -> list[list[int]]:
    """New tokens of each row, with whatever pads them at the end."""
    width = len(batch[0].prompt_ids)
    input_ids = torch.full((len(batch), width), config.pad_token_id)
    attention_mask = torch.zeros(len(batch), width, dtype=torch.long)
    for row, item in enumerate(batch):
        start = width - len(item.prompt_ids)
        input_ids[row, start:] = torch.tensor(item.prompt_ids)
        attention_mask[row, start:] = 1
    generate: Any = model.generate  # transformers types it as a tensor
    out = generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generation_config=config,
    )
    answers: list[list[int]] = out[:, width:].tolist()
    return answers


def _score(
    item: AnswerItem, tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]
) -> AnswerScore:
    end = next((place for place, token in enumerate(tokens) if token in stop_ids), None)
    written = list(tokens[:end])
    answer = str(tokenizer.decode(written, skip_special_tokens=True))
    return AnswerScore(
        item_id=item.item_id,
        answer=answer,
        exact_match=exact_match(answer, item.references),
        f1=token_f1(answer, item.references),
        rouge_l=rouge_l(answer, item.references),
        num_tokens=len(written),
        stop=end is not None,
    )


Progress = Callable[[str, str], OnProgress]
"""What is being scored and its unit, to a callback for it."""


@dataclass(frozen=True)
class EvaluationPlan:
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
    plan: EvaluationPlan,
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
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: EvaluationPlan, progress: Progress
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
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: EvaluationPlan, progress: Progress
) -> list[ItemScore]:
    harness = plan.evaluate.harness
    if harness is None:
        return []
    items = harness_items(harness.tasks, tokenizer, max_items=harness.max_items, task_folder=plan.task_folder)
    return score_options(
        model, items, batch_tokens=plan.evaluate.batch_tokens, on_progress=progress("general tasks", "items")
    )


def _documents(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: EvaluationPlan, progress: Progress
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
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: EvaluationPlan, progress: Progress
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
