"""Rows that say the same twice or contradict each other: what is done about them before rows are set aside.

A moving source repeats itself sooner or later, and a line that runs at night must not stop for two rows in thousands.
Rows are the same here where every letter is: prompts that differ in case, width or white space may mean different
things.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from graftline.data.near import NearIndex, normalize
from graftline.data.rows import Message, Row
from graftline.data.split import Split
from graftline.digest import of_json
from graftline.logs import OnProgress, silent
from graftline.settings.model import Policy

Lines = tuple[tuple[int, int], ...]
"""Pairs of source lines: of a row, and of the earlier one that it repeats or contradicts."""


@dataclass(frozen=True)
class Screened:
    """``rows``: what is split. ``repeats``: rows that are kept although they repeat one of them. ``dropped``: the rest.

    ``dropped`` is by the setting that had them dropped; a contradiction's rows are all there, with the first of them.
    """

    rows: tuple[Row, ...]
    repeats: tuple[Row, ...]
    dropped: dict[str, Lines]


def contradiction_policy(given: Policy | None, labels: Sequence[str] | None) -> Policy:
    """What is done about contradictions: as ``given``, or where that is left out an error only with labels.

    Two references for one prompt are usual in generation, two labels contradict each other.
    """
    return given or ("keep" if labels is None else "error")


def text_key(row: Row) -> str:
    """The same for rows that are the same, letter by letter."""
    return _key(row, row.messages)


def prompt_key(row: Row) -> str:
    """The same for rows that ask the same, letter by letter."""
    return _key(row, row.messages[:-1])


def _key(row: Row, messages: Sequence[Message]) -> str:
    return of_json([row.tools, [[message.role, message.content] for message in messages]]).hex


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
        contradictions: rows that ask the same and answer differently: which one is right is not known, so all go.
        near_duplicates: rows whose prompts are nearly those of earlier rows (`graftline.data.split`).
        on_progress: called with prompts compared and in all, where near duplicates are dropped.
    """
    repeats = _repeats(rows)
    kept = [row for row in rows if row.source_line not in repeats] if duplicates != "error" else list(rows)
    dropped: dict[str, Lines] = {}
    if duplicates == "drop" and repeats:
        dropped["duplicates"] = tuple(repeats.items())
    if contradictions == "drop" and (found := _contradictions(kept)):
        dropped["contradictions"] = tuple(found.items())
        kept = [row for row in kept if row.source_line not in found]
    if near_duplicates == "drop" and (near := _near(kept, on_progress)):
        dropped["near_duplicates"] = tuple(near.items())
        kept = [row for row in kept if row.source_line not in near]
    lines = {row.source_line for row in kept}
    again = [row for row in rows if repeats.get(row.source_line) in lines] if duplicates == "keep" else []
    return Screened(tuple(kept), tuple(again), dropped)


def with_repeats(split: Split, repeats: Sequence[Row]) -> tuple[Split, Lines]:
    """Give the training side the repeats of its rows back, in the order of the file.

    Returns:
        The split, and which repeats stayed out because their first is set aside for evaluation.
    """
    trained = {text_key(row) for row in split.training}
    evaluated = {text_key(row): row.source_line for row in split.evaluation}
    out = tuple((row.source_line, evaluated[text_key(row)]) for row in repeats if text_key(row) in evaluated)
    back = [row for row in repeats if text_key(row) in trained]
    training = sorted([*split.training, *back], key=lambda row: row.source_line)
    return Split(tuple(training), split.evaluation, split.near), out


def _repeats(rows: Sequence[Row]) -> dict[int, int]:
    first: dict[str, int] = {}
    found = {row.source_line: first.setdefault(text_key(row), row.source_line) for row in rows}
    return {line: earlier for line, earlier in found.items() if line != earlier}


def _contradictions(rows: Sequence[Row]) -> dict[int, int]:
    by_prompt: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_prompt[prompt_key(row)].append(row)
    return {
        row.source_line: same[0].source_line
        for same in by_prompt.values()
        if len({row.answer.strip() for row in same}) > 1
        for row in same
    }


def _near(rows: Sequence[Row], on_progress: OnProgress) -> dict[int, int]:
    """Line by line, what is near an earlier row that stays: chains of near duplicates keep a row at each distance."""
    index, exact = NearIndex([row.prompt for row in rows], on_progress=on_progress), dict[str, int]()
    found: dict[int, int] = {}
    for at, row in enumerate(rows):
        key = normalize(row.prompt)
        near = next((rows[other].source_line for other, _ in index.near(at)), None)
        earlier = exact.get(key, near)
        if earlier is not None:
            found[row.source_line] = earlier
            continue
        exact[key] = row.source_line
        index.add(at)
    return found
