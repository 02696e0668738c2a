"""Is what a run released still in the store? DVC sees ``release.json`` only, and calls the release stage up to date."""

from collections.abc import Mapping
from typing import Any

from graftline.registry.named import note_latest
from graftline.registry.releases import is_whole
from graftline.registry.store import open_store
from graftline.workflow.resolve import location, store_url
from graftline.workflow.stage import Context


def is_in_store(context: Context, record: Mapping[str, Any]) -> bool:
    """Whether the store holds the release that ``release.json`` names: cleaning up may have taken it.

    True too where the record names another store than the settings do now: DVC sees that by itself.
    """
    version = record.get("version")
    if version is None or record.get("location") != location(context, version):
        return True
    return is_whole(open_store(store_url(context)), context.name, version)


def keep(context: Context, record: Mapping[str, Any]) -> None:
    """Say in the store that the release in ``release.json`` is the last run's: an earlier run may have published it."""
    if record.get("location") == location(context, record["version"]):
        note_latest(open_store(store_url(context)), context.name, record["version"])
