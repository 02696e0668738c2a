"""Go through the orders in which several actors can take their steps at one store.

A step is one operation of the store. Actors are threads of which one at a time runs, up to its next step. The orders
are found by running again and again: after each run, every other choice that could have been made is tried in turn.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from graftline.errors import GraftlineError
from graftline.registry.store import Store

Work = Callable[[Any], object]
"""What an actor does with its store."""


_ALONE = frozenset({"head", "read_digest"})
"""Reads that always come beside another step of the same actor: orders that differ in them alone say nothing more."""


class Actor(threading.Thread):
    """Runs ``work`` step by step. ``error``: what it was told; ``failed``: a fault of the code."""

    def __init__(self, work: Work, store: Store) -> None:
        super().__init__(daemon=True)
        self._work, self._store = work, Stepping(store, self)
        self._go, self._parked = threading.Semaphore(0), threading.Semaphore(0)
        self.is_done = False
        self.error: GraftlineError | None = None
        self.failed: BaseException | None = None

    def run(self) -> None:
        self._go.acquire()
        try:
            self._work(self._store)
        except GraftlineError as error:
            self.error = error
        except BaseException as error:  # noqa: BLE001 - told by the main thread
            self.failed = error
        self.is_done = True
        self._parked.release()

    def park(self) -> None:
        """Wait for the next turn."""
        self._parked.release()
        self._go.acquire()

    def advance(self) -> None:
        """Let it run to its next step, or its end."""
        self._go.release()
        assert self._parked.acquire(timeout=60)


class Stepping:
    """A store whose every operation is a step of an actor."""

    def __init__(self, store: Store, actor: Actor) -> None:
        self._store, self._actor = store, actor

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if not callable(found) or name in _ALONE:
            return found

        def step(*args: Any, **kwargs: Any) -> Any:
            self._actor.park()
            return found(*args, **kwargs)

        return step


def orders(
    prepare: Callable[[], tuple[Store, Sequence[Work]]], *, max_switches: int
) -> Iterator[tuple[Store, list[Actor], list[int]]]:
    """Every order with at most so many switches from an actor that could have run on.

    Args:
        prepare: a fresh store and what the actors do.
        max_switches: the bound.

    Yields:
        The store after a run, the actors, and whose turn each step was.
    """
    left: list[list[int]] = [[]]
    while left:
        wished = left.pop()
        store, works = prepare()
        actors = [Actor(work, store) for work in works]
        for actor in actors:
            actor.start()
        turns, choices = list[int](), list[list[int]]()
        while able := [number for number, actor in enumerate(actors) if not actor.is_done]:
            stay = turns[-1] if turns and turns[-1] in able else able[0]
            turn = wished[len(turns)] if len(turns) < len(wished) else stay
            choices.append(able)
            turns.append(turn)
            actors[turn].advance()
        for actor in actors:
            if actor.failed:
                raise actor.failed
        yield store, actors, turns
        for index in range(len(wished), len(turns)):
            for other in choices[index]:
                tried = [*turns[:index], other]
                if other != turns[index] and _switches(tried, choices) <= max_switches:
                    left.append(tried)


def _switches(turns: list[int], choices: list[list[int]]) -> int:
    return sum(turns[i] != turns[i - 1] and turns[i - 1] in choices[i] for i in range(1, len(turns)))
