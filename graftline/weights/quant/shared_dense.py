"""Dequantized weights that several trainings of one base share, while they are all at the block that has them.

Each training runs in a thread of its own (`graftline.train.together`), and says which block it has come to. What was
dequantized for the block before is freed then, so the dense weights of one block are in memory at a time.
"""

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor

from graftline.weights.quant.blockwise import QuantizedWeight


class SharedDense:
    """The dense weights of one block."""

    def __init__(self) -> None:
        """Start without any."""
        self._block: Hashable = None
        self._weights: dict[tuple[int, torch.dtype], Tensor] = {}

    def come_to(self, block: Hashable) -> None:
        """Free the weights of any other block; to be called by a training that is about to compute ``block``."""
        if block != self._block:
            self._block = block
            self._weights.clear()

    def get(self, weight: QuantizedWeight, dtype: torch.dtype, make: Callable[[], Tensor]) -> Tensor:
        """The dense weight, made at the first call; nobody may change it. Trainings share the codes' memory."""
        key = (weight.packed.data_ptr(), dtype)
        if key not in self._weights:
            self._weights[key] = make()
        return self._weights[key]


_of_thread = threading.local()


@contextlib.contextmanager
def sharing(dense: SharedDense) -> Iterator[None]:
    """Let this thread's quantized layers take their dense weights from ``dense``."""
    _of_thread.dense = dense
    try:
        yield
    finally:
        _of_thread.dense = None


def shared() -> SharedDense | None:
    """What this thread shares; None in a training that runs alone."""
    found: SharedDense | None = getattr(_of_thread, "dense", None)
    return found
