"""Sequences of one model that decode together, and the memory of their keys and values.

Rows 0 … n − 1 of the cache decode; row n may hold one long prompt that is being read in pieces. When a row ends, the
last one moves into its place, so the rows in use are always the first ones.
"""

import logging
from collections.abc import Sequence

import numpy as np

from graftline.export.onnx_session import KvCache, Step
from graftline.serve.generation import Delta, Generation, LoadedModel
from graftline.serve.grammar import GrammarError

SMALLEST_CAPACITY = 64
_LOG = logging.getLogger(__name__)


class KvBudget:
    """A limit on the bytes of all caches together."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0

    def reserve(self, num_bytes: int) -> bool:
        """Take bytes; False if fewer are left."""
        if self.used_bytes + num_bytes > self.max_bytes:
            return False
        self.used_bytes += num_bytes
        return True

    def release(self, num_bytes: int) -> None:
        """Give bytes back."""
        self.used_bytes -= num_bytes


def capacity_class(num_tokens: int, max_positions: int) -> int:
    """Cache positions for a sequence: a power of two, so that batches are of few kinds and at most half is unused."""
    capacity = SMALLEST_CAPACITY
    while capacity < num_tokens:
        capacity *= 2
    return min(capacity, max_positions)


class Batch:
    """Up to ``max_rows`` sequences of one model and one capacity class."""

    def __init__(self, model: LoadedModel, capacity: int, *, max_rows: int, budget: KvBudget) -> None:
        self.model, self.capacity = model, capacity
        self.decoding: list[Generation] = []
        self.reading: Generation | None = None
        self._max_rows, self._budget = max_rows, budget
        self._row_bytes = capacity * model.session.layout.kv_bytes_per_token
        self._cache: KvCache | None = None
        self._views: dict[tuple[int, int], KvCache] = {}

    @property
    def generations(self) -> list[Generation]:
        """All sequences in the batch."""
        return self.decoding + ([self.reading] if self.reading else [])

    @property
    def is_empty(self) -> bool:
        """Whether no sequence is left."""
        return not self.decoding and self.reading is None

    @property
    def is_full(self) -> bool:
        """Whether the batch has its maximum number of sequences."""
        return len(self.generations) >= self._max_rows

    def make_room(self, num_rows: int) -> bool:
        """Grow to ``num_rows`` rows or more; False if the batch is full or the memory used up."""
        have = self._cache.num_rows if self._cache else 0
        if num_rows <= have:
            return True
        if num_rows > self._max_rows:
            return False
        # Doubling copies each row about once. While copying, the old and the new cache both count.
        for wanted in (min(max(2 * have, num_rows), self._max_rows), num_rows):
            if self._budget.reserve(wanted * self._row_bytes):
                released = wanted  # if growing fails
                try:
                    self._grow(wanted)
                    released = have
                finally:
                    self._budget.release(released * self._row_bytes)
                return True
        return False

    def read_prompts(self, new: Sequence[Generation]) -> None:
        """Read whole new prompts in one step and decode their first tokens."""
        start = len(self.decoding)
        step = Step([generation.prompt for generation in new], [len(generation.prompt) for generation in new])
        self.decoding += new  # before the step, so that they are told if it fails
        logits_BV = self.model.runner.step(self._rows(start, start + len(new)), step)
        ended = [row for row, generation in enumerate(new) if _accept(generation, logits_BV[row])]
        for row in reversed(ended):
            self._remove(start + row)

    def read_piece(self, num_tokens: int) -> None:
        """Read the next tokens of the long prompt; after its last it joins the decoding rows."""
        generation, row = self.reading, len(self.decoding)
        assert generation is not None
        stop = min(generation.num_prefilled + num_tokens, len(generation.prompt))
        piece = generation.prompt[generation.num_prefilled : stop]
        logits_BV = self.model.runner.step(self._rows(row, row + 1), Step([piece], [stop]))
        generation.num_prefilled = stop
        if stop == len(generation.prompt):
            self.reading = None
            self.decoding.append(generation)
            if _accept(generation, logits_BV[0]):
                self._remove(row)

    def decode(self) -> int:
        """Generate one token for each decoding row; returns how many."""
        count = len(self.decoding)
        if not count:
            return 0
        step = Step([generation.tokens[-1:] for generation in self.decoding], [g.length for g in self.decoding])
        logits_BV = self.model.runner.step(self._rows(0, count), step)
        ended = [row for row, generation in enumerate(self.decoding) if _accept(generation, logits_BV[row])]
        for row in reversed(ended):
            self._remove(row)
        return count

    def drop_cancelled(self) -> None:
        """Free the rows of clients that have disconnected."""
        for row in reversed(range(len(self.decoding))):
            if self.decoding[row].cancelled:
                self.decoding[row].emit(Delta(finish_reason="cancelled"))
                self._remove(row)
        if self.reading is not None and self.reading.cancelled:
            self.reading.emit(Delta(finish_reason="cancelled"))
            self.reading = None

    def free(self) -> None:
        """Free the memory."""
        if self._cache is not None:
            num_bytes = self._cache.num_rows * self._row_bytes
            self._cache = None
            self._views.clear()
            self._budget.release(num_bytes)

    def _remove(self, row: int) -> None:
        assert self._cache is not None
        last = len(self.decoding) - 1
        if row != last:
            self._cache.copy_row(last, row, self.decoding[last].length)
            self.decoding[row] = self.decoding[last]
        self.decoding.pop()
        if self.reading is not None:
            self._cache.copy_row(last + 1, last, self.reading.num_prefilled)

    def _rows(self, start: int, stop: int) -> KvCache:
        # Reusing the view object lets the runner keep its bindings.
        assert self._cache is not None
        if (start, stop) not in self._views:
            self._views[start, stop] = self._cache.rows(start, stop)
        return self._views[start, stop]

    def _grow(self, num_rows: int) -> None:
        grown = self.model.session.new_cache(num_rows, self.capacity)
        if self._cache is not None:
            for row, generation in enumerate(self.generations):
                length = generation.num_prefilled if generation is self.reading else generation.length
                grown.take_row(row, self._cache, length)
        self._cache = grown
        self._views.clear()


def _accept(generation: Generation, logits_V: np.ndarray) -> bool:
    """Choose the next token of a sequence; returns whether its answer is complete."""
    try:
        choice = generation.sampler.choose(logits_V)
    except GrammarError:
        # This ends one answer only; the other sequences of the step go on.
        _LOG.exception("an answer could not be kept to its grammar")
        generation.emit(Delta(finish_reason="error"))
        return True
    return generation.accept(choice)
