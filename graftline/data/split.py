"""Training rows and evaluation rows kept apart: near duplicates, the split that respects them, and leakage found."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy
from numpy.typing import NDArray

from graftline.data.near import NEAR, NearIndex, normalize
from graftline.data.rows import Row
from graftline.errors import DataError
from graftline.logs import OnProgress, silent

# Rows set aside for evaluation, so that no row of one side has a duplicate or near duplicate on the other.
#
# Which rows are set aside depends on the seed and on the prompts, not on the order of the file: groups of duplicates
# are sorted by the SHA-256 of seed and prompt. When rows are added (a source that moves), most evaluation rows stay.


@dataclass(frozen=True, slots=True)
class Split:
    """Rows to train on and rows to evaluate with, each in the order of the file.

    ``near``: source lines of training rows whose prompts are nearly the same as an earlier one's, with that one's.
    """

    training: tuple[Row, ...]
    evaluation: tuple[Row, ...]
    near: tuple[tuple[int, int], ...] = ()


def split_rows(
    rows: Sequence[Row],
    evaluation_rows: int,
    *,
    seed: int,
    ages: Sequence[float] | None = None,
    on_progress: OnProgress = silent,
    setting: str = "data.evaluation_rows",
) -> Split:
    """Set ``evaluation_rows`` rows aside, whole groups of duplicates at a time.

    Args:
        rows: in the order of the file.
        evaluation_rows: how many to set aside.
        seed: decides which, with the prompts.
        ages: of each row; then the newest are set aside in place of those that ``seed`` draws. A row that nearly
            repeats an older one is as old as that: it is not new.
        on_progress: called with prompts compared and in all.
        setting: what errors call ``evaluation_rows``.

    Raises:
        DataError: there are not so many rows beside the ones to train on, or not without cutting a group.
    """
    chosen, near = _set_aside(rows, evaluation_rows, seed, on_progress, setting, ages)
    return Split(
        training=tuple(row for at, row in enumerate(rows) if at not in chosen),
        evaluation=tuple(row for at, row in enumerate(rows) if at in chosen),
        near=tuple((rows[at].source_line, rows[other].source_line) for at, other in near if at not in chosen),
    )


def _set_aside(
    rows: Sequence[Row],
    evaluation_rows: int,
    seed: int,
    on_progress: OnProgress,
    setting: str,
    ages: Sequence[float] | None = None,
) -> tuple[set[int], list[tuple[int, int]]]:
    """Numbers of the rows that are set aside, and pairs of near duplicates."""
    if not 0 <= evaluation_rows < len(rows):
        raise DataError(
            f"{setting} is {evaluation_rows}, but there are {len(rows)} rows, and at least one is needed to "
            f"train; set it to 0..{len(rows) - 1} or add rows"
        )
    chosen: set[int] = set()
    groups, near = _groups(rows, on_progress)
    drawn = ages is None
    for group in sorted(groups, key=lambda group: _order(rows, group, seed) if drawn else _oldest(ages or (), group)):
        if len(chosen) + len(group) <= evaluation_rows:
            chosen.update(group)
    if len(chosen) < evaluation_rows:
        raise DataError(
            f"{setting} is {evaluation_rows}, but only {len(chosen)} of {len(rows)} rows can be set aside "
            "without leaving a near duplicate of them to train on; set data.near_duplicates to drop, or this lower"
        )
    return chosen, near


def hold_out(rows: Sequence[Row], num_rows: int, *, seed: int) -> NDArray[numpy.int64]:
    """Numbers of the training rows that are not trained on but choose the best adapter, ``train.held_out_rows`` many.

    Raises:
        DataError: there are not so many rows.
    """
    chosen, _ = _set_aside(list(rows), num_rows, seed, silent, "train.held_out_rows") if num_rows else ((), ())
    return numpy.array(sorted(chosen), dtype=numpy.int64)


def sample_rows(rows: Sequence[Row], max_rows: int, *, seed: int) -> list[Row]:
    """At most ``max_rows`` rows in the order of the file, chosen by seed and prompt.

    Not the first ones: files are often sorted by label.
    """
    if len(rows) <= max_rows:
        return list(rows)
    chosen = sorted(range(len(rows)), key=lambda at: (_key(rows[at].prompt, seed), at))[:max_rows]
    return [rows[at] for at in sorted(chosen)]


def _groups(rows: Sequence[Row], on_progress: OnProgress) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Row indices grouped by duplicates and near duplicates, closed under chains of them; and the pairs, in order."""
    by_prompt: dict[str, list[int]] = {}
    for at, row in enumerate(rows):
        by_prompt.setdefault(normalize(row.prompt), []).append(at)
    prompts = list(by_prompt)
    parent = list(range(len(prompts)))

    def root(at: int) -> int:
        while parent[at] != at:
            parent[at] = at = parent[parent[at]]
        return at

    index = NearIndex(prompts, on_progress=on_progress)
    pairs: list[tuple[int, int]] = []
    for at, prompt in enumerate(prompts):
        first = by_prompt[prompt][0]
        pairs += [(again, first) for again in by_prompt[prompt][1:]]
        for count, (other, _) in enumerate(index.near(at)):
            parent[root(at)] = root(other)
            pairs += [(first, by_prompt[prompts[other]][0])] if count == 0 else []
        index.add(at)
    groups: dict[int, list[int]] = {}
    for at, prompt in enumerate(prompts):
        groups.setdefault(root(at), []).extend(by_prompt[prompt])
    return list(groups.values()), sorted(pairs)


def _order(rows: Sequence[Row], group: list[int], seed: int) -> str:
    return min(_key(rows[at].prompt, seed) for at in group)


def _oldest(ages: Sequence[float], group: list[int]) -> float:
    return max(ages[at] for at in group)


def _key(prompt: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}\n{normalize(prompt)}".encode()).hexdigest()


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


def find_leaks(training: Sequence[Row], evaluation: Sequence[Row], *, threshold: float = NEAR) -> tuple[Leak, ...]:
    """At most one pair for each evaluation row, in their order: the first training row of the closest kind."""
    exact: dict[str, int] = {}
    normalized: dict[str, int] = {}
    for row in training:
        exact.setdefault(row.prompt, row.source_line)
        normalized.setdefault(normalize(row.prompt), row.source_line)
    index = NearIndex([row.prompt for row in (*training, *evaluation)])
    for at in range(len(training)):
        index.add(at)
    leaks: list[Leak] = []
    for at, row in enumerate(evaluation, start=len(training)):
        if row.prompt in exact:
            leaks.append(Leak("exact", exact[row.prompt], row.source_line, 1.0))
        elif (key := normalize(row.prompt)) in normalized:
            leaks.append(Leak("normalized", normalized[key], row.source_line, 1.0))
        elif found := max(index.near(at, threshold=threshold), key=lambda pair: (pair[1], -pair[0]), default=None):
            leaks.append(Leak("near", training[found[0]].source_line, row.source_line, found[1]))
    return tuple(leaks)
