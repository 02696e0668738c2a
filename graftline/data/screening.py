"""Rows that say the same twice or contradict each other: what is done about them before rows are set aside.

A moving source repeats itself sooner or later, and a line that runs at night must not stop for two rows in thousands.
Rows are the same here where every letter is: prompts that differ in case, width or white space may mean different
things.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy

from graftline.data.near import NearIndex
from graftline.data.row_file import in_order, keys_of, take
from graftline.data.row_keys import Integers, RowKeys, first_of, opposite_of, pairs
from graftline.data.rows import Row
from graftline.data.split import Split
from graftline.logs import OnProgress, silent
from graftline.settings.data import Policy

Lines = tuple[tuple[int, int], ...]
"""Pairs of source lines: of a row, and of the earlier one that it repeats or contradicts."""


@dataclass(frozen=True)
class Screened:
    """``rows``: what is split. ``repeats``: rows that are kept although they repeat one of them. ``dropped``: the rest.

    ``dropped`` is by the setting that had them dropped; a contradiction's rows are all there, with the first of them.
    """

    rows: Sequence[Row]
    repeats: Sequence[Row]
    dropped: dict[str, Lines]


def contradiction_policy(given: Policy | None, labels: Sequence[str] | None) -> Policy:
    """What is done about contradictions: as ``given``, or where that is left out an error only with labels.

    Two references for one prompt are usual in generation, two labels contradict each other.
    """
    return given or ("keep" if labels is None else "error")


def screen(
    rows: Sequence[Row],
    *,
    duplicates: Policy,
    contradictions: Policy,
    near_duplicates: Literal["drop", "keep"] = "keep",
    on_progress: OnProgress = silent,
) -> Screened:
    """Drop what the settings say; what they call an error stays, for the checks of `graftline.data.checks` to name.

    Args:
        rows: in the order of the file; of rows that repeat each other the first stays.
        duplicates: rows that are the same. ``keep`` sets them apart, since an evaluation must not count an item twice.
        contradictions: rows that ask the same and answer differently, and pairs that prefer the same two answers in
            opposite order: which one is right is not known, so all go.
        near_duplicates: rows whose prompts are nearly those of earlier rows (`graftline.data.split`).
        on_progress: called with prompts compared and in all, where near duplicates are dropped.
    """
    keys = keys_of(rows)
    lines, first, numbers = keys["line"], first_of(keys["text"]), numpy.arange(len(rows))
    repeats = numbers[first != numbers]
    kept = numbers if duplicates == "error" else numbers[first == numbers]
    dropped: dict[str, Lines] = {}
    if duplicates == "drop" and len(repeats):
        dropped["duplicates"] = pairs(lines, repeats, first[repeats])
    if contradictions == "drop":
        at_fault, earlier = _contradictions(keys, kept)
        if len(at_fault):
            dropped["contradictions"] = pairs(lines, at_fault, earlier)
            kept = numpy.setdiff1d(kept, at_fault, assume_unique=True)
    if near_duplicates == "drop":
        at_fault, earlier = _near(take(rows, kept), on_progress)
        if len(at_fault):
            dropped["near_duplicates"] = pairs(lines, kept[at_fault], kept[earlier])
            kept = numpy.delete(kept, at_fault)
    again = repeats[numpy.isin(first[repeats], kept)] if duplicates == "keep" else repeats[:0]
    return Screened(take(rows, kept), take(rows, again), dropped)


def with_repeats(split: Split, repeats: Sequence[Row]) -> tuple[Split, Lines]:
    """Give the training side the repeats of its rows back, in the order of the file.

    Returns:
        The split, and which repeats stayed out because their first is set aside.
    """
    if not repeats:
        return split, ()
    keys, line_of = keys_of(repeats), dict[bytes, int]()
    for side in (split.evaluation, split.reserve):
        aside = keys_of(side)
        line_of |= zip(aside["text"].tolist(), aside["line"].tolist(), strict=True)
    out = tuple(
        (line, line_of[text])
        for line, text in zip(keys["line"].tolist(), keys["text"].tolist(), strict=True)
        if text in line_of
    )
    back = numpy.flatnonzero(numpy.isin(keys["text"], keys_of(split.training)["text"]))
    return replace(split, training=in_order(split.training, take(repeats, back))), out


def _contradictions(keys: RowKeys, kept: Integers) -> tuple[Integers, Integers]:
    """Numbers of the rows among ``kept`` that contradict another one, and of each the first that asks the same.

    Pairs of one prompt do so where they prefer the same two answers in opposite order.
    """
    if keys.of_pairs:
        other = opposite_of(*(keys[name][kept] for name in ("question", "answer", "rejected")))
        at_fault = numpy.flatnonzero(other != numpy.arange(len(kept)))
        return kept[at_fault], kept[other[at_fault]]
    answers, first = keys["answer"][kept], first_of(keys["question"][kept])
    at_fault = numpy.flatnonzero(numpy.isin(first, first[answers != answers[first]]))
    at_fault = at_fault[numpy.argsort(first[at_fault], kind="stable")]
    return kept[at_fault], kept[first[at_fault]]


def _near(rows: Sequence[Row], on_progress: OnProgress) -> tuple[Integers, Integers]:
    """Numbers of rows that are near an earlier row that stays, and of that: chains keep a row at each distance."""
    index = NearIndex((row.prompt for row in rows), num_texts=len(rows), on_progress=on_progress)
    first, numbers = first_of(keys_of(rows)["normal"]), numpy.arange(len(rows))
    found: dict[int, int] = {}
    # Rows unlike any other stay, whatever happens to the rest.
    for at in numpy.union1d(index.candidates(), numbers[first != numbers]).tolist():
        near = next((other for other, _ in index.near(at)), None)
        earlier = int(first[at]) if first[at] != at and int(first[at]) not in found else near
        if earlier is None:
            index.add(at)
        else:
            found[at] = earlier
    at_fault = numpy.array(sorted(found), dtype=numpy.int64)
    return at_fault, numpy.array([found[at] for at in at_fault.tolist()], dtype=numpy.int64)
