"""The options of one item as a token tree, and a batch of such items as tensors.

Options that start with the same tokens share them. A node is a token that must be fed to the model because something
after it is predicted; an option's last token is only predicted, never fed, unless the stop token after the gold option
is asked for. Items whose options are single tokens thus cost their prompt alone.

Tensor names: B rows of a batch, W prompt columns, K tree columns, T = W + K, P tokens of the cached common prefix.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from graftline.errors import EvaluationError

Tokens = tuple[int, ...]
PROMPT_END = 0
"""Slot of the last prompt token; node j of the tree has slot j + 1."""


@dataclass(frozen=True)
class OptionItem:
    """A prompt, its options and the index of the right one.

    Raises:
        EvaluationError: an empty prompt, no or empty or equal options, or a gold index outside of them.
    """

    item_id: str
    prompt_ids: Tokens
    option_ids: tuple[Tokens, ...]
    gold: int

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
        """Tokens of the prompt with its longest option."""
        return len(self.prompt_ids) + max(map(len, self.option_ids))


@dataclass(frozen=True)
class OptionTree:
    """Nodes in an order where parents come first.

    ``tokens[j]``, ``parents[j]`` (a slot) and ``depths[j]`` (0 below the prompt) describe node j; ``paths[i]`` lists
    for each token of option i the slot whose logits predict it; ``stop_slot`` is the slot after the gold option, if
    asked for.
    """

    tokens: Tokens
    parents: Tokens
    depths: Tokens
    paths: tuple[Tokens, ...]
    stop_slot: int | None


def build_tree(options: Sequence[Tokens], *, stop_after: int | None) -> OptionTree:
    """Merge options into a tree; ``stop_after`` is the index of the option whose last token is fed too."""
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
    stop_slot = None if stop_after is None else slot_of(options[stop_after])
    return OptionTree(tuple(tokens), tuple(parents), tuple(depths), paths, stop_slot)


@dataclass(frozen=True)
class TreeBatch:
    """Model inputs: ``input_ids`` and ``position_ids`` (B, T); ``allowed`` (B, 1, T, P + T) where attention looks."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    allowed: torch.Tensor
    num_slots: int


def collate(prompts: Sequence[Tokens], trees: Sequence[OptionTree], *, prefix_length: int) -> TreeBatch:
    """Lay items out with prompts aligned at their end, so that slot k is the same column in every row.

    ``prompts`` are without the common prefix and not empty. Padding sees itself only: a row of the mask without any key
    would give NaN.
    """
    width, num_nodes = max(map(len, prompts)), max(len(tree.tokens) for tree in trees)
    length = width + num_nodes
    input_ids_BT = torch.zeros(len(prompts), length, dtype=torch.long)
    position_ids_BT = torch.zeros(len(prompts), length, dtype=torch.long)
    allowed_BTS = torch.eye(length, dtype=torch.bool).repeat(len(prompts), 1, 1)
    for row, (prompt, tree) in enumerate(zip(prompts, trees, strict=True)):
        start, end = width - len(prompt), width + len(tree.tokens)
        input_ids_BT[row, start:end] = torch.tensor(prompt + tree.tokens)
        positions = [*range(len(prompt)), *(len(prompt) + depth for depth in tree.depths)]
        position_ids_BT[row, start:end] = torch.tensor(positions) + prefix_length
        allowed_BTS[row, start:width, start:width] = torch.ones(len(prompt), len(prompt), dtype=torch.bool).tril()
        for node, parent in enumerate(tree.parents):
            # A node sees what its parent sees, and itself.
            allowed_BTS[row, width + node] |= allowed_BTS[row, width - 1 + parent]
    seen_prefix_BTP = torch.ones(len(prompts), length, prefix_length, dtype=torch.bool)
    allowed_BTS = torch.cat([seen_prefix_BTP, allowed_BTS], dim=-1)
    return TreeBatch(input_ids_BT, position_ids_BT, allowed_BTS[:, None], num_nodes + 1)
