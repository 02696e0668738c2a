"""Continuous batching over many adapters on one thread.

Each model (base × adapter) has a lane. Lanes take turns; a turn reads one piece of waiting prompts, then decodes one
token for every sequence of the lane. So a long prompt delays the others by at most one piece, a lane with many requests
delays a lane with one by at most one step, and requests of one adapter share their steps.

Waiting requests are limited in number and running ones in cache bytes; beyond that `Scheduler.submit` refuses. A lane
with nothing running that finds no cache memory goes next: until it has begun, the other lanes start nothing new, so
that many short requests of one model cannot starve a long one of another.

Threads share one thing, the inbox: `Scheduler.submit` fills it and the scheduler's thread empties it, under one
condition. Lanes and batches belong to the scheduler's thread alone.
"""

import logging
import threading
import time
from collections import OrderedDict, deque
from dataclasses import dataclass

from graftline.errors import ServingError
from graftline.export.onnx_session import GraphLayout
from graftline.serve.batch import Batch, KvBudget, capacity_class
from graftline.serve.generation import BusyError, Delta, Generation, LoadedModel

_LEAST_DEFAULT_TOKENS = 256
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What the scheduler may use."""

    max_kv_bytes: int = 1 << 30
    """Bytes of all key-value caches together."""
    max_batch: int = 16
    """Sequences that share a step."""
    max_waiting: int = 128
    """Requests that wait to be started."""
    piece_tokens: int = 256
    """Prompt tokens read in one turn."""


@dataclass
class Counters:
    """Totals for the metrics."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    steps: int = 0
    refused: int = 0


class Scheduler:
    """Runs generations on its own thread, from `start` to `drain`."""

    def __init__(self, limits: Limits = Limits()) -> None:
        self.limits = limits
        self.counters = Counters()
        self.budget = KvBudget(limits.max_kv_bytes)
        self._lanes: OrderedDict[str, _Lane] = OrderedDict()
        self._starved: str | None = None
        """Key of the lane that gets cache memory next."""
        self._condition = threading.Condition()
        self._inbox: list[Generation] = []
        self._num_in_lanes = self._num_running = 0
        self._seconds_a_request = 1.0
        self._draining = self._giving_up = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, generation: Generation) -> None:
        """Queue a request; its deltas come through ``generation.emit``.

        Raises:
            BusyError: too many requests wait, or the server is shutting down.
            ServingError: the request can never fit.
        """
        self._check_fits(generation)
        with self._condition:
            if self._draining:
                raise BusyError("the server is shutting down; send the request to another one", 5)
            if self.num_waiting >= self.limits.max_waiting:
                self.counters.refused += 1
                seconds = max(1, round(self.num_waiting * self._seconds_a_request / self.limits.max_batch))
                raise BusyError(f"{self.num_waiting} requests wait already; try again later", min(seconds, 60))
            self._inbox.append(generation)
            self._condition.notify()

    def default_tokens(self, layout: GraphLayout, num_prompt: int) -> int:
        """New tokens for a request that names no number: as many as fit behind its prompt.

        What fits is limited by the model's positions and by an even share of the cache among ``max_batch`` requests, so
        that such a request does not displace others; 256 where the prompt leaves less of its share.
        """
        capacities = (capacity_class(1 << power, layout.max_positions) for power in range(32))
        max_tokens = self.limits.max_kv_bytes // layout.kv_bytes_per_token
        most = max((capacity for capacity in capacities if capacity <= max_tokens), default=0)
        share = max(max_tokens // self.limits.max_batch - num_prompt, _LEAST_DEFAULT_TOKENS)
        return max(1, min(most - num_prompt, share))

    def drain(self, timeout_seconds: float = 60.0) -> None:
        """Refuse new requests, finish the others and end the thread; requests still running then are cancelled."""
        with self._condition:
            self._draining = True
            self._condition.notify()
        if not self._thread.is_alive():
            return
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            self._giving_up = True
            self._thread.join(timeout_seconds)

    @property
    def num_waiting(self) -> int:
        """Requests that have not been started."""
        return len(self._inbox) + self._num_in_lanes

    @property
    def num_running(self) -> int:
        """Requests that are being generated."""
        return self._num_running

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def _check_fits(self, generation: Generation) -> None:
        layout = generation.model.session.layout
        if not generation.prompt:
            raise ServingError("the prompt is empty; at least one token is needed")
        if len(generation.prompt) >= layout.max_positions:
            raise ServingError(
                f"{len(generation.prompt)} prompt tokens leave no room in the model's "
                f"{layout.max_positions} positions; shorten the prompt"
            )
        if generation.num_needed > layout.max_positions:
            raise ServingError(
                f"{len(generation.prompt)} prompt tokens and {generation.max_tokens} new ones exceed the model's "
                f"{layout.max_positions} positions; shorten the prompt or lower max_tokens"
            )
        capacity = capacity_class(generation.num_needed, layout.max_positions)
        if capacity * layout.kv_bytes_per_token > self.limits.max_kv_bytes:
            raise ServingError(
                f"{generation.num_needed} tokens need {capacity * layout.kv_bytes_per_token} bytes of cache, the "
                f"server has {self.limits.max_kv_bytes}; shorten the prompt or lower max_tokens"
            )

    def _run(self) -> None:
        try:
            while self._sort_inbox():
                key, lane = next(iter(self._lanes.items()))
                self._lanes.move_to_end(key)
                self._turn(key, lane)
        finally:
            self._end()

    def _sort_inbox(self) -> bool:
        """Wait for work and move it to its lanes; False when all is done and the server is draining."""
        with self._condition:
            while not (self._inbox or self._lanes or self._draining):
                self._condition.wait()
            came, self._inbox = self._inbox, []
            self._num_in_lanes += len(came)
        for generation in came:
            model = generation.model
            if model.key not in self._lanes:
                self._lanes[model.key] = _Lane(model, self.limits, self.budget)
            self._lanes[model.key].waiting.append(generation)
        if self._giving_up:
            for lane in self._lanes.values():
                lane.cancel_all()
        return bool(self._lanes)

    def _turn(self, key: str, lane: "_Lane") -> None:
        waiting_before, started = len(lane.waiting), time.monotonic()
        try:
            lane.turn(self.counters, may_begin=self._starved in (None, key))
        except Exception:
            # A failing step ends the requests of this lane only.
            logger.exception("a step of %s failed", key)
            lane.fail_all()
        taken = waiting_before - len(lane.waiting)
        with self._condition:
            self._num_in_lanes = sum(len(one.waiting) for one in self._lanes.values())
            self._num_running = sum(one.num_running for one in self._lanes.values())
        if lane.is_empty:
            del self._lanes[key]
        if lane.is_starved and self._starved is None:
            self._starved = key
        elif self._starved == key and not lane.is_starved:
            self._starved = None
        if taken > 0:
            self._seconds_a_request += 0.1 * ((time.monotonic() - started) / taken - self._seconds_a_request)

    def _end(self) -> None:
        """Refuse new requests and fail those that are left: the thread is ending, as planned or not."""
        with self._condition:
            self._draining = True
            left, self._inbox = self._inbox, []
        for lane in self._lanes.values():
            left += lane.all_generations()
        self._lanes.clear()
        self._num_in_lanes = self._num_running = 0
        for generation in left:
            generation.emit(Delta(finish_reason="error"))


class _Lane:
    """The waiting requests of one model, and the batches of its running ones."""

    def __init__(self, model: LoadedModel, limits: Limits, budget: KvBudget) -> None:
        self.model, self._limits, self._budget = model, limits, budget
        self.waiting: deque[Generation] = deque()
        self.batches: dict[int, Batch] = {}
        self.is_starved = False
        """Whether the last turn found no memory to start anything."""

    @property
    def is_empty(self) -> bool:
        return not self.waiting and not self.batches

    @property
    def num_running(self) -> int:
        return sum(len(batch.generations) for batch in self.batches.values())

    def turn(self, counters: Counters, *, may_begin: bool) -> None:
        """Read one piece of prompts, then decode one token a sequence; ``may_begin``: also of waiting requests."""
        self._drop_cancelled()
        if not self._read_piece(counters):
            self.is_starved = bool(self.waiting) and not self._begin(counters, may_begin) and not self.num_running
        for batch in self.batches.values():
            num_tokens = batch.decode()
            counters.completion_tokens += num_tokens
            counters.steps += bool(num_tokens)
        self._free_empty()

    def all_generations(self) -> list[Generation]:
        """The running requests, then the waiting ones."""
        return [*(g for batch in self.batches.values() for g in batch.generations), *self.waiting]

    def fail_all(self) -> None:
        """Tell every client of this lane that its request failed."""
        ended = self.all_generations()
        self.waiting.clear()
        for batch in self.batches.values():
            batch.free()
        self.batches.clear()
        self.is_starved = False
        for generation in ended:
            generation.emit(Delta(finish_reason="error"))

    def cancel_all(self) -> None:
        """Mark every request as cancelled."""
        for generation in self.all_generations():
            generation.cancelled = True

    def _drop_cancelled(self) -> None:
        for batch in self.batches.values():
            batch.drop_cancelled()
        for generation in [g for g in self.waiting if g.cancelled]:
            self.waiting.remove(generation)
            generation.emit(Delta(finish_reason="cancelled"))
        self._free_empty()

    def _read_piece(self, counters: Counters) -> bool:
        """Read the next piece of a long prompt, if one is being read."""
        for batch in self.batches.values():
            if batch.reading is not None:
                counters.prompt_tokens += min(
                    self._limits.piece_tokens, len(batch.reading.prompt) - batch.reading.num_prefilled
                )
                batch.read_piece(self._limits.piece_tokens)
                return True
        return False

    def _begin(self, counters: Counters, may_begin: bool) -> bool:
        """Start the requests that have waited longest; False where they may not begin, or there is no room."""
        first = self.waiting[0]
        batch = self._batch_for(first)
        if not may_begin or batch.is_full or not batch.make_room(len(batch.decoding) + 1):
            return False
        if len(first.prompt) > self._limits.piece_tokens:
            batch.reading = self.waiting.popleft()
            counters.prompt_tokens += self._limits.piece_tokens
            batch.read_piece(self._limits.piece_tokens)
            return True
        new = self._like_the_first(batch)
        counters.prompt_tokens += sum(len(generation.prompt) for generation in new)
        counters.completion_tokens += len(new)
        for _ in new:
            self.waiting.popleft()
        batch.read_prompts(new)
        return True

    def _like_the_first(self, batch: Batch) -> list[Generation]:
        """The longest waiting requests that fit into one step of at most a piece, padding included."""
        longest, found = 0, list[Generation]()
        for generation in self.waiting:
            longest = max(longest, len(generation.prompt))
            count = len(found) + 1
            fits = longest * count <= self._limits.piece_tokens and self._batch_for(generation) is batch
            if not fits or not batch.make_room(len(batch.decoding) + count):
                break
            found.append(generation)
        return found

    def _batch_for(self, generation: Generation) -> Batch:
        capacity = capacity_class(generation.num_needed, self.model.session.layout.max_positions)
        if capacity not in self.batches:
            self.batches[capacity] = Batch(self.model, capacity, max_rows=self._limits.max_batch, budget=self._budget)
        return self.batches[capacity]

    def _free_empty(self) -> None:
        for capacity in [capacity for capacity, batch in self.batches.items() if batch.is_empty]:
            self.batches.pop(capacity).free()
