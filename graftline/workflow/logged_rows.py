"""Rows from a request log: answers that somebody reviewed, in a file that `data.source` takes as it is.

A person marks answers in a CSV file that `write_review` makes: ``verdict`` good or bad, or a better answer in
``correction``. Answers that nobody reviewed never become rows; those that users rated good do where that is asked for.
"""

import csv
import hashlib
import heapq
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from graftline.data.records import Record, read_records
from graftline.data.rows import Row, as_line, is_plain, rows_from_objects
from graftline.digest import atomic_write, of_json
from graftline.errors import DataError
from graftline.registry.request_log import LoggedRequest, LogPlace
from graftline.settings import Base

Rating = Literal["good", "bad"]

COLUMNS = (
    "prompt",
    "answer",
    "rating",
    "verdict",
    "correction",
    "finish_reason",
    "release",
    "time",
    "id",
    "content",
)
"""Of a review file. Only ``verdict``, ``correction``, ``id`` and ``content`` are read back."""
_READ = ("verdict", "correction", "id", "content")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class Review:
    """What a person said of an answer."""

    place: str
    """File and line."""
    content: str
    """Digest of what the person saw."""
    verdict: Rating
    correction: str
    """A better answer; empty: none."""


def write_review(place: LogPlace, path: Path, *, limit: int, reviewed: Iterable[str] = ()) -> int:
    """Write answers for a person to mark; returns how many.

    Those that users rated come first, then answers drawn by their ids' hashes; none twice.

    Args:
        place: the log.
        path: a new CSV file.
        limit: most answers.
        reviewed: ids of answers that were reviewed before.

    Raises:
        DataError: the file exists, or the log is not right.
    """
    if path.exists():
        raise DataError(f"{path} exists, perhaps with somebody's marks; give another name")
    ratings, before = _ratings(place), set(reviewed)
    drawn = heapq.nsmallest(
        limit,
        _distinct(one for one in _requests(place) if one.id not in before and one.ended == "answered"),
        key=lambda one: (one.id not in ratings, hashlib.sha256(one.id.encode()).digest()),
    )
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for one in drawn:
        shown = (_shown(one.prompt, one.messages, one.tools), _shown(None, [one.answer], []))
        about = (one.finish_reason or "", one.release, one.time.isoformat(timespec="seconds"), one.id, one.content)
        writer.writerow([_plain_cell(cell) for cell in (*shown, ratings.get(one.id, ""), "", "", *about)])
    with atomic_write(path) as out:
        # With a byte order mark, so that spreadsheets read UTF-8.
        out.write(text.getvalue().encode("utf-8-sig"))
    return len(drawn)


def read_reviews(paths: Iterable[Path]) -> dict[str, Review]:
    """What people said, by the answer's id; answers without a mark are left out.

    Raises:
        DataError: a file is not a review, or a mark is unknown or contradicts another; file and line are named.
    """
    found: dict[str, Review] = {}
    for path in paths:
        for record in read_records(path):
            if (review := _review(record)) is None:
                continue
            before = found.setdefault(record.value["id"].strip(), review)
            if (before.verdict, before.correction) != (review.verdict, review.correction):
                raise DataError(f"{review.place}: {before.place} says otherwise of the same answer; keep one of them")
    return found


def _review(record: Record) -> Review | None:
    value = record.value
    missing = [name for name in _READ if name not in value] if isinstance(value, dict) else list(_READ)
    if missing:
        raise DataError(
            f"{record.place}: {', '.join(missing)} missing; expected the columns of `graftline rows --review`, "
            "separated by commas"
        )
    verdict, correction = (str(value[name] or "").strip() for name in ("verdict", "correction"))
    verdict = verdict.lower()
    if verdict not in ("good", "bad", ""):
        raise DataError(f"{record.place}: verdict {verdict[:40]!r} was given; expected good, bad, or nothing")
    if verdict == "good" and correction:
        raise DataError(f"{record.place}: the answer is good and has a correction; expected one of them")
    if not verdict and not correction:
        return None
    # The correction as it was written: blanks around an answer may be meant.
    given = str(value["correction"] or "") if correction else ""
    return Review(str(record.place), str(value["content"]).strip(), "good" if verdict == "good" else "bad", given)


@dataclass
class Made:
    """Rows, and what did not become one."""

    rows: list[tuple[Row, dict[str, Any]]] = field(default_factory=list)
    """Each with its provenance."""
    left_out: Counter[str] = field(default_factory=Counter)
    """How many, by why."""


def make_rows(place: LogPlace, reviews: Mapping[str, Review], base: Base, *, rated: bool) -> Made:
    """Rows from what was reviewed.

    Args:
        place: the log.
        reviews: what people said, by id.
        base: its template decides what can be a row.
        rated: also take answers that users rated good and no reviewer calls bad.

    Raises:
        DataError: the log is not right, or an answer is another than the one that was reviewed.
    """
    ratings = _ratings(place) if rated else {}
    made, judged, known = Made(), list[tuple[LoggedRequest, str, str]](), set[str]()
    verdicts: dict[str, set[str]] = {}
    for one in _requests(place):
        review = reviews.get(one.id)
        if review is not None and review.content != one.content:
            raise DataError(f"{review.place}: answer {one.id} is not the one that was reviewed; review it again")
        if review is not None:
            known.add(one.id)
        by = "review" if review else "rating"
        verdict = "corrected" if review and review.correction else review.verdict if review else ratings.get(one.id)
        if verdict is not None:
            judged.append((one, verdict, by))
            verdicts.setdefault(one.content, set()).add(verdict)
    made.left_out["no longer in the log"] = len(reviews.keys() - known)
    seen: set[str] = set()
    for one, said, by in judged:
        correction = reviews[one.id].correction if said == "corrected" else None
        why = _why_not(one, said, verdicts[one.content], base)
        row = None if why else _row(one, correction)
        if isinstance(row, DataError):
            why = f"no row: {row}"
        elif row is not None:
            digest = str(of_json([as_line(row).decode()]))
            if digest not in seen:
                seen.add(digest)
                made.rows.append((row, _provenance(one, "correction" if correction else by)))
                continue
            why = "the same as another"
        made.left_out[str(why)] += 1
    return made


def _why_not(one: LoggedRequest, verdict: str, verdicts: set[str], base: Base) -> str | None:
    """Why a judged answer does not become a row; None if it may."""
    if verdict == "bad":
        return "bad"
    if verdict == "good" and "bad" in verdicts:
        return "called good and bad"
    if one.messages is None and base.template != "none":
        return "a plain completion, which the template would enclose"
    if verdict == "corrected":
        return None
    if one.ended != "answered":
        return "not answered to the end"
    if one.finish_reason == "length":
        return "cut at its length"
    return "with removed text in the answer" if one.removed_from_answer else None


def _row(one: LoggedRequest, correction: str | None) -> Row | DataError:
    """The row of an answer, or why it is none: earlier answers of the conversation are not learned."""
    asked = one.messages if one.messages is not None else [{"role": "user", "content": one.prompt}]
    before = [turn | {"weight": 0} if turn.get("role") == "assistant" else turn for turn in asked]
    answer = one.answer if correction is None else {"role": "assistant", "content": correction}
    value = {"messages": [*before, answer]} | ({"tools": one.tools} if one.tools else {})
    try:
        (row,) = rows_from_objects([value], origin=f"answer {one.id}", format="messages")
    except DataError as error:
        return error
    return row


def _provenance(one: LoggedRequest, by: str) -> dict[str, Any]:
    return {
        "log_id": one.id,
        "log_key": one.key,
        "log_release": one.release,
        "log_time": one.time.isoformat(),
        "log_review": by,
    }


def write_logged(path: Path, made: Made) -> None:
    """Write rows with their provenance: prompt and completion if each is only that, else messages.

    Raises:
        DataError: there are none, or the file exists.
    """
    if not made.rows:
        reasons = "; ".join(f"{why}: {number}" for why, number in made.left_out.items() if number)
        raise DataError(
            f"no reviewed answer can become a row ({reasons or 'none was reviewed'}); {path} is not written"
        )
    if path.exists():
        raise DataError(f"{path} exists; give another name, or remove it")
    plain = all(is_plain(row) for row, _ in made.rows)
    with atomic_write(path) as out:
        for row, provenance in made.rows:
            value = json.loads(as_line(row, plain=plain)) | provenance
            out.write((json.dumps(value, ensure_ascii=False) + "\n").encode())


def _requests(place: LogPlace) -> Iterator[LoggedRequest]:
    return (one for one in place.read() if isinstance(one, LoggedRequest))


def _ratings(place: LogPlace) -> dict[str, Rating]:
    """The last rating of each answer."""
    rated = [one for one in place.read() if one.kind == "rating"]
    return {one.id: one.rating for one in sorted(rated, key=lambda one: one.time)}


def _distinct(requests: Iterable[LoggedRequest]) -> Iterator[LoggedRequest]:
    seen: set[str] = set()
    for one in requests:
        if one.content not in seen:
            seen.add(one.content)
            yield one


def _shown(prompt: str | None, messages: list[dict[str, Any]] | None, tools: list[dict[str, Any]]) -> str:
    """What a reviewer reads: texts as they are, all else as JSON."""
    if prompt is not None:
        return prompt
    turns = messages or []
    told = [f"tools: {json.dumps(tools, ensure_ascii=False)}"] if tools else []
    for turn in turns:
        more = {name: value for name, value in turn.items() if name not in ("role", "content")}
        text = turn.get("content") or ""
        text += ("\n" * bool(text) + json.dumps(more, ensure_ascii=False)) if more else ""
        told.append(text if len(turns) == 1 and not tools else f"{turn.get('role')}: {text}")
    return "\n\n".join(told)


def _plain_cell(text: str) -> str:
    """A cell that no spreadsheet takes for a formula."""
    return "'" + text if text.startswith(_FORMULA) else text
