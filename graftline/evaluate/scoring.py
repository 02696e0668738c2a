"""Log-likelihood of each option of each item, as exact as one by one and several times as fast.

Three things are computed once: the prefix that all prompts share (a cached forward, expanded over the batch), the
prompt of an item (its options hang behind it as a tree, seen through a tree mask) and the tokens that options share.
The output head runs on the last prompt position and the tree only. Batches hold items of similar length, longest first.

Tensor names: B rows, T columns, P cached prefix, S = P + T, K tree slots, V vocabulary.
"""

import contextlib
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from graftline.errors import EvaluationError
from graftline.evaluate.option_tree import OptionItem, OptionTree, Tokens, TreeBatch, build_tree, collate
from graftline.evaluate.scores import ItemScore, check_unique
from graftline.progress import OnProgress, silent

_MAX_LOGITS = 1 << 26
"""Logits of one forward, 256 MiB in fp32, whatever the vocabulary."""


@dataclass(frozen=True)
class _Work:
    """One item without the common prefix; ``index`` is its place in the caller's list."""

    index: int
    prompt: Tokens
    tree: OptionTree

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.tree.tokens)


def score_options(
    model: PreTrainedModel,
    items: Sequence[OptionItem],
    *,
    stop_ids: Collection[int] = (),
    batch_tokens: int = 2048,
    on_progress: OnProgress = silent,
) -> list[ItemScore]:
    """Score every option of every item, in the order of ``items``.

    Args:
        model: a causal language model of transformers whose attention takes a 4-D mask (eager, sdpa); it is put into
            evaluation mode while it is used.
        items: what to score; ids must be unique.
        stop_ids: end tokens. When given, `ItemScore.stop` says whether one of them is the most likely token after gold.
        batch_tokens: upper bound on rows × columns of one forward; one item alone may exceed it. Logits are bounded by
            themselves (256 MiB).
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
        for batch in _batches(works, batch_tokens, max_logit_rows(model)):
            logits_BKV = _forward(model, batch, cache, len(prefix))
            for row, work in enumerate(batch):
                scores[work.index] = _score(items[work.index], work.tree, logits_BKV[row], stop_ids)
            done += len(batch)
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


def max_positions(model: PreTrainedModel) -> int:
    """How many tokens the model may see at once: its positions, or its sliding window where that is shorter.

    A 4-D mask replaces the one that a sliding window needs, hence the second bound.
    """
    config: Any = model.config
    bounds = [getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window")]
    return min((bound for bound in bounds if bound), default=2**31)


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
    bound = max_positions(model)
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


def _work(index: int, item: OptionItem, prefix_length: int, with_stop: bool) -> _Work:
    tree = build_tree(item.option_ids, stop_after=item.gold if with_stop else None)
    return _Work(index, item.prompt_ids[prefix_length:], tree)


def _batches(works: Sequence[_Work], batch_tokens: int, max_slots: int) -> Iterator[list[_Work]]:
    """Longest first: memory is at its peak in the first batch, and the time left is never promised too short."""
    batch: list[_Work] = []
    width = num_nodes = 0
    for work in sorted(works, key=lambda work: (-work.num_tokens, work.index)):
        width, num_nodes = max(width, len(work.prompt)), max(num_nodes, len(work.tree.tokens))
        rows = len(batch) + 1
        if batch and (rows * (width + num_nodes) > batch_tokens or rows * (num_nodes + 1) > max_slots):
            yield batch
            batch, width, num_nodes = [], len(work.prompt), len(work.tree.tokens)
        batch.append(work)
    yield batch


def _prefix_cache(model: PreTrainedModel, prefix: Tokens) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values (1, heads, P, head size) of the prefix for each layer; empty without a prefix."""
    if not prefix:
        return []
    out = model(input_ids=torch.tensor([prefix], device=model.device), use_cache=True, logits_to_keep=1)
    return [(keys, values) for keys, values, _ in out.past_key_values]


def _forward(
    model: PreTrainedModel, batch: Sequence[_Work], cache: list[tuple[torch.Tensor, torch.Tensor]], prefix_length: int
) -> torch.Tensor:
    """Logits (B, K, V) in fp32 of the last prompt position and the tree's nodes."""
    inputs: TreeBatch = collate(
        [work.prompt for work in batch], [work.tree for work in batch], prefix_length=prefix_length
    )
    allowed = inputs.allowed.to(model.device)
    mask = torch.zeros(allowed.shape, dtype=model.dtype, device=model.device)
    mask.masked_fill_(~allowed, torch.finfo(model.dtype).min)
    rows = len(batch)
    past = [(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1)) for keys, values in cache]
    out = model(
        input_ids=inputs.input_ids.to(model.device),
        attention_mask=mask,
        position_ids=inputs.position_ids.to(model.device),
        past_key_values=DynamicCache(past) if past else None,
        use_cache=bool(past),
        logits_to_keep=inputs.num_slots,
    )
    logits: torch.Tensor = out.logits.float()
    return logits


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
