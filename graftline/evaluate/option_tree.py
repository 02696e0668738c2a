"""An item's options as a token tree, and several items packed into one row without attending to each other."""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile

import torch

from graftline.errors import EvaluationError

# The options of one item as a token tree.
#
# Options with a common prefix share its tokens. A node is a token fed to the model because a later token is predicted
# from it. An option's last token is only predicted, never fed, unless the stop token after the gold option is scored.
# Items with single-token options thus cost no more than their prompt.

Tokens = tuple[int, ...]
PROMPT_END = 0
"""Slot of the last prompt token; node j of the tree has slot j + 1."""


@dataclass(frozen=True)
class OptionItem:
    """A prompt, its options and the index of the correct one; ``ended``: each option includes its end token.

    Raises:
        EvaluationError: an empty prompt, no options, an empty or duplicate option, or a gold index out of range.
    """

    item_id: str
    prompt_ids: Tokens
    option_ids: tuple[Tokens, ...]
    gold: int
    ended: bool = False

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise EvaluationError(
                f"item {self.item_id} has an empty prompt; at least one token must precede the options"
            )
        if not self.option_ids or not all(self.option_ids):
            raise EvaluationError(f"item {self.item_id} has no option, or an empty one; every option needs a token")
        if len(set(self.option_ids)) < len(self.option_ids):
            raise EvaluationError(
                f"item {self.item_id} has two options with the same tokens; they cannot be told apart: rename a label"
            )
        if not 0 <= self.gold < len(self.option_ids):
            raise EvaluationError(f"item {self.item_id} has gold index {self.gold} of {len(self.option_ids)} options")

    @property
    def num_longest(self) -> int:
        """Number of tokens of the prompt with its longest option."""
        return len(self.prompt_ids) + max(map(len, self.option_ids))


@dataclass(frozen=True)
class OptionTree:
    """Nodes ordered so that parents come first.

    ``tokens[j]``, ``parents[j]`` (a slot) and ``depths[j]`` (0 below the prompt) describe node j; ``paths[i]`` lists,
    for each token of option i, the slot whose logits predict it; ``stop_slot`` is the slot after the gold option's
    text, if requested.
    """

    tokens: Tokens
    parents: Tokens
    depths: Tokens
    paths: tuple[Tokens, ...]
    stop_slot: int | None


def build_tree(options: Sequence[Tokens], *, stop_after: Tokens | None) -> OptionTree:
    """Merge options into a tree; ``stop_after`` is fed in full, so that the token after it is predicted too."""
    slots: dict[Tokens, int] = {(): PROMPT_END}
    tokens: list[int] = []
    parents: list[int] = []
    depths: list[int] = []

    def slot_of(prefix: Tokens) -> int:
        if prefix not in slots:
            parent = slot_of(prefix[:-1])
            tokens.append(prefix[-1])
            parents.append(parent)
            depths.append(len(prefix) - 1)
            slots[prefix] = len(tokens)
        return slots[prefix]

    paths = tuple(tuple(slot_of(option[:i]) for i in range(len(option))) for option in options)
    stop_slot = None if stop_after is None else slot_of(stop_after)
    return OptionTree(tuple(tokens), tuple(parents), tuple(depths), paths, stop_slot)


# Several items packed into one row of a batch, isolated by the attention mask: hardly any column is padding.
#
# Items differ in length: one item per row leaves a third of a batch empty (the demo's items), packing a few per cent.
# An item takes the columns of its prompt without the common prefix, then those of its tree's nodes.
#
# Tensor names: B rows of a batch, T columns, P tokens of the cached prefix, N slots (positions whose logits count).

ROW_TOKENS = 256
"""Target columns of a row without longer items: more waste attention on other items' keys, fewer leave gaps."""


@dataclass(frozen=True)
class PackedItem:
    """One item without the common prefix; ``index`` is its position in the caller's list."""

    index: int
    prompt: Tokens
    tree: OptionTree

    @property
    def num_tokens(self) -> int:
        """Columns that the item takes."""
        return len(self.prompt) + len(self.tree.tokens)

    @property
    def num_slots(self) -> int:
        """Positions whose logits count: the prompt's last token and every node."""
        return 1 + len(self.tree.tokens)


Rows = list[list[PackedItem]]


def pack(works: Sequence[PackedItem], *, batch_tokens: int, max_slots: int) -> Iterator[Rows]:
    """Batches of rows, longest items first, so that memory peaks in the first batch.

    Args:
        works: the items to pack.
        batch_tokens: upper bound on rows × columns; a single item may exceed it.
        max_slots: upper bound on a batch's slots; a single item may exceed it.
    """
    waiting = sorted(works, key=lambda work: (-work.num_tokens, work.index))
    while waiting:
        size = _num_fitting(waiting, batch_tokens, max_slots)
        rows = _balance(waiting[:size])
        while size > 1 and len(rows) * max(map(_length, rows)) > batch_tokens:
            size -= 1
            rows = _balance(waiting[:size])
        yield rows
        waiting = waiting[size:]


def _num_fitting(works: Sequence[PackedItem], batch_tokens: int, max_slots: int) -> int:
    """How many of the first items fit the bounds, ignoring padding; at least one."""
    tokens = accumulate(work.num_tokens for work in works)
    slots = accumulate(work.num_slots for work in works)
    fitting = takewhile(lambda sums: sums[0] <= batch_tokens and sums[1] <= max_slots, zip(tokens, slots, strict=True))
    return max(1, sum(1 for _ in fitting))


def _balance(works: Sequence[PackedItem]) -> Rows:
    """Rows of similar length: each item, longest first, goes to the shortest row so far (Graham 1969)."""
    num_rows = max(1, round(_length(works) / max(works[0].num_tokens, ROW_TOKENS)))
    rows: Rows = [[] for _ in range(num_rows)]
    shortest = [(0, number) for number in range(num_rows)]
    for work in works:
        length, number = heapq.heappop(shortest)
        rows[number].append(work)
        heapq.heappush(shortest, (length + work.num_tokens, number))
    return rows


def _length(row: Sequence[PackedItem]) -> int:
    return sum(work.num_tokens for work in row)


@dataclass(frozen=True)
class PackedBatch:
    """Model inputs and slot positions.

    ``input_ids`` and ``position_ids`` (B, T); ``allowed`` (B, 1, T, P + T): where attention is allowed; ``slot_rows``
    and ``slot_columns`` (N): the slots of all items in their order, each item's in tree order.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    allowed: torch.Tensor
    slot_rows: torch.Tensor
    slot_columns: torch.Tensor


def collate(rows: Rows, *, prefix_length: int) -> PackedBatch:
    """Lay out items side by side in rows. Padding attends only to itself: a mask row without keys would give NaN."""
    length = max(map(_length, rows))
    input_ids_BT = torch.zeros(len(rows), length, dtype=torch.long)
    position_ids_BT = torch.zeros(len(rows), length, dtype=torch.long)
    allowed_BTS = torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1)
    slots: list[tuple[int, int]] = []
    for number, row in enumerate(rows):
        start = 0
        for work in row:
            end = start + work.num_tokens
            input_ids_BT[number, start:end] = torch.tensor(work.prompt + work.tree.tokens)
            positions = [*range(len(work.prompt)), *(len(work.prompt) + depth for depth in work.tree.depths)]
            position_ids_BT[number, start:end] = torch.tensor(positions) + prefix_length
            allowed_BTS[number, start:end, start:end] = _visible(work)
            slots += [(number, column) for column in range(end - work.num_slots, end)]
            start = end
    seen_prefix_BTP = torch.ones(len(rows), length, prefix_length, dtype=torch.bool)
    slots_N2 = torch.tensor(slots)
    return PackedBatch(
        input_ids_BT,
        position_ids_BT,
        torch.cat([seen_prefix_BTP, allowed_BTS], dim=-1)[:, None],
        slots_N2[:, 0],
        slots_N2[:, 1],
    )


def _visible(work: PackedItem) -> torch.Tensor:
    """Attention mask within one item (T', T'): the prompt is causal, a node attends to its ancestors."""
    num_prompt, length = len(work.prompt), work.num_tokens
    visible_TT = torch.eye(length, dtype=torch.bool)
    visible_TT[:num_prompt, :num_prompt] = torch.ones(num_prompt, num_prompt, dtype=torch.bool).tril()
    for node, parent in enumerate(work.tree.parents):
        visible_TT[num_prompt + node] |= visible_TT[num_prompt - 1 + parent]
    return visible_TT
