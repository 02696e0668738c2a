"""A run's release in the store: published, and looked for again.

DVC sees ``release.json`` only, and calls the release stage up to date whatever became of the release.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftline import settings
from graftline.address import store_address
from graftline.digest import write_json
from graftline.errors import ReleaseError
from graftline.logs import Reporter
from graftline.registry.binding import check_binding
from graftline.registry.cleanup import note_latest
from graftline.registry.releases import is_whole, publish, release_key
from graftline.registry.store import open_store
from graftline.release.manifest import Manifest, read_manifest
from graftline.workflow.workspace import Workspace

logger = logging.getLogger("graftline")


def publish_package(section: settings.Release, at: Workspace, *, package: Path, out: Path) -> None:
    """Publish a package, if its verdict is `pass`; ``out`` says where it lies then.

    To publish twice is no error: the second call finds everything.

    Raises:
        ReleaseError: the verdict is another, or the package does not say what was scored, or holds something else.
        StoreError: the store does not take it.
    """
    manifest = _check(package, at.name)
    store = open_store(store_address(section.store, at.root))
    manifest = publish(store, package, on_progress=Reporter("publish", "bytes"))
    note_latest(store, at.name, manifest.version)
    place = location(section, at.name, manifest.version)
    record = {"version": manifest.version, "location": place, "digest": str(manifest.digest)}
    write_json(out / "release.json", record)
    logger.info("release %s in %s", manifest.version, place)


def _check(package: Path, pipeline: str) -> Manifest:
    manifest = read_manifest(package)
    if manifest.verdict.outcome != "pass":
        raise ReleaseError(
            f"the gates' verdict on {pipeline} is {manifest.verdict.outcome}, expected pass; see "
            f"{package / 'report.html'}"
        )
    if manifest.judged is None:
        raise ReleaseError(
            f"{package} does not say which bytes were scored: an earlier version made it; package again: "
            f"dvc repro --force --single-item package@{pipeline}"
        )
    check_binding(manifest, lambda path: (package / path).read_bytes())
    return manifest


def is_in_store(section: settings.Release, record: Mapping[str, Any], at: Workspace) -> bool:
    """Whether the store holds the release that ``release.json`` names: cleaning up may have taken it.

    True too where the record names another store than the settings do now: DVC sees that by itself.
    """
    version = record.get("version")
    if version is None or record.get("location") != location(section, at.name, version):
        return True
    return is_whole(open_store(store_address(section.store, at.root)), at.name, version)


def keep(section: settings.Release, record: Mapping[str, Any], at: Workspace) -> None:
    """Say in the store that the release in ``release.json`` is the last run's: an earlier run may have published it."""
    if record.get("location") == location(section, at.name, record["version"]):
        note_latest(open_store(store_address(section.store, at.root)), at.name, record["version"])


def location(section: settings.Release, pipeline: str, version: str) -> str:
    """Where a version lies, as pipelines.yaml names the store: ``store/releases/<pipeline>/<version>``."""
    return f"{section.store}/{release_key(pipeline, version)}"
