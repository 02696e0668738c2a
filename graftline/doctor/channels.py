"""What the doctor says about the channels: whether their histories verify, and reach as far as they did."""

from collections.abc import Iterator
from pathlib import Path

from graftline import settings
from graftline.data.sources import default_cache
from graftline.doctor.finding import Finding
from graftline.errors import GraftlineError, HistoryLostError, StoreError
from graftline.registry import channel
from graftline.registry.store import open_store


def look(root: Path) -> Iterator[Finding]:
    """The newest entries of every channel that a pipeline's store has, or had when this machine last looked."""
    try:
        loaded = settings.load(root / settings.DEFAULT_FILE)
    except GraftlineError:
        return  # told by the project's own finding
    for pipeline in loaded.names:
        yield from _channels(loaded, pipeline, default_cache(root) / "seen")


def _channels(loaded: settings.Config, pipeline: str, seen: Path) -> Iterator[Finding]:
    try:
        store = open_store(loaded.store_url(pipeline), seen=seen)
        names = channel.names(store, pipeline)
    except StoreError:
        return  # a store that cannot be read is told by its own finding
    for name in names:
        try:
            head = channel.head(store, pipeline, name)
        except HistoryLostError as error:
            yield Finding(
                f"channel {pipeline}@{name}", "missing", str(error), "docs/runbooks.md, restore a lost channel"
            )
        except GraftlineError as error:
            yield Finding(f"channel {pipeline}@{name}", "missing", str(error), "graftline history says more")
        else:
            found = f"{head.change.version}, entry {head.number}" if head else "empty"
            yield Finding(f"channel {pipeline}@{name}", "ok", found)
