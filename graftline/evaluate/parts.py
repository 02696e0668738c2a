"""An evaluation in parts: batches that are scored in any order, by any process, and kept one by one until all are done.

Which items share a batch is decided before the first one is scored, by the items alone. A batch's scores depend on
nothing outside it, so neither the number of processes nor a run that was killed and continued changes a bit.
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
    """How the batches of a section are scored. Small, because it is sent to other processes."""

    def on(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> ScoreBatch:
        """Do what is done once for all batches, such as the forward pass of a common prefix."""
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
    """The section's rows in the order of its items, from what each batch gave."""


class Parts(Protocol):
    """Where the scores of single batches are kept while others are missing."""

    def read_part(self, section: Section, index: int) -> list[ScoreRow] | None:
        """What was kept of a batch; None if nothing was, or nothing that can be trusted."""
        ...

    def write_part(self, section: Section, index: int, rows: list[ScoreRow]) -> None:
        """Keep the scores of a batch."""
        ...


OnPart = Callable[[int, list[ScoreRow]], None]
Runner = Callable[[SectionWork, Sequence[int], OnPart], None]
"""Scores the batches with these indices and passes each result on as soon as it is there, in any order."""


def score_section(
    work: SectionWork, run: Runner, *, on_progress: OnProgress, parts: Parts | None = None
) -> tuple[Any, ...]:
    """Score what is missing of a section.

    Args:
        work: the section.
        run: who scores its batches.
        on_progress: called with the units that are done and in all, at the start and after each batch.
        parts: where batches are kept; None: nowhere.
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
    """Processes that each hold one model at a time and score the batches that they are given.

    They are started when the first batch is scored, each with CUDA devices in turn, and end with this process, however
    it ends.
    """

    def __init__(self, count: int, held: ModelInMemory, *, threads: int) -> None:
        """Prepare ``count`` processes.

        Args:
            count: how many.
            held: without a model yet; how models are loaded.
            threads: CPU threads of one operation in each process.
        """
        context = multiprocessing.get_context("spawn")
        self.count = count
        self._pool = ProcessPoolExecutor(count, context, _start, (held, threads, context.Value("i", 0)))

    def runner(self, wanted: Model) -> Runner:
        """Scores batches with a model, which the processes load."""

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


# What runs in each of the processes.

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
    """A process that is killed cannot end its children, which would wait for work for ever."""
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


# What all sections share.

Item = TypeVar("Item")


def batches_by_length(
    items: Iterable[Item], length: Callable[[Item], int], *, batch_tokens: int
) -> Iterator[list[Item]]:
    """Batches of items of similar length, longest first: memory is at its peak in the first batch.

    Args:
        items: what to batch; items of one length stay in their order.
        length: columns that an item takes.
        batch_tokens: upper bound on rows × columns, padding included; one item alone may exceed it.
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
    """Evaluation mode without gradients; the former mode is restored at the end."""
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
        EvaluationError: naming ``name``.
    """
    if not all(map(math.isfinite, values)):
        raise EvaluationError(
            f"{name} has a log-likelihood that is not finite; the model gives NaN or infinity: check its weights"
        )
