"""Log-likelihood of each option of each item: as exact as scoring one at a time, and several times faster.

Three things are computed only once: the prefix common to all prompts (a cached forward pass, expanded over the batch),
each item's prompt (its options follow as a tree, under a tree mask) and the tokens that options share. The output head
runs only on the last prompt position and the tree. Rows hold several items, longest first (`option_tree`).

Tensor names: B rows, T columns, P cached prefix, S = P + T, N slots of a batch, K slots of an item, V vocabulary.
"""

import contextlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from graftline.data.template import encode_text
from graftline.digest import of_json
from graftline.errors import EvaluationError
from graftline.evaluate.option_tree import (
    OptionItem,
    OptionTree,
    PackedBatch,
    PackedItem,
    Rows,
    Tokens,
    build_tree,
    collate,
    pack,
)
from graftline.evaluate.parts import (
    ScoreBatch,
    ScoreRow,
    SectionWork,
    batches_by_length,
    in_this_process,
    require_finite,
    score_section,
)
from graftline.evaluate.scores import ID_DIGITS, DocumentScore, ItemScore, Section, check_unique
from graftline.logs import OnProgress, silent
from graftline.settings.model import BATCH_TOKENS
from graftline.weights.model_folder import max_positions

_MAX_LOGITS = 1 << 26
"""Maximum logits of one forward pass: 256 MiB in fp32, for any vocabulary size."""


@dataclass(frozen=True)
class _OptionBatch:
    """One forward pass: rows of packed items, and those items in the order of their slots."""

    rows: Rows
    items: tuple[OptionItem, ...]

    @property
    def packed(self) -> list[PackedItem]:
        return [work for row in self.rows for work in row]


@dataclass(frozen=True)
class _OptionScorer:
    """Scores options after the common prefix of all prompts."""

    prefix: Tokens
    stop_ids: frozenset[int]

    def on(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> ScoreBatch:
        cache = _prefix_cache(model, self.prefix)

        def score(batch: _OptionBatch) -> list[ScoreRow]:
            packed = batch.packed
            logits_NV = _forward(model, batch.rows, cache, len(self.prefix))
            pieces = logits_NV.split([work.num_slots for work in packed])
            return [
                _score(item, work.tree, logits_KV, self.stop_ids)
                for item, work, logits_KV in zip(batch.items, packed, pieces, strict=True)
            ]

        return score


def option_work(
    section: Section,
    items: Sequence[OptionItem],
    config: PreTrainedConfig,
    *,
    stop_ids: Collection[int] = (),
    batch_tokens: int = BATCH_TOKENS,
) -> SectionWork:
    """Batches of items with options; arguments and errors as for `score_options`."""
    _check(config, items, batch_tokens)
    prefix = _common_prefix(items)
    works = [_work(index, item, len(prefix), bool(stop_ids)) for index, item in enumerate(items)]
    batches = [
        _OptionBatch(rows, tuple(items[work.index] for row in rows for work in row))
        for rows in pack(works, batch_tokens=batch_tokens, max_slots=max_logit_rows(config))
    ]

    def collect(found: Sequence[list[ScoreRow]]) -> tuple[ScoreRow, ...]:
        by_index = {
            work.index: row
            for batch, rows in zip(batches, found, strict=True)
            for work, row in zip(batch.packed, rows, strict=True)
        }
        return tuple(by_index[index] for index in range(len(items)))

    sizes = [len(batch.items) for batch in batches]
    return SectionWork(section, batches, sizes, _OptionScorer(prefix, frozenset(stop_ids)), collect)


def score_options(
    model: PreTrainedModel,
    items: Sequence[OptionItem],
    *,
    stop_ids: Collection[int] = (),
    batch_tokens: int = BATCH_TOKENS,
    on_progress: OnProgress = silent,
) -> list[ItemScore]:
    """Score every option of every item, in the order of ``items``.

    Args:
        model: a causal language model of transformers whose attention takes a 4-D mask (eager, sdpa); in evaluation
            mode during the call.
        items: items to score; ids must be unique.
        stop_ids: end tokens. When given, `ItemScore.stop` says whether one of them is the most likely token after gold.
        batch_tokens: upper bound on rows × columns of one forward pass; a single item may exceed it. Logits have a
            separate bound (256 MiB).
        on_progress: called with the items done and the total.

    Raises:
        EvaluationError: no items, a duplicate id, an item longer than the model's context, or non-finite scores.
    """
    work = option_work("items", items, model.config, stop_ids=stop_ids, batch_tokens=batch_tokens)
    return list(score_section(work, in_this_process(model), on_progress=on_progress))


def max_logit_rows(config: PreTrainedConfig) -> int:
    """Maximum number of positions whose logits one forward pass may hold."""
    return max(1, _MAX_LOGITS // int(config.vocab_size))


def _check(config: PreTrainedConfig, items: Sequence[OptionItem], batch_tokens: int) -> None:
    if not items:
        raise EvaluationError("the evaluation set is empty; at least one item is needed: check data.evaluation_rows")
    if batch_tokens < 1:
        raise EvaluationError(f"batch_tokens is {batch_tokens}; expected a positive number of tokens")
    check_unique([item.item_id for item in items])
    bound = max_positions(config)
    for item in items:
        if item.num_longest > bound:
            raise EvaluationError(
                f"item {item.item_id} has {item.num_longest} tokens with its longest option, the model takes {bound}; "
                "shorten the prompt or drop the row"
            )


def _common_prefix(items: Sequence[OptionItem]) -> Tokens:
    """The longest common prefix of all prompts that leaves each at least one token."""
    prompts = [item.prompt_ids for item in items]
    # A prefix that the first and last prompt in sorted order share is shared by all.
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(min(prompts), max(prompts), strict=False))
    return tuple(token for token, _ in shared)[: min(map(len, prompts)) - 1]


def _work(index: int, item: OptionItem, prefix_length: int, with_stop: bool) -> PackedItem:
    gold = item.option_ids[item.gold]
    written = gold[:-1] if item.ended else gold
    tree = build_tree(item.option_ids, stop_after=written if with_stop else None)
    return PackedItem(index, item.prompt_ids[prefix_length:], tree)


def _prefix_cache(model: PreTrainedModel, prefix: Tokens) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values (1, heads, P, head size) of the prefix for each layer; empty without a prefix."""
    if not prefix:
        return []
    out = model(input_ids=torch.tensor([prefix], device=model.device), use_cache=True, logits_to_keep=1)
    return [(keys, values) for keys, values, _ in out.past_key_values]


def _forward(
    model: PreTrainedModel, rows: Rows, cache: list[tuple[torch.Tensor, torch.Tensor]], prefix_length: int
) -> torch.Tensor:
    """Logits (N, V) in fp32 of the batch's slots."""
    inputs = collate(rows, prefix_length=prefix_length)
    allowed = inputs.allowed.to(model.device)
    mask = torch.zeros(allowed.shape, dtype=model.dtype, device=model.device)
    mask.masked_fill_(~allowed, torch.finfo(model.dtype).min)
    past = [(keys.expand(len(rows), -1, -1, -1), values.expand(len(rows), -1, -1, -1)) for keys, values in cache]
    with _only_slots(model, inputs):
        out = model(
            input_ids=inputs.input_ids.to(model.device),
            attention_mask=mask,
            position_ids=inputs.position_ids.to(model.device),
            past_key_values=DynamicCache(past) if past else None,
            use_cache=bool(past),
        )
    logits: torch.Tensor = out.logits[0].float()
    return logits


@contextlib.contextmanager
def _only_slots(model: PreTrainedModel, inputs: PackedBatch) -> Iterator[None]:
    """Run the output head only on the slots, as (1, N, H); the model's later processing of logits still applies."""

    def gather(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden_BTH, *rest = args
        return (hidden_BTH[inputs.slot_rows, inputs.slot_columns][None], *rest)

    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Module):
        raise EvaluationError(f"{type(model).__name__} has no output layer; a causal language model is expected")
    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


def _score(item: OptionItem, tree: OptionTree, logits_KV: torch.Tensor, stop_ids: Collection[int]) -> ItemScore:
    slots = torch.tensor([slot for path in tree.paths for slot in path], device=logits_KV.device)
    tokens = torch.tensor([token for option in item.option_ids for token in option], device=logits_KV.device)
    log_norms_K = torch.logsumexp(logits_KV, dim=-1)
    per_token = (logits_KV[slots, tokens] - log_norms_K[slots]).double().cpu()
    totals = [part.sum().item() for part in per_token.split([len(option) for option in item.option_ids])]
    require_finite(totals, f"item {item.item_id}")
    chosen = max(range(len(totals)), key=totals.__getitem__)
    return ItemScore(
        item_id=item.item_id,
        log_likelihoods=tuple(totals),
        chosen=chosen,
        gold=item.gold,
        correct=chosen == item.gold,
        nll=-totals[item.gold],
        num_tokens=len(item.option_ids[item.gold]),
        stop=None if tree.stop_slot is None else int(logits_KV[tree.stop_slot].argmax()) in stop_ids,
    )


# NLL of frozen general text by document: has the candidate forgotten what the base knew?
#
# A document is split into windows of at most ``window`` predicted tokens. A window's only context is the token before
# its first predicted one. Every token but a document's first is thus predicted exactly once (the first too if the
# tokenizer puts a token before it), and a document's NLL is the sum over its windows. The window size is part of the
# document's id: NLLs of different window sizes are not comparable.
#
# Tensor names: B windows of a batch, T columns, V vocabulary.


@dataclass(frozen=True)
class _Window:
    """Tokens of one window: all but the first are predicted."""

    document: str
    ids: tuple[int, ...]


def score_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    window: int = 512,
    batch_tokens: int = BATCH_TOKENS,
    on_progress: OnProgress = silent,
) -> list[DocumentScore]:
    """NLL of each text, in the order of ``texts``; duplicate texts are scored once.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer; special tokens that it adds before a text are context, those after it are dropped.
        texts: one document each.
        window: maximum predicted tokens per window; capped at the model's context.
        batch_tokens: upper bound on rows × columns of one forward pass, lowered if logits would exceed 256 MiB; a
            single window may exceed it.
        on_progress: called with the windows done and the total.

    Raises:
        EvaluationError: no texts, a text without a token to predict, or a non-finite NLL.
    """
    work = document_work(texts, tokenizer, model.config, window=window, batch_tokens=batch_tokens)
    return list(score_section(work, in_this_process(model), on_progress=on_progress))


class _DocumentScorer:
    """Scores windows of documents."""

    def on(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> ScoreBatch:
        def score(batch: list[_Window]) -> list[ScoreRow]:
            values = _batch_nll(model, batch)
            for part, value in zip(batch, values, strict=True):
                require_finite([value], f"document {part.document}")
            pairs = zip(batch, values, strict=True)
            return [DocumentScore(part.document, value, len(part.ids) - 1) for part, value in pairs]

        return score


def document_work(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    *,
    window: int = 512,
    batch_tokens: int = BATCH_TOKENS,
) -> SectionWork:
    """Batches of document windows; arguments and errors as for `score_documents`."""
    if not texts:
        raise EvaluationError("the general text is empty; at least one document is needed: check evaluate.forgetting")
    window = min(window, max_positions(config) - 1)
    documents = {_document_id(text, window): text for text in texts}
    windows = [part for name, text in documents.items() for part in _windows(name, text, tokenizer, window)]
    bound = min(batch_tokens, max_logit_rows(config))
    batches = list(batches_by_length(windows, lambda part: len(part.ids), batch_tokens=bound))

    def collect(found: Sequence[list[Any]]) -> tuple[DocumentScore, ...]:
        nll: dict[str, float] = defaultdict(float)
        num_tokens: dict[str, int] = defaultdict(int)
        # In batch order, because floating-point sums depend on the order.
        for part in (part for rows in found for part in rows):
            nll[part.item_id] += part.nll
            num_tokens[part.item_id] += part.num_tokens
        return tuple(DocumentScore(name, nll[name], num_tokens[name]) for name in documents)

    return SectionWork("documents", batches, [len(batch) for batch in batches], _DocumentScorer(), collect)


def _document_id(text: str, window: int) -> str:
    return of_json({"text": text, "window": window}).hex[:ID_DIGITS]


def _windows(name: str, text: str, tokenizer: PreTrainedTokenizerBase, window: int) -> Iterator[_Window]:
    ids = tuple(encode_text(text, tokenizer))
    if len(ids) < 2:
        raise EvaluationError(
            f"the document {text[:40]!r} has {len(ids)} tokens, so none can be predicted; "
            "remove it from the general text"
        )
    for start in range(0, len(ids) - 1, window):
        yield _Window(name, ids[start : start + window + 1])


def _batch_nll(model: PreTrainedModel, batch: Sequence[_Window]) -> list[float]:
    """Sum of NLL over each window's predicted tokens, in nats."""
    width = len(batch[0].ids)
    input_ids_BT = torch.zeros(len(batch), width, dtype=torch.long)
    attention_mask_BT = torch.zeros(len(batch), width, dtype=torch.long)
    for row, part in enumerate(batch):
        input_ids_BT[row, : len(part.ids)] = torch.tensor(part.ids)
        attention_mask_BT[row, : len(part.ids)] = 1
    input_ids_BT, attention_mask_BT = input_ids_BT.to(model.device), attention_mask_BT.to(model.device)
    logits_BTV = model(input_ids=input_ids_BT, attention_mask=attention_mask_BT, use_cache=False).logits
    return [
        # Row by row, so that the fp32 copy and its log-softmax cover one window, not the whole batch.
        float(cross_entropy(logits_BTV[row, :length].float(), input_ids_BT[row, 1 : length + 1], reduction="sum"))
        for row, length in enumerate(len(part.ids) - 1 for part in batch)
    ]
