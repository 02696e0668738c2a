"""Log-likelihood of each option of each item, as exact as one by one and several times as fast.

Three things are computed once: the prefix that all prompts share (a cached forward, expanded over the batch), the
prompt of an item (its options hang behind it as a tree, seen through a tree mask) and the tokens that options share.
The output head runs on the last prompt position and the tree only. Rows hold several items, longest first (`packing`).

Tensor names: B rows, T columns, P cached prefix, S = P + T, N slots of a batch, K slots of an item, V vocabulary.
"""

import contextlib
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import takewhile

import torch
from transformers import DynamicCache, PreTrainedModel

from graftline.errors import EvaluationError
from graftline.evaluate.option_tree import OptionItem, OptionTree, Tokens, build_tree
from graftline.evaluate.packing import PackedBatch, Rows, Work, collate, pack
from graftline.evaluate.scores import ItemScore, check_unique
from graftline.progress import OnProgress, silent
from graftline.settings.model import BATCH_TOKENS
from graftline.weights.config import max_positions

_MAX_LOGITS = 1 << 26
"""Logits of one forward, 256 MiB in fp32, whatever the vocabulary."""


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
        model: a causal language model of transformers whose attention takes a 4-D mask (eager, sdpa); it is put into
            evaluation mode while it is used.
        items: what to score; ids must be unique.
        stop_ids: end tokens. When given, `ItemScore.stop` says whether one of them is the most likely token after gold.
        batch_tokens: upper bound on rows × columns of one forward; one item alone may exceed it. Logits have a bound of
            their own (256 MiB).
        on_progress: called with items done and in all.

    Raises:
        EvaluationError: no item, an id twice, an item longer than the model's positions, or scores that are not finite.
    """
    _check(model, items, batch_tokens)
    prefix = _common_prefix(items)
    works = [_work(index, item, len(prefix), bool(stop_ids)) for index, item in enumerate(items)]
    scores: list[ItemScore | None] = [None] * len(items)
    done = 0
    with evaluating(model):
        cache = _prefix_cache(model, prefix)
        on_progress(0, len(items))
        for rows in pack(works, batch_tokens=batch_tokens, max_slots=max_logit_rows(model)):
            packed = [work for row in rows for work in row]
            logits_NV = _forward(model, rows, cache, len(prefix))
            for work, logits_KV in zip(packed, logits_NV.split([work.num_slots for work in packed]), strict=True):
                scores[work.index] = _score(items[work.index], work.tree, logits_KV, stop_ids)
            done += len(packed)
            on_progress(done, len(items))
    return [score for score in scores if score is not None]


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the former mode comes back at the end."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def require_finite(values: Iterable[float], name: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        EvaluationError: naming ``name``.
    """
    if not all(map(math.isfinite, values)):
        raise EvaluationError(
            f"{name} has a log-likelihood that is not finite; the model gives NaN or infinity: check its weights"
        )


def max_logit_rows(model: PreTrainedModel) -> int:
    """How many positions' logits one forward may keep."""
    return max(1, _MAX_LOGITS // int(model.config.vocab_size))


def _check(model: PreTrainedModel, items: Sequence[OptionItem], batch_tokens: int) -> None:
    if not items:
        raise EvaluationError("the evaluation set is empty; at least one item is needed: check data.evaluation_rows")
    if batch_tokens < 1:
        raise EvaluationError(f"batch_tokens is {batch_tokens}; expected a positive number of tokens")
    check_unique([item.item_id for item in items])
    bound = max_positions(model.config)
    for item in items:
        if item.num_longest > bound:
            raise EvaluationError(
                f"item {item.item_id} has {item.num_longest} tokens with its longest option, the model takes {bound}; "
                "shorten the prompt or drop the row"
            )


def _common_prefix(items: Sequence[OptionItem]) -> Tokens:
    """The longest prefix of all prompts that leaves each at least one token."""
    prompts = [item.prompt_ids for item in items]
    # What the first and the last prompt in sorted order share, all between them share.
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(min(prompts), max(prompts), strict=False))
    return tuple(token for token, _ in shared)[: min(map(len, prompts)) - 1]


def _work(index: int, item: OptionItem, prefix_length: int, with_stop: bool) -> Work:
    gold = item.option_ids[item.gold]
    written = gold[:-1] if item.ended else gold
    tree = build_tree(item.option_ids, stop_after=written if with_stop else None)
    return Work(index, item.prompt_ids[prefix_length:], tree)


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
    """The head is given the slots alone, as (1, N, H). What a model does to its logits behind it stays the model's."""

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
