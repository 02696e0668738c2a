"""Batches, fairness, limits and endings of the scheduler, on a real graph, without HTTP."""

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from graftline.errors import ServingError
from graftline.export.onnx_session import KvCache, Step
from graftline.serve.batch import Batch, KvBudget, capacity_class
from graftline.serve.catalog import Catalog
from graftline.serve.generation import (
    BusyError,
    ChosenToken,
    Delta,
    Generation,
    LoadedModel,
    Sampler,
    SamplingParams,
    TextStream,
)
from graftline.serve.scheduler import Limits, Scheduler
from graftline.serve.served_base import Base, Runtime
from tests.serve.conftest import METHODS, loaded
from tests.serve.test_sampling import choose


@pytest.fixture(scope="module")
def base(tiny: Path, runtime: Runtime) -> Base:
    return Base(tiny, runtime)


RANDOM = SamplingParams(temperature=1.0, seed=11)
"""A random tiny model repeats one token when it is greedy. Sampled tokens depend on every logit."""


class Client:
    """Collects what a generation emits."""

    def __init__(self) -> None:
        self.deltas: queue.Queue[Delta] = queue.Queue()
        self.finished = 0.0

    def wait(self) -> tuple[list[int], str]:
        tokens: list[int] = []
        while True:
            delta = self.deltas.get(timeout=20)
            tokens += [choice.token for choice in delta.choices]
            if delta.finish_reason:
                return tokens, delta.finish_reason

    def emit(self, delta: Delta) -> None:
        if delta.finish_reason:
            self.finished = time.monotonic()
        self.deltas.put(delta)


Make = Callable[..., tuple[Generation, Client]]


@pytest.fixture
def make(base: Base) -> Make:
    def make(
        prompt: list[int], max_tokens: int, *, key: str = "base", stop: frozenset[int] = frozenset()
    ) -> tuple[Generation, Client]:
        client = Client()
        model = LoadedModel(key, base.session, base.session.runner())
        sampler, text = Sampler(RANDOM), TextStream(base.token_bytes)
        return Generation(model, tuple(prompt), max_tokens, sampler, text, stop, client.emit), client

    return make


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    scheduler = Scheduler(Limits(max_batch=4, max_waiting=64, piece_tokens=16))
    scheduler.start()
    yield scheduler
    scheduler.drain(5)
    assert not scheduler.is_alive


def alone(base: Base, prompt: list[int], num_tokens: int) -> list[int]:
    runner, cache, sampler = base.session.runner(), base.session.new_cache(1, 512), Sampler(RANDOM)
    tokens: list[int] = []
    logits = runner.step(cache, Step([prompt], [len(prompt)]))
    while len(tokens) < num_tokens:
        tokens.append(choose(sampler, logits[0]).token)
        logits = runner.step(cache, Step([tokens[-1:]], [len(prompt) + len(tokens)]))
    return tokens


def test_sequences_of_every_length_get_the_tokens_that_they_get_alone(
    base: Base, make: Make, scheduler: Scheduler
) -> None:
    random = np.random.default_rng(0)
    jobs = [(random.integers(4, 500, random.integers(1, 80)).tolist(), int(random.integers(1, 40))) for _ in range(40)]
    clients = []
    for number, (prompt, max_tokens) in enumerate(jobs):
        generation, client = make(prompt, max_tokens, key=f"lane {number % 3}")
        scheduler.submit(generation)
        clients.append(client)
    for (prompt, max_tokens), client in zip(jobs, clients, strict=True):
        assert client.wait() == (alone(base, prompt, max_tokens), "length")
    scheduler.drain(20)
    assert scheduler.budget.used_bytes == 0
    assert scheduler.num_running == scheduler.num_waiting == 0


def test_requests_share_steps(make: Make) -> None:
    scheduler = Scheduler(Limits(max_batch=4))
    made = [make([5, 6, 7], 30) for _ in range(4)]
    for generation, _ in made:
        scheduler.submit(generation)
    scheduler.start()
    for _, client in made:
        client.wait()
    scheduler.drain(5)
    assert scheduler.counters.completion_tokens == 4 * 30
    assert scheduler.counters.steps == 29  # the first tokens come from reading the prompts


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(base: Base, make: Make, scheduler: Scheduler) -> None:
    tokens = alone(base, [5, 6, 7], 10)
    stop = tokens[-1]
    generation, client = make([5, 6, 7], 30, stop=frozenset({stop}))
    scheduler.submit(generation)
    assert client.wait() == (tokens[: tokens.index(stop)], "stop")


def test_a_lane_with_one_request_is_not_starved_by_one_with_many(make: Make) -> None:
    scheduler = Scheduler(Limits(max_batch=2))
    many = [make([5, 6], 100, key="many") for _ in range(20)]
    for generation, _ in many:
        scheduler.submit(generation)
    generation, lonely = make([5, 6], 100, key="one")
    scheduler.submit(generation)
    scheduler.start()
    lonely.wait()
    finished_before = sum(client.finished != 0 for _, client in many)
    scheduler.drain(20)
    assert finished_before <= 3


def test_a_long_request_is_not_kept_out_of_the_cache_memory_by_short_ones_of_another_model(
    base: Base, make: Make
) -> None:
    scheduler = Scheduler(Limits(max_batch=4, max_kv_bytes=512 * base.session.layout.kv_bytes_per_token))
    short = [make([5, 6], 40, key="short") for _ in range(40)]
    for generation, _ in short:
        scheduler.submit(generation)
    generation, long = make(list(range(4, 304)), 5, key="long")  # takes all memory that there is
    scheduler.submit(generation)
    other, third = make([5, 6], 5, key="third")
    scheduler.submit(other)
    scheduler.start()
    assert long.wait()[1] == third.wait()[1] == "length"
    finished_before = sum(client.finished != 0 for _, client in short)
    scheduler.drain(20)
    assert finished_before <= 12
    assert [client.wait()[1] for _, client in short] == ["length"] * 40


def test_short_requests_that_never_end_together_do_not_keep_a_long_one_out(base: Base, make: Make) -> None:
    scheduler = Scheduler(Limits(max_batch=4, max_kv_bytes=512 * base.session.layout.kv_bytes_per_token))
    short = [make([5, 6], (11, 19, 31, 43)[number % 4], key="short") for number in range(60)]
    for generation, _ in short:
        scheduler.submit(generation)
    generation, long = make(list(range(4, 304)), 5, key="long")  # takes all memory that there is
    scheduler.submit(generation)
    scheduler.start()
    assert long.wait()[1] == "length"
    assert [client.wait()[1] for _, client in short] == ["length"] * 60
    scheduler.drain(20)
    assert sum(client.finished < long.finished for _, client in short) <= 8


def test_a_starved_request_that_is_cancelled_lets_the_others_begin_again(base: Base, make: Make) -> None:
    scheduler = Scheduler(Limits(max_batch=4, max_kv_bytes=512 * base.session.layout.kv_bytes_per_token))
    short = [make([5, 6], 40, key="short") for _ in range(12)]
    for generation, _ in short:
        scheduler.submit(generation)
    generation, _ = make(list(range(4, 304)), 5, key="long")
    scheduler.submit(generation)
    scheduler.start()
    short[0][1].wait()
    generation.cancelled = True
    assert [client.wait()[1] for _, client in short[1:]] == ["length"] * 11
    scheduler.drain(20)


def test_a_long_prompt_does_not_stop_the_others(make: Make, scheduler: Scheduler) -> None:
    short, client = make([5, 6], 60)
    scheduler.submit(short)
    long, late = make(list(range(4, 404)), 1)
    scheduler.submit(long)
    client.wait()
    late.wait()
    # 400 tokens are 25 pieces of 16; the short one decodes a token after each.
    assert client.deltas.qsize() == 0
    assert late.finished > 0


def test_too_many_waiting_requests_are_refused_with_a_time(make: Make) -> None:
    scheduler = Scheduler(Limits(max_waiting=3))
    for _ in range(3):
        scheduler.submit(make([5], 5)[0])
    with pytest.raises(BusyError, match="3 requests wait") as caught:
        scheduler.submit(make([5], 5)[0])
    assert 1 <= caught.value.retry_after_seconds <= 60
    assert scheduler.counters.refused == 1


def test_cache_memory_never_exceeds_its_bound(base: Base, make: Make) -> None:
    row_bytes = 64 * base.session.layout.kv_bytes_per_token
    scheduler = Scheduler(Limits(max_kv_bytes=5 * row_bytes, max_batch=4))
    made = [make([5, 6, 7], 20, key=f"lane {number % 4}") for number in range(24)]
    for generation, _ in made:
        scheduler.submit(generation)
    most = 0
    reserve = scheduler.budget.reserve

    def watched(num_bytes: int) -> bool:
        nonlocal most
        taken = reserve(num_bytes)
        most = max(most, scheduler.budget.used_bytes)
        return taken

    scheduler.budget.reserve = watched  # type: ignore[method-assign]
    scheduler.start()
    for _, client in made:
        assert client.wait()[1] == "length"
    scheduler.drain(5)
    assert 2 * row_bytes <= most <= 5 * row_bytes


@pytest.mark.parametrize(("prompt", "max_tokens", "message"), [([], 5, "empty"), ([5] * 400, 200, "512 positions")])
def test_what_can_never_fit_is_refused_at_once(
    prompt: list[int], max_tokens: int, message: str, make: Make, scheduler: Scheduler
) -> None:
    with pytest.raises(ServingError, match=message):
        scheduler.submit(make(prompt, max_tokens)[0])


def test_a_request_larger_than_all_cache_memory_is_refused(base: Base, make: Make) -> None:
    scheduler = Scheduler(Limits(max_kv_bytes=100 * base.session.layout.kv_bytes_per_token))
    with pytest.raises(ServingError, match="bytes of cache"):
        scheduler.submit(make([5] * 100, 100)[0])


def test_a_cancelled_request_ends_and_the_others_keep_their_tokens(
    base: Base, make: Make, scheduler: Scheduler
) -> None:
    made = [make([5 + number, 6], 80) for number in range(4)]
    for generation, _ in made:
        scheduler.submit(generation)
    made[0][0].cancelled = made[2][0].cancelled = True
    assert made[0][1].wait()[1] == made[2][1].wait()[1] == "cancelled"
    for number in (1, 3):
        assert made[number][1].wait() == (alone(base, [5 + number, 6], 80), "length")


def test_a_step_that_fails_ends_its_lane_only(make: Make, scheduler: Scheduler) -> None:
    broken, client = make([5, 6], 10, key="broken")
    broken.sampler.begin = lambda logits: 1 / 0  # type: ignore[assignment, method-assign, return-value]
    scheduler.submit(broken)
    good, other = make([5, 6], 10)
    scheduler.submit(good)
    assert client.wait()[1] == "error"
    assert other.wait()[1] == "length"
    again, client = make([5, 6], 10, key="broken")
    scheduler.submit(again)
    assert client.wait()[1] == "length"
    scheduler.drain(20)
    assert scheduler.budget.used_bytes == 0


class _SubmitsWhenLookedAt(Generation):
    """A request that is being submitted just when the scheduler looks whether another one was cancelled."""

    then: Callable[[], None] | None = None

    @property  # type: ignore[override]
    def cancelled(self) -> bool:
        if self.then is not None:
            then, self.then = self.then, None
            then()
        return False

    @cancelled.setter
    def cancelled(self, value: bool) -> None:
        del value


def test_a_request_may_come_while_the_scheduler_looks_at_those_that_wait(make: Make) -> None:
    scheduler = Scheduler(Limits(max_batch=1))
    running, first = make([5, 6], 30)
    plain, waiting = make([5, 7], 5)
    late, last = make([5, 8], 5)
    looked_at = _SubmitsWhenLookedAt(**{name: getattr(plain, name) for name in Generation.__dataclass_fields__})
    looked_at.then = lambda: scheduler.submit(late)
    for generation in (running, looked_at, make([5, 9], 5)[0]):
        scheduler.submit(generation)
    scheduler.start()
    assert [client.wait()[1] for client in (first, waiting, last)] == ["length"] * 3
    scheduler.drain(20)


def test_a_request_that_comes_while_a_lane_fails_is_answered(make: Make) -> None:
    scheduler = Scheduler(Limits(max_batch=1))
    broken, client = make([5, 6], 5)
    late, last = make([5, 8], 5)

    def fail(logits_V: Tensor) -> ChosenToken:
        scheduler.submit(late)
        raise RuntimeError("out of memory")

    broken.sampler.begin = fail  # type: ignore[method-assign]
    scheduler.submit(broken)
    scheduler.start()
    assert client.wait()[1] == "error"
    assert last.wait()[1] == "length"
    scheduler.drain(20)


@pytest.mark.parametrize("num_tokens", [3, 40])
def test_everybody_is_told_when_reading_their_prompts_fails(num_tokens: int, base: Base, make: Make) -> None:
    scheduler = Scheduler(Limits(max_batch=4, piece_tokens=16))
    made = [make([5] * num_tokens, 5) for _ in range(6)]
    runner = made[0][0].model.runner

    def fail(cache: KvCache, step: Step) -> Tensor:
        raise RuntimeError("out of memory")

    runner.step_on_device = fail  # type: ignore[method-assign]
    for generation, _ in made:
        scheduler.submit(generation)
    scheduler.start()
    assert [client.wait()[1] for _, client in made] == ["error"] * 6
    scheduler.drain(20)
    assert scheduler.budget.used_bytes == 0


@pytest.mark.parametrize("failing", [1, 2])
def test_everybody_is_told_when_there_is_no_memory_for_a_cache(
    failing: int, base: Base, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = Scheduler(Limits(max_batch=4))
    new_cache, calls = base.session.new_cache, []

    def scarce(num_rows: int, capacity: int) -> KvCache:
        calls.append(num_rows)
        if len(calls) == failing:
            raise RuntimeError("out of memory")
        return new_cache(num_rows, capacity)

    monkeypatch.setattr(base.session, "new_cache", scarce)
    made = [make([5, 6], 5) for _ in range(4)]
    for generation, _ in made:
        scheduler.submit(generation)
    scheduler.start()
    assert [client.wait()[1] for _, client in made] == ["error"] * 4
    scheduler.drain(20)
    assert scheduler.budget.used_bytes == 0


def test_nobody_waits_for_a_scheduler_that_broke(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler()
    monkeypatch.setattr(threading, "excepthook", lambda caught: None)
    monkeypatch.setattr(scheduler, "_turn", lambda key, lane: 1 / 0)
    made = [make([5, 6], 5, key=f"lane {number}") for number in range(3)]
    for generation, _ in made:
        scheduler.submit(generation)
    scheduler.start()
    assert [client.wait()[1] for _, client in made] == ["error"] * 3
    scheduler.drain(20)
    assert scheduler.num_waiting == scheduler.num_running == 0
    with pytest.raises(BusyError):
        scheduler.submit(make([5], 5)[0])


def test_what_is_not_done_when_the_time_to_drain_is_over_is_cancelled(make: Make) -> None:
    scheduler = Scheduler(Limits(max_batch=1))
    running, first = make([5, 6], 400)
    waiting, second = make([5, 6], 5)
    begin = running.sampler.begin

    def slowly(logits_V: Tensor) -> ChosenToken:
        while not scheduler._giving_up:
            time.sleep(0.001)
        return begin(logits_V)

    running.sampler.begin = slowly  # type: ignore[method-assign]
    scheduler.submit(running)
    scheduler.submit(waiting)
    scheduler.start()
    scheduler.drain(0.2)
    assert first.wait()[1] == second.wait()[1] == "cancelled"
    assert scheduler.budget.used_bytes == 0


def test_a_cache_is_freed_when_its_bytes_go_back_to_the_budget(
    base: Base, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = Scheduler(Limits(max_batch=4))
    caches: list[weakref.ref[KvCache]] = []
    new_cache, release = base.session.new_cache, scheduler.budget.release
    alive_after_release: list[tuple[int, int]] = []

    def recorded(num_rows: int, capacity: int) -> KvCache:
        cache = new_cache(num_rows, capacity)
        caches.append(weakref.ref(cache))
        return cache

    def released(num_bytes: int) -> None:
        release(num_bytes)
        alive = [tensor for ref in caches if (cache := ref()) for tensor in cache.tensors]
        alive_after_release.append((sum(tensor.nbytes for tensor in alive), scheduler.budget.used_bytes))

    monkeypatch.setattr(base.session, "new_cache", recorded)
    monkeypatch.setattr(scheduler.budget, "release", released)
    generation, client = make([5, 6, 7], 100)
    runner = generation.model.runner  # an adapter's runner outlives its requests
    scheduler.submit(generation)
    for number in range(3):
        scheduler.submit(make([5 + number], 10)[0])
    scheduler.start()
    assert client.wait()[1] == "length"
    scheduler.drain(20)
    assert len(caches) >= 2
    assert [ref() for ref in caches] == [None] * len(caches)
    assert all(alive <= used for alive, used in alive_after_release)
    # The next cache may lie where the last one lay: it is bound anew all the same.
    assert runner.step(new_cache(1, 64), Step([[5, 6]], [2])).shape == (1, base.session.layout.vocab_size)


def test_draining_finishes_what_runs_and_refuses_what_comes(make: Make) -> None:
    scheduler = Scheduler()
    scheduler.start()
    generation, client = make([5, 6], 50)
    scheduler.submit(generation)
    scheduler.drain(20)
    assert client.wait()[1] == "length"
    with pytest.raises(BusyError, match="shutting down"):
        scheduler.submit(make([5], 5)[0])


def test_capacities_are_powers_of_two_up_to_the_models_positions() -> None:
    assert [capacity_class(count, 8192) for count in (1, 64, 65, 300, 8000)] == [64, 64, 128, 512, 8192]
    assert capacity_class(600, 700) == 700


def test_a_batch_grows_with_its_sequences_in_place(base: Base, make: Make) -> None:
    budget = KvBudget(1 << 30)
    batch = Batch(LoadedModel("base", base.session, base.session.runner()), 64, max_rows=4, budget=budget)
    clients = []
    for number in range(4):
        generation, client = make([5 + number, 6, 7], 20)
        assert batch.make_room(number + 1)
        batch.read_prompts([generation])
        batch.decode()
        clients.append(client)
    assert not batch.make_room(5)
    while not batch.is_empty:
        batch.decode()
    batch.free()
    assert budget.used_bytes == 0
    for number, client in enumerate(clients):
        assert client.wait()[0] == alone(base, [5 + number, 6, 7], 20)


def test_the_cache_keeps_few_adapters_and_drops_the_oldest(catalog: Catalog) -> None:
    cache = catalog.resolve("tiny").base.adapters
    files = [catalog.resolve(name).adapter for name in METHODS]
    for file in files:
        with cache.use(file):
            pass
    assert len(loaded(cache)) == 3
    assert files[0].digest not in loaded(cache)
    assert cache.num_bytes == sum(loaded(cache).values()) > 0
    with cache.use(files[1]):
        pass
    assert cache.num_loads == 4


def test_an_adapter_in_use_is_never_dropped(catalog: Catalog) -> None:
    cache = catalog.resolve("tiny").base.adapters
    first, second, third, fourth = (catalog.resolve(name).adapter for name in METHODS)
    with cache.use(first), cache.use(second), cache.use(third):
        with pytest.raises(BusyError, match="all 3 places"), cache.use(fourth):
            pass
        assert set(loaded(cache)) == {first.digest, second.digest, third.digest}
    with cache.use(fourth):
        assert fourth.digest in loaded(cache)
