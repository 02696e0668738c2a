"""Log-likelihood of each option of each item: as exact as scoring one at a time, and several times faster.

Three things are computed only once: the prefix common to all prompts (a cached forward pass, expanded over the batch),
each item's prompt (its options follow as a tree, under a tree mask) and the tokens that options share. The output head
runs only on the last prompt position and the tree, on as many positions at a time as fit a bound in bytes
(`graftline.weights.head`). Rows hold several items, longest first (`option_tree`).

Tensor names: B rows, T columns, P cached prefix, S = P + T, N slots of a batch, C slots of a chunk, H hidden size,
V vocabulary.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from graftline.adapters.class_head import ClassHead, class_head_of
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
from graftline.weights.head import hidden_states, logits_of, max_positions_at_once
from graftline.weights.model_folder import max_positions
from graftline.weights.stored import arithmetic_of

_ALL_LAYERS_SLIDE = ("mistral", "phi3")
"""Types of models that have a sliding window and no list of layers' types."""


@dataclass(frozen=True)
class OptionBatch:
    """One forward pass: rows of packed items, and those items in the order of their slots."""

    rows: Rows
    items: tuple[OptionItem, ...]

    @property
    def packed(self) -> list[PackedItem]:
        """The items with their slots, row after row."""
        return [work for row in self.rows for work in row]


@dataclass(frozen=True)
class _OptionScorer:
    """Scores options after the common prefix of all prompts."""

    prefix: Tokens
    stop_ids: frozenset[int]
    labels: tuple[str, ...] = ()

    def on(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> ScoreBatch:
        cache = _prefix_cache(model, self.prefix)
        if self.labels and (head := class_head_of(model)):
            _check_classes(head, self.labels)
            return lambda batch: _class_scores(model, head, batch, cache, len(self.prefix))

        def score(batch: OptionBatch) -> list[ScoreRow]:
            hidden_NH = _forward(model, batch.rows, cache, len(self.prefix))
            return _scores(batch, _figures(model, hidden_NH, *_asked(batch)), self.stop_ids)

        return score


def option_work(
    section: Section,
    items: Sequence[OptionItem],
    config: PreTrainedConfig,
    *,
    stop_ids: Collection[int] = (),
    batch_tokens: int = BATCH_TOKENS,
    labels: Sequence[str] = (),
) -> SectionWork:
    """Batches of items with options; arguments and errors as for `score_options`.

    ``labels``: what the options are; a model with a head for them chooses among them by its head.
    """
    _check(config, items, batch_tokens)
    prefix = _common_prefix(items)
    works = [_work(index, item, len(prefix), bool(stop_ids)) for index, item in enumerate(items)]
    batches = [
        OptionBatch(rows, tuple(items[work.index] for row in rows for work in row))
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
    return SectionWork(section, batches, sizes, _OptionScorer(prefix, frozenset(stop_ids), tuple(labels)), collect)


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
            bound of their own (`graftline.weights.head.CHUNK_BYTES`).
        on_progress: called with the items done and the total.

    Raises:
        EvaluationError: no items, a duplicate id, an item longer than the model's context, or non-finite scores.
    """
    work = option_work("items", items, model.config, stop_ids=stop_ids, batch_tokens=batch_tokens)
    return list(score_section(work, in_this_process(model), on_progress=on_progress))


def max_logit_rows(config: PreTrainedConfig) -> int:
    """Maximum number of positions whose logits one forward pass may hold."""
    return max_positions_at_once(int(config.vocab_size))


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
    # A cache made without the configuration: that of a sliding window forgets keys.
    ids, cache = torch.tensor([prefix], device=model.device), DynamicCache()
    out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return [(keys, values) for keys, values, _ in out.past_key_values]


def _forward(model: PreTrainedModel, rows: Rows, cache: list[tuple[Tensor, Tensor]], prefix_length: int) -> Tensor:
    """What the head is given (N, H) at the batch's slots."""
    inputs = collate(rows, prefix_length=prefix_length)
    past = [(keys.expand(len(rows), -1, -1, -1), values.expand(len(rows), -1, -1, -1)) for keys, values in cache]
    hidden_BTH = hidden_states(
        model,
        input_ids=inputs.input_ids.to(model.device),
        attention_mask=_masks(model, inputs, prefix_length),
        position_ids=inputs.position_ids.to(model.device),
        past_key_values=DynamicCache(past) if past else None,
        use_cache=bool(past),
    )
    return hidden_BTH[inputs.slot_rows, inputs.slot_columns]


def _masks(model: PreTrainedModel, inputs: PackedBatch, prefix_length: int) -> Tensor | dict[str, Tensor]:
    """The mask (B, 1, T, P + T), added to attention scores, or one for each kind of layer.

    It replaces the model's own, so it also holds sliding windows. They are counted in positions, so that they are the
    same whether items lie side by side or apart.
    """
    config, allowed = model.config, inputs.allowed
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if window is None or not (kinds or config.model_type in _ALL_LAYERS_SLIDE):
        return _added(allowed, model)
    at_BT = inputs.position_ids
    keys_BS = torch.cat([torch.arange(prefix_length).expand(len(at_BT), -1), at_BT], dim=1)
    near = at_BT[:, None, :, None] - keys_BS[:, None, None, :] < window
    sliding = _added(allowed & near, model)
    return {"full_attention": _added(allowed, model), "sliding_attention": sliding} if kinds else sliding


def _added(allowed: Tensor, model: PreTrainedModel) -> Tensor:
    dtype = arithmetic_of(model)
    mask = torch.zeros(allowed.shape, dtype=dtype, device=model.device)
    return mask.masked_fill_(~allowed.to(model.device), torch.finfo(dtype).min)


@dataclass(frozen=True)
class _Figures:
    """What to read from a batch's logits: a log-probability for each pair, and the likeliest token of some slots."""

    log_probabilities: Tensor
    likeliest: dict[int, int]


def _asked(batch: OptionBatch) -> tuple[Tensor, Tensor, list[int]]:
    """Slot and token of every token of every option, item after item; the slots whose likeliest token is needed."""
    slots, tokens, stops, first = [], [], [], 0
    for item, work in zip(batch.items, batch.packed, strict=True):
        slots += [first + slot for path in work.tree.paths for slot in path]
        tokens += [token for option in item.option_ids for token in option]
        stops += [] if work.tree.stop_slot is None else [first + work.tree.stop_slot]
        first += work.num_slots
    return torch.tensor(slots), torch.tensor(tokens), stops


def _figures(model: PreTrainedModel, hidden_NH: Tensor, slots: Tensor, tokens: Tensor, stops: list[int]) -> _Figures:
    likeliest: dict[int, int] = {}
    found = torch.empty(len(slots), dtype=torch.float64)
    for first, logits_CV in logits_of(model, hidden_NH):
        after = first + len(logits_CV)
        log_norms_C = torch.logsumexp(logits_CV, dim=-1)
        here = torch.nonzero((slots >= first) & (slots < after)).flatten()
        rows, columns = (slots[here] - first).to(logits_CV.device), tokens[here].to(logits_CV.device)
        found[here] = (logits_CV[rows, columns] - log_norms_C[rows]).double().cpu()
        asked = [slot for slot in stops if first <= slot < after]
        likeliest |= {slot: int(logits_CV[slot - first].argmax()) for slot in asked}
    return _Figures(found, likeliest)


def _scores(batch: OptionBatch, figures: _Figures, stop_ids: Collection[int]) -> list[ScoreRow]:
    scores: list[ScoreRow] = []
    first = done = 0
    for item, work in zip(batch.items, batch.packed, strict=True):
        lengths = [len(option) for option in item.option_ids]
        per_token = figures.log_probabilities[done : done + sum(lengths)]
        totals = [part.sum().item() for part in per_token.split(lengths)]
        stop = work.tree.stop_slot
        stops = None if stop is None else figures.likeliest[first + stop] in stop_ids
        scores.append(item_score(item, totals, stops))
        first, done = first + work.num_slots, done + sum(lengths)
    return scores


_NO_OPTIONS = OptionTree((), (), (), (), None)


def _class_scores(
    model: PreTrainedModel, head: ClassHead, batch: OptionBatch, cache: list[tuple[Tensor, Tensor]], prefix_length: int
) -> list[ScoreRow]:
    """Log-probabilities of the classes after each prompt: one "token" whose options are the labels."""
    prompts = [[replace(work, tree=_NO_OPTIONS) for work in row] for row in batch.rows]
    logits_NL = head(_forward(model, prompts, cache, prefix_length)).double()
    totals = logits_NL.log_softmax(-1).tolist()
    return [
        replace(item_score(item, values, None), num_tokens=1) for item, values in zip(batch.items, totals, strict=True)
    ]


def _check_classes(head: ClassHead, labels: tuple[str, ...]) -> None:
    if head.labels != labels:
        raise EvaluationError(
            f"the adapter's head has the classes {', '.join(head.labels)}, the rows have {', '.join(labels)}; expected "
            "the same in the same order: write data.labels so, or train again"
        )


def item_score(item: OptionItem, totals: Sequence[float], stops: bool | None) -> ItemScore:
    """An item's score from the log-likelihood of each option; EvaluationError if one is not finite."""
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
        stop=stops,
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
class Window:
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
        batch_tokens: upper bound on rows × columns of one forward pass; a single window may exceed it.
        on_progress: called with the windows done and the total.

    Raises:
        EvaluationError: no texts, a text without a token to predict, or a non-finite NLL.
    """
    work = document_work(texts, tokenizer, model.config, window=window, batch_tokens=batch_tokens)
    return list(score_section(work, in_this_process(model), on_progress=on_progress))


class _DocumentScorer:
    """Scores windows of documents."""

    def on(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> ScoreBatch:
        def score(batch: list[Window]) -> list[ScoreRow]:
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


def _windows(name: str, text: str, tokenizer: PreTrainedTokenizerBase, window: int) -> Iterator[Window]:
    ids = tuple(encode_text(text, tokenizer))
    if len(ids) < 2:
        raise EvaluationError(
            f"the document {text[:40]!r} has {len(ids)} tokens, so none can be predicted; "
            "remove it from the general text"
        )
    for start in range(0, len(ids) - 1, window):
        yield Window(name, ids[start : start + window + 1])


def _batch_nll(model: PreTrainedModel, batch: Sequence[Window]) -> list[float]:
    """Sum of NLL over each window's predicted tokens, in nats."""
    width = len(batch[0].ids)
    input_ids_BT = torch.zeros(len(batch), width, dtype=torch.long)
    attention_mask_BT = torch.zeros(len(batch), width, dtype=torch.long)
    for row, part in enumerate(batch):
        input_ids_BT[row, : len(part.ids)] = torch.tensor(part.ids)
        attention_mask_BT[row, : len(part.ids)] = 1
    input_ids_BT, attention_mask_BT = input_ids_BT.to(model.device), attention_mask_BT.to(model.device)
    hidden_BTH = hidden_states(model, input_ids=input_ids_BT, attention_mask=attention_mask_BT, use_cache=False)
    predicts_BT = attention_mask_BT[:, 1:].bool()
    hidden_NH, targets_N = hidden_BTH[:, :-1][predicts_BT], input_ids_BT[:, 1:][predicts_BT]
    nll_N = torch.empty(len(targets_N), device=targets_N.device)
    for first, logits_CV in logits_of(model, hidden_NH):
        targets_C = targets_N[first : first + len(logits_CV)]
        nll_N[first : first + len(logits_CV)] = cross_entropy(logits_CV, targets_C, reduction="none")
    return [float(part.sum()) for part in nll_N.split([len(part.ids) - 1 for part in batch])]
