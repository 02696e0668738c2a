"""Trains several adapters of one base side by side in one process, each to the bytes that it has alone.

Every training runs as it always does (its own rows, seed, rank, rate, steps, journal, checkpoints), in a thread of its
own. One computes at a time. At each decoder block, in the forward and in the backward pass, it passes the turn on, so
all of them come to a block one after another, and what depends on the frozen base alone is made once for all: the
block's dequantized weights (`graftline.weights.quant.shared_dense`), which alone a CPU could spare. The base itself is
in memory once where `graftline.weights.kept_base` keeps it.

mLoRA (ASPEN, Ye et al. 2023, arXiv 2312.02515) and PLoRA (Yan et al. 2025, arXiv 2508.02932) put the rows of all
adapters into one batch, whose products fill a GPU. Products of another shape round in another way, so an adapter would
depend on its company, and a training that goes on after a kill on who goes on with it. Here none does.
"""

import contextlib
import random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from graftline.train import preemption
from graftline.weights.quant.shared_dense import SharedDense, sharing

Training = Callable[[], None]
"""Loads the base, attaches an adapter and trains it, with `graftline.train.trainer.train`, on a CPU."""

_LOOK_SECONDS = 0.2


class Turns:
    """Whose turn it is. Only the training that has it touches this object, so it needs no lock."""

    def __init__(self, count: int) -> None:
        """``count`` trainings, numbered from 0; the first has the turn once it is started."""
        self._gates = {number: threading.Semaphore(0) for number in range(count)}
        self._before_pass: set[int] = set()
        self.dense = SharedDense()

    def wait(self, number: int) -> None:
        """Wait for the turn."""
        self._gates[number].acquire()

    def pass_on(self, number: int, *, before_pass: bool = False) -> None:
        """Let the others come as far, and wait for the turn.

        Args:
            number: who has the turn.
            before_pass: it is about to begin a pass through the model, in which all go side by side: wait until every
                other one is before a pass too, or has ended.
        """
        if before_pass:
            self._before_pass.add(number)
        after = self._next(number)
        if after == number:
            return
        state = _random_state()
        self._gates[after].release()
        self.wait(number)
        _set_random_state(state)

    def leave(self, number: int) -> None:
        """End; the turn goes to another one, if there is one left."""
        del self._gates[number]
        if self._gates:
            self._gates[self._next(number)].release()

    def start(self) -> None:
        """Give the first one its turn."""
        self._gates[0].release()

    def _next(self, number: int) -> int:
        order = sorted(self._gates, key=lambda other: (other <= number, other))
        within = [other for other in order if other not in self._before_pass]
        if not within:
            self._before_pass.clear()
            within = order
        return within[0]


_of_thread = threading.local()


def train_together(trainings: Sequence[Training]) -> list[BaseException | None]:
    """Run trainings side by side, all with the number of threads that torch has now; returns what each raised.

    One that fails leaves the others alone. SIGTERM, in the main thread, is passed on to all: each ends with its step,
    which it keeps. Memory is that of one training for the base, and of all of them for the rest.
    """
    turns, raised = Turns(len(trainings)), list[BaseException | None]([None] * len(trainings))

    def run(number: int) -> None:
        turns.wait(number)
        _of_thread.seat = (turns, number)
        try:
            trainings[number]()
        except BaseException as error:  # noqa: BLE001  # for the caller, who knows what it means
            raised[number] = error
        finally:
            turns.leave(number)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(trainings))]
    state = _random_state()
    with _sigterm() as is_asked:
        for thread in threads:
            thread.start()
        turns.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(_LOOK_SECONDS)
                if is_asked.is_set():
                    preemption.ask()  # again and again: one that has not begun its first step forgets it
    _set_random_state(state)
    return raised


@contextlib.contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets."""
    is_asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        is_asked.set()

    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, ask) if is_main else None
    try:
        yield is_asked
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def in_turns(model: PreTrainedModel) -> Iterator[None]:
    """Pass the turn on at each block of ``model``, if this training runs side by side with others."""
    seat: tuple[Turns, int] | None = getattr(_of_thread, "seat", None)
    if seat is None:
        yield
        return
    turns, number = seat

    def before_pass(module: nn.Module, given: Any) -> None:
        turns.pass_on(number, before_pass=True)

    def at_block(block: int) -> None:
        turns.pass_on(number)
        turns.dense.come_to(block)

    def forward_of(block: int) -> Callable[..., None]:
        return lambda module, given: at_block(block)

    def backward_of(block: int) -> Callable[..., None]:
        def after_forward(module: nn.Module, given: Any, output: Tensor | tuple[Tensor, ...]) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:  # its gradient is known when the block's backward pass is to begin
                hidden.register_hook(lambda gradient: at_block(block))

        return after_forward

    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    handles = [model.base_model.register_forward_pre_hook(before_pass)]
    for block, module in enumerate(blocks):
        handles += [module.register_forward_pre_hook(forward_of(block))]
        handles += [module.register_forward_hook(backward_of(block))]
    try:
        with sharing(turns.dense):  # only now, because without blocks to come to nothing would be freed
            yield
    finally:
        for handle in handles:
            handle.remove()


def _random_state() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set_random_state(state: tuple[Any, ...]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
