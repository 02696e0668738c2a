"""Sequences of one model that decode together, and the memory of their keys and values.

Rows 0 … n − 1 of the cache decode; row n may hold one long prompt that is being read in pieces. When a row ends, the
last one moves into its place, so the rows in use are always the first ones.
"""

import logging
from collections.abc import Sequence

import torch

from graftline.export.onnx_session import KvCache, Step
from graftline.serve.generation import Delta, Generation, LoadedModel, SampledToken, choose_tokens
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
        for row in reversed(self._next_tokens(new, self._rows(start, start + len(new)), step)):
            self._remove(start + row)

    def read_piece(self, num_tokens: int) -> None:
        """Read the next tokens of the long prompt; after its last it joins the decoding rows."""
        generation, row = self.reading, len(self.decoding)
        assert generation is not None
        stop = min(generation.num_prefilled + num_tokens, len(generation.prompt))
        piece = generation.prompt[generation.num_prefilled : stop]
        view, step = self._rows(row, row + 1), Step([piece], [stop])
        if stop < len(generation.prompt):
            self.model.runner.step_on_device(view, step)
            generation.num_prefilled = stop
            return
        ended = self._next_tokens([generation], view, step)
        generation.num_prefilled = stop
        self.reading = None
        self.decoding.append(generation)
        if ended:
            self._remove(row)

    def decode(self) -> int:
        """Generate one token for each decoding row; returns how many."""
        count = len(self.decoding)
        if not count:
            return 0
        step = Step([generation.tokens[-1:] for generation in self.decoding], [g.length for g in self.decoding])
        for row in reversed(self._next_tokens(self.decoding, self._rows(0, count), step)):
            self._remove(row)
        return count

    def _next_tokens(self, generations: Sequence[Generation], cache: KvCache, step: Step) -> list[int]:
        """Run a step and give each sequence its next token; returns the rows whose answers are complete."""
        with torch.cuda.stream(cache.stream):
            logits_BV = self.model.runner.step_on_device(cache, step)
            chosen = choose_tokens([generation.sampler for generation in generations], logits_BV)
        pairs = enumerate(zip(generations, chosen, strict=True))
        return [row for row, (generation, choice) in pairs if _accept(generation, choice)]

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


def _accept(generation: Generation, choice: SampledToken | GrammarError) -> bool:
    """Give a sequence its next token; returns whether its answer is complete."""
    if isinstance(choice, GrammarError):
        # This ends one answer only; the other sequences of the step go on.
        _LOG.error("an answer could not be kept to its grammar", exc_info=choice)
        generation.emit(Delta(finish_reason="error"))
        return True
    return generation.accept(choice)
