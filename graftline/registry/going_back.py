"""Which release a channel goes back to.

By default to the newest one that is good: that the channel held, that is not there now, and that nobody has gone back
from. So two people who roll back the same bad release do not undo each other, and who goes back further never meets
the release that was bad first.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice

from graftline.errors import PromotionError
from graftline.plain_text import one_line
from graftline.registry.channel import Entry

RECENT = timedelta(hours=1)
"""For this long after a rollback another one is taken for the same person's, or a colleague's, second look."""
_SHOWN = 3


class Replayed:
    """Entries that are read when they are first asked for, and can be gone through again."""

    def __init__(self, entries: Iterator[Entry]) -> None:
        self._entries, self._read = entries, list[Entry]()

    def __iter__(self) -> Iterator[Entry]:
        number = 0
        while number < len(self._read) or self._read_another():
            yield self._read[number]
            number += 1

    def _read_another(self) -> bool:
        entry = next(self._entries, None)
        if entry is not None:
            self._read.append(entry)
        return entry is not None


@dataclass(frozen=True)
class Held:
    """An entry of a channel, and the rollback that left it, if that is the last thing that happened to its release."""

    entry: Entry
    left_by: Entry | None


def held(entries: Iterable[Entry]) -> Iterator[Held]:
    """Each release once, by the newest entry that holds it, from the entries newest first."""
    known, following = set[str](), None
    for entry in entries:
        if entry.change.version not in known:
            known.add(entry.change.version)
            is_left = following is not None and following.change.action == "rollback"
            yield Held(entry, following if is_left else None)
        following = entry


def choose(entries: Iterable[Entry], version: str | None) -> tuple[Entry, Held]:
    """The channel's newest entry, and the one to go back to; the same one if it holds ``version`` already.

    Args:
        entries: newest first; no more are asked for than are needed.
        version: release that is wanted; None: the newest good one.

    Raises:
        PromotionError: there is none.
    """
    releases = held(entries)
    head, passed = next(releases).entry, list[Held]()
    if head.change.version == version:
        return head, Held(head, None)
    for one in releases:
        if one.entry.change.version == version or (version is None and one.left_by is None):
            return head, one
        passed.append(one)
    name, now = f"channel {head.channel!r} of {head.pipeline!r}", one_line(head.change.version)
    if version:
        known = ", ".join([now, *(one_line(one.entry.change.version) for one in passed)])
        raise PromotionError(f"{name} never held release {version!r}; it held {known}")
    if not passed:
        raise PromotionError(f"{name} never held any other release; it held {now}")
    raise PromotionError(
        f"{name} holds {now}, and every other release that it held was gone back from: {_list(passed)}; name one with "
        "--to VERSION if it is wanted all the same, or promote a new one"
    )


def refuse_second(entries: Iterable[Entry], now: datetime) -> None:
    """Refuse to go back further by default right after somebody has gone back, and say what that did.

    Raises:
        PromotionError: the newest entry is a rollback that is younger than an hour.
    """
    newest = tuple(islice(entries, 2))
    if len(newest) < 2 or newest[0].change.action != "rollback" or now - newest[0].change.time >= RECENT:
        return
    head, before = newest
    minutes = max(0, int((now - head.change.time).total_seconds() // 60))
    raise PromotionError(
        f"{head.channel} of {head.pipeline} was rolled back {minutes} min ago by {one_line(head.change.actor)} (entry "
        f"{head.number}), from {one_line(before.change.version)} to {one_line(head.change.version)}: "
        f"{one_line(head.change.reason)}. It holds {one_line(head.change.version)} now and nothing more was done. If "
        "that release is bad as well, go back further with --again, or to another with --to VERSION"
    )


def others(entries: Iterable[Entry], than: Entry) -> str:
    """What else can be named with ``--to``, in words; empty if there is nothing."""
    releases = islice(held(entries), 1, 20)
    found = [one for one in releases if one.entry.change.version != than.change.version]
    return _list(found[:_SHOWN])


def _list(found: list[Held]) -> str:
    return ", ".join(
        f"{one_line(one.entry.change.version)} (entry {one.entry.number}"
        + (f", gone back from in entry {one.left_by.number})" if one.left_by else ")")
        for one in found
    )
