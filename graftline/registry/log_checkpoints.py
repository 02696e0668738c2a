"""Checkpoints of a channel's log: copies of its entries, a hundred to an object, so that long histories read quickly.

``checkpoints/<pipeline>/<channel>/0000000100.json`` holds entries 1 to 100, ``0000000200.json`` entries 101 to 200. The
log itself is unchanged and can be used without checkpoints. A checkpoint can be verified: its entries form a chain, and
the next entry of the log names the last of them. A missing or damaged checkpoint is ignored, and its entries are read
one by one. A valid one that differs from the log is an error: one of the two was changed.

```python
log = recall(store, "demo", "production")   # 10,000 entries in 211 requests instead of 10,011
channel.append(store, channel.next_entry(log, change))
keep(store, log)                            # writes the checkpoints that are missing
```
"""

import logging
from typing import ClassVar, Literal

from graftline.errors import GraftlineError, HistoryLostError, StoreError
from graftline.registry import channel
from graftline.registry.channel import Entry, Log, checkpoint_folder
from graftline.registry.store import Store
from graftline.release.manifest import Record

ENTRIES = 100
"""In one checkpoint: 100 to 200 KB, read as quickly as a single entry."""

_LOG = logging.getLogger(__name__)


class Checkpoint(Record):
    """A hundred entries of one channel."""

    kind: ClassVar[str] = "log checkpoint"
    format: Literal[1] = 1
    entries: tuple[Entry, ...]


def recall(store: Store, pipeline: str, name: str) -> Log:
    """Read a channel's whole history with the help of its checkpoints.

    Every entry's digest is checked against the entry after it, up to the log's own newest entries, so the result is
    what was written. An old entry that was changed in the log alone is not noticed; `channel.read` reads every entry.

    Raises:
        StoreError: as `channel.read`.
        HistoryLostError: the log ends before its checkpoints do, or holds other entries.
    """
    known = _read_checkpoints(store, pipeline, name)
    try:
        log = channel.read(store, pipeline, name, known=known)
    except HistoryLostError:
        raise
    except StoreError:
        if not known:
            raise
        log = channel.read(store, pipeline, name)  # names the broken entry, if it is the log that is broken
    number = next((kept.number for kept, entry in zip(known, log.entries, strict=False) if kept != entry), None)
    if number is not None:
        raise HistoryLostError(
            f"{store.url}: entry {number} of {pipeline}/{name} is another than the one that its checkpoint in "
            f"{checkpoint_folder(pipeline, name)} holds: one of them was changed afterwards, nothing is promoted on "
            "it; compare both with a copy, then restore the entry or remove the checkpoint"
        )
    return log


def keep(store: Store, log: Log) -> None:
    """Write the missing checkpoints of a verified log. Nothing depends on them: a failure is logged only."""
    folder = checkpoint_folder(log.pipeline, log.channel)
    try:
        there = set(store.list(folder)) if len(log.entries) >= ENTRIES else set()
        for last in range(ENTRIES, len(log.entries) + 1, ENTRIES):
            if (key := f"{folder}/{last:010d}.json") not in there:
                store.create(key, Checkpoint(entries=log.entries[last - ENTRIES : last]).to_bytes())
    except GraftlineError as error:
        _LOG.warning("no checkpoint of %s/%s was written: %s", log.pipeline, log.channel, error)


def _read_checkpoints(store: Store, pipeline: str, name: str) -> tuple[Entry, ...]:
    """The verified entries from number 1 on that checkpoints hold."""
    folder, entries = checkpoint_folder(pipeline, name), list[Entry]()
    try:
        while (data := store.get(f"{folder}/{len(entries) + ENTRIES:010d}.json")) is not None:
            found = Checkpoint.parse(data).entries
            if len(found) != ENTRIES or not _is_chain(found, entries[-1] if entries else None, pipeline, name):
                raise StoreError(f"it does not hold the entries from {len(entries) + 1} on")
            entries += found
    except GraftlineError as error:
        # S3 roles from before there were checkpoints do not allow to read them.
        _LOG.warning("a checkpoint in %s/%s is not used: %s", store.url, folder, error)
    return tuple(entries)


def _is_chain(entries: tuple[Entry, ...], before: Entry | None, pipeline: str, name: str) -> bool:
    """Whether these entries of a channel follow ``before`` and each other."""
    for entry in entries:
        expected = (pipeline, name, before.number + 1 if before else 1, before.digest if before else None)
        if (entry.pipeline, entry.channel, entry.number, entry.previous) != expected:
            return False
        before = entry
    return True
