"""Rows set aside for evaluation, so that no row of one side has a duplicate or near duplicate on the other.

Which rows are set aside depends on the seed and on the prompts, not on the order of the file: groups of duplicates are
sorted by the SHA-256 of seed and prompt. When rows are added (a source that moves), most evaluation rows stay.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from graftline.data.formats import Row
from graftline.data.similarity import NearIndex, normalize
from graftline.errors import DataError
from graftline.progress import OnProgress, silent


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
    on_progress: OnProgress = silent,
    setting: str = "data.evaluation_rows",
) -> Split:
    """Set ``evaluation_rows`` rows aside, whole groups of duplicates at a time; errors call that number ``setting``.

    Raises:
        DataError: there are not so many rows beside the ones to train on, or not without cutting a group.
    """
    if not 0 <= evaluation_rows < len(rows):
        raise DataError(
            f"{setting} is {evaluation_rows}, but there are {len(rows)} rows, and at least one is needed to "
            f"train; set it to 0..{len(rows) - 1} or add rows"
        )
    chosen: set[int] = set()
    groups, near = _groups(rows, on_progress)
    for group in sorted(groups, key=lambda group: _order(rows, group, seed)):
        if len(chosen) + len(group) <= evaluation_rows:
            chosen.update(group)
    if len(chosen) < evaluation_rows:
        raise DataError(
            f"{setting} is {evaluation_rows}, but only {len(chosen)} of {len(rows)} rows can be set aside "
            "without leaving a near duplicate of them to train on; set data.near_duplicates to drop, or this lower"
        )
    return Split(
        training=tuple(row for at, row in enumerate(rows) if at not in chosen),
        evaluation=tuple(row for at, row in enumerate(rows) if at in chosen),
        near=tuple((rows[at].source_line, rows[other].source_line) for at, other in near if at not in chosen),
    )


def hold_out(rows: Sequence[Row], num_rows: int, *, seed: int) -> tuple[Sequence[Row], Sequence[Row]]:
    """Of the training rows: those to train on, and ``train.held_out_rows`` that choose the best adapter.

    Raises:
        DataError: there are not so many rows.
    """
    if not num_rows:
        return rows, ()
    split = split_rows(rows, num_rows, seed=seed, setting="train.held_out_rows")
    return split.training, split.evaluation


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


def _key(prompt: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}\n{normalize(prompt)}".encode()).hexdigest()
