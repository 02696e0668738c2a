"""Steps of a Ray Data job over rows: what the workers get, a map over parts, and its results."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import pyarrow
from transformers import PreTrainedTokenizerBase

from graftline.data.parts import Part, Place
from graftline.data.records import Problems
from graftline.data.rows import Row
from graftline.logs import Reporter
from graftline.settings.data import Data

WORK = ".work"
"""Folder below the job's result, with what one step leaves for the next."""
_MOST_TOLD = 10


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a worker needs to know."""

    source: Place
    out: Place
    data: Data
    template: str
    load_tokenizer: Callable[[], PreTrainedTokenizerBase] = field(repr=False)
    """Called in each worker."""
    format: str = ""
    parts: tuple[Part, ...] = ()


class Told(Problems):
    """Problems with one part, to be reported with those of the others."""

    def __init__(self) -> None:
        super().__init__("")
        self.first = list[str]()

    def add(self, problem: object) -> None:
        """Remember a problem; the first ten are reported."""
        self.number += 1
        if len(self.first) < _MOST_TOLD:
            self.first.append(str(problem))


def map_parts(ray: ModuleType, job: Job, step: Callable[[int], pyarrow.Table]) -> Any:
    """A data set with the result of ``step`` for each part, by its number."""
    numbers = ray.data.range(len(job.parts), override_num_blocks=len(job.parts))
    return numbers.map_batches(partial(_run_step, step), batch_size=1, batch_format="pyarrow")


def _run_step(step: Callable[[int], pyarrow.Table], numbers: pyarrow.Table) -> pyarrow.Table:
    return step(int(numbers["id"][0].as_py()))


def summary_of(number: int, told: Told | None = None, **values: Any) -> pyarrow.Table:
    """A step's result for part ``number``: one row of ``values``, and the part's problems."""
    told = told or Told()
    about = {"part": number, "problems": json.dumps(told.first), "num_problems": told.number}
    return pyarrow.table({name: [value] for name, value in (about | values).items()})


def summaries(mapped: Any, job: Job, name: str) -> list[dict[str, Any]]:
    """A step's row for each part, in the parts' order; ``name`` labels its progress.

    Raises:
        DataError: parts have problems, which are all reported together.
    """
    found: list[dict[str, Any]] = []
    report = Reporter(name, "parts")
    for row in mapped.iter_rows():
        found.append(row)
        report(len(found), len(job.parts))
    found.sort(key=lambda row: int(row["part"]))
    problems = Problems("the rows")
    for row in found:
        first = json.loads(row["problems"])
        for problem in first:
            problems.add(problem)
        problems.number += int(row["num_problems"]) - len(first)
    problems.raise_any()
    return found


def rows_in(job: Job, part: Part) -> Iterator[Row]:
    """The rows of a part, which has no bad ones."""
    return job.source.rows(part, format=job.format, problems=Told())
