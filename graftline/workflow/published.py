"""A run's release in the store: publish it, and check later that it is still there.

DVC only tracks ``release.json``, so that for DVC the release stage stays up to date if the store loses the release.
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
    """Publish a package if its verdict is `pass`, and write its location into ``out``; repeating it is harmless.

    Raises:
        ReleaseError: the gates did not pass, or the package does not contain what was scored.
        StoreError: the store cannot be written.
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
    """Whether the store still holds the release in ``release.json``, which a clean-up may have removed.

    Also True if the settings now name another store: DVC notices that change.
    """
    version = record.get("version")
    if version is None or record.get("location") != location(section, at.name, version):
        return True
    return is_whole(open_store(store_address(section.store, at.root)), at.name, version)


def keep(section: settings.Release, record: Mapping[str, Any], at: Workspace) -> None:
    """Mark the release in ``release.json`` as the latest in the store: an earlier run may have published it."""
    if record.get("location") == location(section, at.name, record["version"]):
        note_latest(open_store(store_address(section.store, at.root)), at.name, record["version"])


def location(section: settings.Release, pipeline: str, version: str) -> str:
    """A version's location in the store that pipelines.yaml names: ``store/releases/<pipeline>/<version>``."""
    return f"{section.store}/{release_key(pipeline, version)}"
