"""The options of one item as a token tree.

Options that start with the same tokens share them. A node is a token that must be fed to the model because something
after it is predicted; an option's last token is only predicted, never fed, unless the stop token after the gold option
is asked for. Items whose options are single tokens thus cost their prompt alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from graftline.errors import EvaluationError

Tokens = tuple[int, ...]
PROMPT_END = 0
"""Slot of the last prompt token; node j of the tree has slot j + 1."""


@dataclass(frozen=True)
class OptionItem:
    """A prompt, its options and the index of the right one; ``ended``: each option has the token that ends it.

    Raises:
        EvaluationError: an empty prompt, no or empty or equal options, or a gold index outside of them.
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
        """Tokens of the prompt with its longest option."""
        return len(self.prompt_ids) + max(map(len, self.option_ids))


@dataclass(frozen=True)
class OptionTree:
    """Nodes in an order where parents come first.

    ``tokens[j]``, ``parents[j]`` (a slot) and ``depths[j]`` (0 below the prompt) describe node j; ``paths[i]`` lists
    for each token of option i the slot whose logits predict it; ``stop_slot`` is the slot after the gold option's text,
    if asked for.
    """

    tokens: Tokens
    parents: Tokens
    depths: Tokens
    paths: tuple[Tokens, ...]
    stop_slot: int | None


def build_tree(options: Sequence[Tokens], *, stop_after: Tokens | None) -> OptionTree:
    """Merge options into a tree; ``stop_after`` is fed whole, so that what follows it is predicted too."""
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
