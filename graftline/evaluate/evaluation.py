"""Score one model on everything that a pipeline's evaluation covers."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from graftline.data.rows import Row
from graftline.data.template import encode_answers, encode_prompt, stop_ids, template_digest
from graftline.digest import Digest, canonical_json, of_stream
from graftline.errors import EvaluationError
from graftline.evaluate.items import completion_items, harness_items, option_items
from graftline.evaluate.metrics import exact_match, rouge_l, token_f1
from graftline.evaluate.option_tree import OptionItem, Tokens
from graftline.evaluate.parts import (
    Parts,
    Runner,
    ScoreBatch,
    ScoreRow,
    SectionWork,
    batches_by_length,
    evaluating,
    in_this_process,
    score_section,
)
from graftline.evaluate.scores import SECTIONS, AnswerScore, Scores, Section, check_unique, item_id
from graftline.evaluate.scoring import document_work, option_work
from graftline.logs import OnProgress, silent
from graftline.settings.model import BATCH_TOKENS, Evaluate
from graftline.weights.model_folder import max_positions

# Greedy answers in batches, scored against references.
#
# Decoding uses transformers' `generate` without sampling. Prompts are left-padded, so that every answer starts in the
# same column; batches hold prompts of similar length.


@dataclass(frozen=True)
class AnswerItem:
    """A prompt and its reference answers."""

    item_id: str
    prompt_ids: Tokens
    references: tuple[str, ...]


def answer_items(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, template: str) -> list[AnswerItem]:
    """One item per row. Its last answer is the reference, rendered by the template if it has calls or reasoning.

    Raises:
        DataError: the template does not fit a row.
    """
    return [_answer_item(row, tokenizer, template) for row in rows]


def _answer_item(row: Row, tokenizer: PreTrainedTokenizerBase, template: str) -> AnswerItem:
    if row.messages[-1].is_text:
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
        tokenizer: decodes answers, without special tokens.
        items: prompts to answer; ids must be unique.
        stop_ids: tokens that end an answer. `AnswerScore.stop` is false if none came within ``max_new_tokens``.
        max_new_tokens: maximum answer length in tokens.
        batch_tokens: upper bound on rows × (prompt and answer columns); a single item may exceed it.
        on_progress: called with the items done and the total.

    Raises:
        EvaluationError: no items, a duplicate id, no stop token, or a prompt that leaves no room for the answer.
    """
    work = answer_work(items, model.config, stop_ids=stop_ids, max_new_tokens=max_new_tokens, batch_tokens=batch_tokens)
    return list(score_section(work, in_this_process(model, tokenizer), on_progress=on_progress))


@dataclass(frozen=True)
class _AnswerScorer:
    """Answers prompts and scores the answers."""

    stop_ids: tuple[int, ...]
    max_new_tokens: int

    def on(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> ScoreBatch:
        assert tokenizer is not None  # answers are decoded
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=list(self.stop_ids),
            pad_token_id=self.stop_ids[0],
        )

        def score(batch: list[AnswerItem]) -> list[ScoreRow]:
            answers = _generate(model, batch, config)
            return [_score(item, answer, tokenizer, self.stop_ids) for item, answer in zip(batch, answers, strict=True)]

        return score


def answer_work(
    items: Sequence[AnswerItem],
    config: PreTrainedConfig,
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    batch_tokens: int = BATCH_TOKENS,
) -> SectionWork:
    """Batches of prompts to answer; arguments and errors as for `generate_answers`."""
    if not items or not stop_ids:
        raise EvaluationError(
            f"{len(items)} items and {len(stop_ids)} stop tokens; generation needs at least one of each: "
            "check data.evaluation_rows and the tokenizer's EOS token"
        )
    check_unique([item.item_id for item in items])
    _check_room(config, items, max_new_tokens)
    in_order = sorted(items, key=lambda item: item.item_id)
    batches = list(
        batches_by_length(in_order, lambda item: len(item.prompt_ids) + max_new_tokens, batch_tokens=batch_tokens)
    )

    def collect(found: Sequence[list[ScoreRow]]) -> tuple[ScoreRow, ...]:
        by_id = {row.item_id: row for rows in found for row in rows}
        return tuple(by_id[item.item_id] for item in items)

    scorer = _AnswerScorer(tuple(stop_ids), max_new_tokens)
    return SectionWork("answers", batches, [len(batch) for batch in batches], scorer, collect)


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


def _check_room(config: PreTrainedConfig, items: Sequence[AnswerItem], max_new_tokens: int) -> None:
    longest = max(items, key=lambda item: len(item.prompt_ids))
    if len(longest.prompt_ids) + max_new_tokens > max_positions(config):
        raise EvaluationError(
            f"item {longest.item_id} has {len(longest.prompt_ids)} tokens and may get {max_new_tokens} more, the model "
            f"takes {max_positions(config)}; shorten the prompt or allow fewer new tokens"
        )


def _generate(model: PreTrainedModel, batch: Sequence[AnswerItem], config: GenerationConfig) -> list[list[int]]:
    """Generated tokens of each row, including trailing padding."""
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
    return answer_score(item, answer, num_tokens=len(written), stop=end is not None)


def answer_score(item: AnswerItem, answer: str, *, num_tokens: int, stop: bool) -> AnswerScore:
    """An answer of so many tokens against the item's references; ``stop``: whether it ended by itself."""
    return AnswerScore(
        item_id=item.item_id,
        answer=answer,
        exact_match=exact_match(answer, item.references),
        f1=token_f1(answer, item.references),
        rouge_l=rouge_l(answer, item.references),
        num_tokens=num_tokens,
        stop=stop,
    )


Progress = Callable[[str, str], OnProgress]
"""Makes a progress callback from what is being scored and its unit."""


@dataclass(frozen=True)
class EvaluationPlan:
    """The inputs that all models of one comparison are scored on.

    ``rows``: the held-out rows; ``labels``: every allowed answer, empty for free answers; ``texts``: general text, one
    document each; ``evaluate``: the pipeline's section; ``task_folder``: the path of its ``harness.folder``.
    """

    rows: Sequence[Row]
    template: str
    labels: tuple[str, ...]
    texts: Sequence[str]
    evaluate: Evaluate
    task_folder: Path | None = None


@dataclass(frozen=True)
class Prepared:
    """An `EvaluationPlan` encoded with a model's tokenizer and template."""

    template: Digest
    labels: tuple[str, ...]
    items: Sequence[OptionItem]
    general: Sequence[OptionItem]
    texts: Sequence[str]
    answers: Sequence[AnswerItem]
    stop_ids: tuple[int, ...]
    max_new_tokens: int
    """Maximum length of a free answer; 0 if none are generated."""
    batch_tokens: int

    def digest(self) -> Digest:
        """Digest of every part: it changes whenever the scored content changes."""
        return of_stream(canonical_json(part) + b"\n" for part in self._as_json())

    def _as_json(self) -> Iterator[Any]:
        yield {
            "template": str(self.template),
            "labels": self.labels,
            "counts": [len(self.items), len(self.general), len(self.texts), len(self.answers)],
            "stop_ids": self.stop_ids,
            "max_new_tokens": self.max_new_tokens,
            "batch_tokens": self.batch_tokens,
        }
        for item in (*self.items, *self.general):
            yield [item.item_id, item.prompt_ids, item.option_ids, item.gold, item.ended]
        yield from self.texts
        for answer in self.answers:
            yield [answer.item_id, answer.prompt_ids, answer.references]


def prepare(tokenizer: PreTrainedTokenizerBase, plan: EvaluationPlan) -> Prepared:
    """Encode the items for models with this tokenizer; no model is needed.

    Raises:
        EvaluationError: no rows, or a label that is not allowed.
        DataError: the template does not fit a row.
    """
    section, template = plan.evaluate, plan.template
    items = (
        option_items(plan.rows, tokenizer, template=template, labels=plan.labels)
        if plan.labels
        # Without labels, score the row's own answer for its NLL.
        else completion_items(plan.rows, tokenizer, template=template)
    )
    general: list[OptionItem] = []
    if harness := section.harness:
        general = harness_items(harness.tasks, tokenizer, max_items=harness.max_items, task_folder=plan.task_folder)
    answers = section.answers and answer_items(plan.rows[: section.answers.max_rows], tokenizer, template=template)
    return Prepared(
        template=template_digest(tokenizer, template),
        labels=plan.labels,
        items=items,
        general=general,
        texts=plan.texts,
        answers=answers or (),
        stop_ids=tuple(stop_ids(tokenizer, template=template)),
        max_new_tokens=section.answers.max_new_tokens if section.answers else 0,
        batch_tokens=section.batch_tokens,
    )


_SHOWN = {
    "items": ("score", "items"),
    "general": ("general tasks", "items"),
    "documents": ("general text", "windows"),
    "answers": ("answers", "rows"),
}
"""Name and unit of each section, for progress."""


def score_prepared(
    prepared: Prepared,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    run: Runner,
    *,
    parts: Parts | None = None,
    progress: Progress = lambda what, unit: silent,
    only: Collection[Section] = SECTIONS,
) -> Scores:
    """Score a model, section by section.

    Args:
        prepared: what to score.
        tokenizer: the model's.
        config: the model's.
        run: scores batches with the model.
        parts: where scored batches are stored; None: nowhere.
        progress: makes the progress callback of each section.
        only: the sections that are scored.

    Raises:
        EvaluationError: nothing to score, an item too long for the model, or non-finite scores.
    """
    found: dict[str, Any] = {}
    for work in _works(prepared, tokenizer, config, only):
        on_progress = progress(*_SHOWN[work.section])
        found[work.section] = score_section(work, run, parts=parts, on_progress=on_progress)
    return Scores(template=prepared.template, labels=prepared.labels, **found)


def _works(
    prepared: Prepared, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, only: Collection[Section]
) -> Iterator[SectionWork]:
    """The sections with something to score."""
    ends, batch_tokens = prepared.stop_ids, prepared.batch_tokens
    if "items" in only:
        labels = prepared.labels
        yield option_work("items", prepared.items, config, stop_ids=ends, batch_tokens=batch_tokens, labels=labels)
    if prepared.general and "general" in only:
        yield option_work("general", prepared.general, config, batch_tokens=batch_tokens)
    if prepared.texts and "documents" in only:
        yield document_work(prepared.texts, tokenizer, config, batch_tokens=batch_tokens)
    if prepared.max_new_tokens and "answers" in only:
        yield answer_work(
            prepared.answers,
            config,
            stop_ids=ends,
            max_new_tokens=prepared.max_new_tokens,
            batch_tokens=batch_tokens,
        )


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: EvaluationPlan,
    *,
    progress: Progress = lambda what, unit: silent,
) -> Scores:
    """Score a model in memory.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        plan: what to score.
        progress: makes the progress callback of each section.

    Raises:
        EvaluationError: nothing to score, a label that is not allowed, or non-finite scores.
        DataError: the template does not fit a row.
    """
    run = in_this_process(model, tokenizer)
    return score_prepared(prepare(tokenizer, plan), tokenizer, model.config, run, progress=progress)
