"""An evaluation in parts: batches scored in any order by any process, each stored until all are done.

The items alone determine the batches, before scoring starts. A batch's scores depend on nothing outside it, so neither
the number of processes nor a killed and resumed run changes a bit.
"""

import contextlib
import math
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftline.errors import EvaluationError
from graftline.evaluate.models import Model, ModelInMemory
from graftline.evaluate.scores import AnswerScore, DocumentScore, ItemScore, Section
from graftline.logs import OnProgress

ScoreRow = ItemScore | DocumentScore | AnswerScore
ScoreBatch = Callable[[Any], list[ScoreRow]]
"""Scores one batch with the model that it was made for."""


class Scorer(Protocol):
    """How the batches of a section are scored. Keep it small: it is sent to other processes."""

    def on(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> ScoreBatch:
        """Do the work that all batches share, such as the forward pass of a common prefix."""
        ...


@dataclass(frozen=True)
class SectionWork:
    """One section of an evaluation, cut into batches."""

    section: Section
    batches: Sequence[Any]
    sizes: Sequence[int]
    """Units of progress in each batch: items, rows or windows."""
    scorer: Scorer
    collect: Callable[[Sequence[list[ScoreRow]]], tuple[Any, ...]]
    """Puts the rows of all batches into the order of the section's items."""


class Parts(Protocol):
    """Storage for the scores of single batches until all are done."""

    def read_part(self, section: Section, index: int) -> list[ScoreRow] | None:
        """The stored scores of a batch; None if there are none or they are damaged."""
        ...

    def write_part(self, section: Section, index: int, rows: list[ScoreRow]) -> None:
        """Store the scores of a batch."""
        ...


OnPart = Callable[[int, list[ScoreRow]], None]
Runner = Callable[[SectionWork, Sequence[int], OnPart], None]
"""Scores the batches with these indices and passes on each result as soon as it is ready, in any order."""


def score_section(
    work: SectionWork, run: Runner, *, on_progress: OnProgress, parts: Parts | None = None
) -> tuple[Any, ...]:
    """Score the missing batches of a section.

    Args:
        work: the section.
        run: scores the section's batches.
        on_progress: called with the units done and the total, at the start and after each batch.
        parts: where scored batches are stored; None: nowhere.
    """
    found: dict[int, list[ScoreRow]] = {}
    if parts:
        read = ((index, parts.read_part(work.section, index)) for index in range(len(work.batches)))
        found = {index: rows for index, rows in read if rows is not None}
    done, total = sum(work.sizes[index] for index in found), sum(work.sizes)
    on_progress(done, total)

    def take(index: int, rows: list[ScoreRow]) -> None:
        nonlocal done
        found[index] = rows
        if parts:
            parts.write_part(work.section, index, rows)
        done += work.sizes[index]
        on_progress(done, total)

    if missing := [index for index in range(len(work.batches)) if index not in found]:
        run(work, missing, take)
    return work.collect([found[index] for index in range(len(work.batches))])


def in_this_process(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> Runner:
    """Score batches one after the other with a model in memory."""

    def run(work: SectionWork, indices: Sequence[int], on_part: OnPart) -> None:
        with evaluating(model):
            score = work.scorer.on(model, tokenizer)
            for index in indices:
                on_part(index, score(work.batches[index]))

    return run


class Processes:
    """Worker processes that each hold one model at a time and score batches.

    They start with the first batch, get CUDA devices in turn, and end with this process, even if it is killed.
    """

    def __init__(self, count: int, held: ModelInMemory, *, threads: int) -> None:
        """Prepare ``count`` processes.

        Args:
            count: number of processes.
            held: loads models; holds none yet.
            threads: CPU threads per operation in each process.
        """
        context = multiprocessing.get_context("spawn")
        self.count = count
        self._pool = ProcessPoolExecutor(count, context, _start, (held, threads, context.Value("i", 0)))

    def runner(self, wanted: Model) -> Runner:
        """A runner for a model, which the processes load."""

        def run(work: SectionWork, indices: Sequence[int], on_part: OnPart) -> None:
            asked = {
                self._pool.submit(_score, wanted, work.section, work.scorer, work.batches[index]): index
                for index in indices
            }
            try:
                for future in as_completed(asked):
                    on_part(asked[future], future.result())
            except BrokenProcessPool as error:
                raise EvaluationError(
                    f"one of the {self.count} processes of the evaluation was ended from outside, most likely because "
                    "memory ran out: set evaluate.processes to fewer, or evaluate.batch_tokens lower. What was scored "
                    "is kept, the next run continues from there"
                ) from error
            finally:
                for future in asked:
                    future.cancel()

        return run

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(cancel_futures=True)


# Code that runs in each worker process.

_held: ModelInMemory
_scorers: dict[tuple[Model, Section], ScoreBatch] = {}


def _start(held: ModelInMemory, threads: int, started: Any) -> None:
    global _held  # the one model of this process
    _held = held
    torch.set_num_threads(threads)
    with started.get_lock():
        number, started.value = started.value, started.value + 1
    if held.device == "cuda":
        torch.cuda.set_device(number % torch.cuda.device_count())
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End with the parent: if it is killed, it cannot end its children, which would wait for work forever."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _score(wanted: Model, section: Section, scorer: Scorer, batch: Any) -> list[ScoreRow]:
    model, tokenizer = _held.get(wanted)
    with evaluating(model):
        if (wanted, section) not in _scorers:
            _scorers.clear()
            _scorers[wanted, section] = scorer.on(model, tokenizer)
        return _scorers[wanted, section](batch)


# Shared by all sections.

Item = TypeVar("Item")


def batches_by_length(
    items: Iterable[Item], length: Callable[[Item], int], *, batch_tokens: int
) -> Iterator[list[Item]]:
    """Batches of items of similar length, longest first, so that memory peaks in the first batch.

    Args:
        items: what to batch; items of equal length keep their order.
        length: columns that an item takes.
        batch_tokens: upper bound on rows × columns, including padding; a single item may exceed it.
    """
    batch: list[Item] = []
    for item in sorted(items, key=lambda item: -length(item)):
        if batch and (len(batch) + 1) * length(batch[0]) > batch_tokens:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; restores the previous mode at the end."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def require_finite(values: Iterable[float], name: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        EvaluationError: a value is not finite; the message has ``name``.
    """
    if not all(map(math.isfinite, values)):
        raise EvaluationError(
            f"{name} has a log-likelihood that is not finite; the model gives NaN or infinity: check its weights"
        )
