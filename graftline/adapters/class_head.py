"""A classification head: a linear layer that scores classes from the last hidden state of a prompt's last token.

It is what transformers' ``...ForSequenceClassification`` of a decoder has beside its body (a layer ``score`` without
bias) and what PEFT stores with an adapter of task type ``SEQ_CLS``. Here it stands beside the language model's own
head, so that the same base, quantized or not, carries either.

Shapes: N prompts, H hidden size, L classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftline.errors import AdapterError

HEAD = "score"
"""Path of the head in a model, and its name in PEFT's files."""
HEAD_WEIGHT = f"{HEAD}.weight"
_DEVIATION = 0.02
"""Of the first values, where the model's configuration names none."""


class ClassHead(nn.Module):
    """``logits = hidden Wᵀ`` in fp32, whatever the model's arithmetic: W (L, H) is small, and trained."""

    def __init__(self, weight_LH: Tensor, labels: Sequence[str]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_LH.float())
        self.labels = tuple(labels)
        """The classes, in the order of the logits."""

    @property
    def in_features(self) -> int:
        """H."""
        return int(self.weight.shape[1])

    @property
    def out_features(self) -> int:
        """L."""
        return int(self.weight.shape[0])

    def forward(self, hidden_NH: Tensor) -> Tensor:
        """Logits (N, L)."""
        with torch.autocast(hidden_NH.device.type, enabled=False):
            return F.linear(hidden_NH.float(), self.weight)


def add_class_head(
    model: nn.Module, labels: Sequence[str], *, seed: int = 0, weight_LH: Tensor | None = None
) -> ClassHead:
    """Put a head on a model; it is trained once an adapter is attached, and stored with it.

    Args:
        model: a causal language model without a head for classes. Changed in place.
        labels: the classes.
        seed: of the first values, drawn as transformers does: normal with the configuration's ``initializer_range``.
        weight_LH: a trained head's values instead.

    Raises:
        AdapterError: fewer than two classes, one twice, or a weight of another shape.
    """
    if len(set(labels)) < max(2, len(labels)):
        raise AdapterError(f"the classes are {list(labels)}; expected at least two, each once")
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    shape = (len(labels), int(config.hidden_size))
    if weight_LH is None:
        deviation = float(getattr(config, "initializer_range", None) or _DEVIATION)
        weight_LH = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * deviation
    if tuple(weight_LH.shape) != shape:
        raise AdapterError(
            f"{HEAD_WEIGHT} has shape {tuple(weight_LH.shape)}, expected {shape}: {len(labels)} classes over this "
            "base's hidden states; the adapter is for another base, or its labels are not its own"
        )
    place = next(model.parameters()).device
    head = ClassHead(weight_LH.to(place), labels)
    setattr(model, HEAD, head)
    return head


def class_head_of(model: nn.Module) -> ClassHead | None:
    """The head of a model that answers with classes; None for one that writes text."""
    head = getattr(model, HEAD, None)
    return head if isinstance(head, ClassHead) else None
