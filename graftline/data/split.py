"""Training rows and evaluation rows kept apart: near duplicates, the split that respects them, and leakage found."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy
from numpy.typing import NDArray

from graftline.data.near import NEAR, NearIndex, normalize
from graftline.data.row_file import keys_of, take
from graftline.data.row_keys import Integers, Keys, first_of, pairs
from graftline.data.rows import Row
from graftline.errors import DataError
from graftline.logs import OnProgress, silent

# Rows set aside for evaluation, so that no row of one side has a duplicate or near duplicate on the other.
#
# Which rows are set aside depends on the seed and on the prompts, not on the order of the file: groups of duplicates
# are sorted by the SHA-256 of seed and prompt. When rows are added (a source that moves), most evaluation rows stay.
#
# The reserve is taken from that order's other end, before the evaluation's rows. So keeping one back changes no
# evaluation row, and a row that is added can push rows out of either side, but never brings one that a run has looked
# at into the reserve.


@dataclass(frozen=True, slots=True)
class Split:
    """Rows to train on and rows to evaluate with, each in the order of the file.

    ``near``: source lines of training rows whose prompts are nearly the same as an earlier one's, with that one's.
    """

    training: Sequence[Row]
    evaluation: Sequence[Row]
    near: tuple[tuple[int, int], ...] = ()
    reserve: Sequence[Row] = ()
    """Rows that only promotions look at."""


def split_rows(
    rows: Sequence[Row],
    evaluation_rows: int,
    *,
    seed: int,
    reserve_rows: int = 0,
    ages: NDArray[numpy.float64] | None = None,
    on_progress: OnProgress = silent,
    setting: str = "data.evaluation_rows",
) -> Split:
    """Set ``evaluation_rows`` rows aside, whole groups of duplicates at a time.

    Args:
        rows: in the order of the file.
        evaluation_rows: how many to set aside.
        seed: decides which, with the prompts.
        reserve_rows: how many more to keep back for promotions.
        ages: (R,) of each row; then the newest are set aside in place of those that ``seed`` draws. A row that nearly
            repeats an older one is as old as that: it is not new.
        on_progress: called with prompts compared and in all.
        setting: what errors call ``evaluation_rows``.

    Raises:
        DataError: there are not so many rows beside the ones to train on, or not without cutting a group.
    """
    asked = {setting: evaluation_rows} | ({"data.reserve_rows": reserve_rows} if reserve_rows else {})
    (chosen, *kept), (near, earlier) = _set_aside(rows, asked, seed, on_progress, ages)
    taken = numpy.concatenate([chosen, *kept])
    told = ~numpy.isin(near, taken)
    return Split(
        training=take(rows, numpy.setdiff1d(numpy.arange(len(rows)), taken, assume_unique=True)),
        evaluation=take(rows, chosen),
        near=pairs(keys_of(rows)["line"], near[told], earlier[told]) if told.any() else (),
        reserve=take(rows, kept[0]) if kept else (),
    )


def hold_out(rows: Sequence[Row], num_rows: int, *, seed: int) -> Integers:
    """Numbers of the ``train.held_out_rows`` training rows that are not trained on but choose the best adapter.

    Raises:
        DataError: there are not so many rows.
    """
    if not num_rows:
        return numpy.zeros(0, dtype=numpy.int64)
    return _set_aside(rows, {"train.held_out_rows": num_rows}, seed, silent)[0][0]


def sample_numbers(rows: Sequence[Row], max_rows: int, *, seed: int) -> Integers:
    """Numbers of at most ``max_rows`` rows in the order of the file, chosen by seed and prompt.

    Not the first ones: files are often sorted by label.
    """
    if len(rows) <= max_rows:
        return numpy.arange(len(rows))
    keys = numpy.fromiter((_key(normalize(row.prompt), seed) for row in rows), dtype="S16", count=len(rows))
    return numpy.sort(numpy.argsort(keys, kind="stable")[:max_rows])


def sample_rows(rows: Sequence[Row], max_rows: int, *, seed: int) -> list[Row]:
    """The rows of `sample_numbers`."""
    return list(take(rows, sample_numbers(rows, max_rows, seed=seed)))


CALIBRATION_ROWS = 128
"""Rows that suffice for E[xᵀx] of a layer's inputs (QERA, arXiv 2410.06040)."""


def calibration_rows(rows: Sequence[Row], *, held_out_rows: int, seed: int) -> list[Row]:
    """The training rows on which a quantized start is calibrated; never those that choose the best adapter.

    Raises:
        DataError: as in `hold_out`.
    """
    held_out = hold_out(rows, held_out_rows, seed=seed)
    kept = take(rows, numpy.setdiff1d(numpy.arange(len(rows)), held_out, assume_unique=True))
    return sample_rows(kept, CALIBRATION_ROWS, seed=seed)


def _set_aside(
    rows: Sequence[Row],
    asked: Mapping[str, int],
    seed: int,
    on_progress: OnProgress,
    ages: NDArray[numpy.float64] | None = None,
) -> tuple[tuple[Integers, ...], tuple[Integers, Integers]]:
    """Numbers of the rows that are set aside, ascending, for each setting; and of near duplicates with the earlier row.

    Of two settings the second, the reserve, has the first choice, from the other end of the order.
    """
    wanted, total, names = sum(asked.values()), len(rows), " + ".join(asked)
    if not 0 <= wanted < total:
        raise DataError(
            f"{names} is {wanted}, but there are {total} rows, and at least one is needed to "
            f"train; set it to 0..{total - 1} or add rows"
        )
    groups, keys, near = _groups(rows, seed, on_progress)
    if not wanted:
        return tuple(groups[:0] for _ in asked), near
    sizes = numpy.bincount(groups, minlength=total)
    order = _as_met(groups[numpy.argsort(keys, kind="stable")])
    (setting, evaluation_rows), *reserve = asked.items()
    kept = [_take_groups(order[::-1], sizes, number, name, total) for name, number in reserve]
    order = order if ages is None else _newest(groups, ages)
    free = order[~numpy.isin(order, kept[0])] if kept else order
    chosen = _take_groups(free, sizes, evaluation_rows, setting, total)
    return tuple(numpy.flatnonzero(numpy.isin(groups, each)) for each in (chosen, *kept)), near


def _take_groups(order: Integers, sizes: Integers, wanted: int, setting: str, total: int) -> list[int]:
    """The first groups that have ``wanted`` rows together, leaving out those that are too large for the rest."""
    chosen, count = list[int](), 0
    for group in order:
        if count == wanted:
            break
        if count + sizes[group] <= wanted:
            chosen.append(int(group))
            count += int(sizes[group])
    if count < wanted:
        raise DataError(
            f"{setting} is {wanted}, but only {count} of {total} rows can be set aside "
            "without leaving a near duplicate of them to train on; set data.near_duplicates to drop, or this lower"
        )
    return chosen


def _groups(
    rows: Sequence[Row], seed: int, on_progress: OnProgress
) -> tuple[Integers, Keys, tuple[Integers, Integers]]:
    """(R,) the first row of each row's group of duplicates and near duplicates, closed under chains of them.

    And (R,) the key of each row's prompt; and pairs of near duplicates, in order: a row, and the earlier one.
    """
    first, numbers = first_of(keys_of(rows)["normal"]), numpy.arange(len(rows))
    alone, repeats = numbers[first == numbers], numbers[first != numbers]
    keys: Keys = numpy.empty(len(alone), dtype="S16")

    def prompts() -> Iterator[str]:
        for at, row in enumerate(take(rows, alone)):
            prompt = normalize(row.prompt)
            keys[at] = _key(prompt, seed)
            yield prompt

    index = NearIndex(prompts(), on_progress=on_progress, num_texts=len(alone), normalized=True)
    parent, near = numpy.arange(len(alone)), list[tuple[int, int]]()

    def root(at: int) -> int:
        while parent[at] != at:
            parent[at] = at = int(parent[parent[at]])
        return at

    for at in index.candidates().tolist():
        for count, (other, _) in enumerate(index.near(at)):
            one, two = sorted((root(at), root(other)))
            parent[two] = one
            near += [(at, other)] if count == 0 else []
        index.add(at)
    for at in index.candidates().tolist():
        parent[at] = root(at)
    found = numpy.array(near, dtype=numpy.int64).reshape(-1, 2)
    later = numpy.concatenate([repeats, alone[found[:, 0]]])
    earlier = numpy.concatenate([first[repeats], alone[found[:, 1]]])
    order = numpy.argsort(later, kind="stable")
    place = numpy.searchsorted(alone, first)
    return alone[parent[place]], keys[place], (later[order], earlier[order])


def _newest(groups: Integers, ages: NDArray[numpy.float64]) -> Integers:
    """Groups by the age of their oldest row; groups of the same age in the order of the file."""
    oldest = numpy.zeros(len(groups))
    numpy.maximum.at(oldest, groups, ages)
    met = _as_met(groups)
    return met[numpy.argsort(oldest[met], kind="stable")]


def _as_met(values: Integers) -> Integers:
    """The distinct values, in order of appearance."""
    different, at = numpy.unique(values, return_index=True)
    return different[numpy.argsort(at, kind="stable")]


def split_key(prompt: str, seed: int) -> str:
    """Where a prompt's group stands in the order in which groups are set aside; hexadecimal."""
    return _digest(normalize(prompt), seed).hex()


def _key(normal: str, seed: int) -> bytes:
    """The first half of `split_key`, of a normalized prompt."""
    return _digest(normal, seed)[:16]


def _digest(normal: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\n{normal}".encode()).digest()


# Evaluation rows that the training rows already hold: exactly, after normalization, or nearly (MinHash).
#
# A model that has seen an evaluation prompt is not being evaluated. Prompts are compared (all before the last answer):
# the same question with another answer leaks too.


@dataclass(frozen=True, slots=True)
class Leak:
    """An evaluation row and the training row most like it; ``similarity`` is 1.0 unless ``kind`` is near."""

    kind: Literal["exact", "normalized", "near"]
    training_line: int
    evaluation_line: int
    similarity: float


def find_leaks(
    training: Sequence[Row],
    evaluation: Sequence[Row],
    *,
    threshold: float = NEAR,
    on_progress: OnProgress = silent,
) -> tuple[Leak, ...]:
    """At most one pair for each evaluation row, in their order: the first training row of the closest kind.

    Args:
        training: the rows that are searched.
        evaluation: the rows that are looked for.
        threshold: similarity of prompts that are nearly the same.
        on_progress: called with prompts compared and in all.
    """
    keys, wanted, count = keys_of(training), keys_of(evaluation), len(training)
    exact, normalized = (
        first_of(numpy.concatenate([keys[name], wanted[name]]))[count:] for name in ("prompt", "normal")
    )
    prompts = (row.prompt for row in chain(training, evaluation))
    index = NearIndex(
        prompts,
        num_texts=count + len(evaluation),
        one_of=slice(count, None) if len(evaluation) < count else slice(count),
        least=threshold,
        on_progress=on_progress,
    )
    index.add(slice(count))
    near: dict[int, tuple[int, float]] = {}
    candidates = index.candidates()
    for at in candidates[candidates >= count].tolist():
        if normalized[at - count] >= count:
            found = max(index.near(at, threshold=threshold), key=lambda pair: (pair[1], -pair[0]), default=None)
            near |= {at - count: found} if found else {}
    lines, wanted_lines = keys["line"], wanted["line"]
    at_fault = numpy.union1d(numpy.flatnonzero(normalized < count), numpy.array(sorted(near), dtype=numpy.int64))
    leaks: list[Leak] = []
    for at in at_fault.tolist():
        line = int(wanted_lines[at])
        if exact[at] < count:
            leaks.append(Leak("exact", int(lines[exact[at]]), line, 1.0))
        elif normalized[at] < count:
            leaks.append(Leak("normalized", int(lines[normalized[at]]), line, 1.0))
        else:
            other, similarity = near[at]
            leaks.append(Leak("near", int(lines[other]), line, similarity))
    return tuple(leaks)
