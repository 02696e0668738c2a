"""Releases that something names besides channels and servers, so that cleaning up leaves them.

``latest/<pipeline>.json`` in the store names what the last run released: it waits for a person; no channel has it yet.
Approvals name a release that may enter a channel any day. A project names more: references of its evaluation, and what
its last run was compared with.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from graftline.errors import ReleaseError, StoreError
from graftline.registry import channel
from graftline.registry.objects import check_name, is_name
from graftline.registry.store import Store
from graftline.release.record import Record

_LOG = logging.getLogger(__name__)


class Latest(Record):
    """The release of a pipeline's last run."""

    kind: ClassVar[str] = "record of the latest release"
    format: Literal[1] = 1
    version: str


def note_latest(store: Store, pipeline: str, version: str) -> None:
    """Say that the pipeline's last run released this version."""
    data = Latest(version=version).to_bytes()
    if store.get(_key(pipeline)) != data:
        store.put_bytes(_key(pipeline), data)


def named_in_store(store: Store, pipeline: str) -> dict[str, str]:
    """Versions that wait for something, and for what.

    Raises:
        ReleaseError: the record of the latest release is damaged, so it is not known which one must stay.
        StoreError: the store cannot be read.
    """
    named = dict(_approved(store, pipeline))
    if (data := store.get(_key(pipeline))) is not None:
        try:
            named[Latest.parse(data).version] = "released by the last run"
        except ReleaseError as error:
            raise ReleaseError(
                f"{store.url}/{_key(pipeline)} names what the last run released and cannot be read ({error}); release "
                "again, or remove it if nothing waits for its promotion"
            ) from error
    return named


def named_in_project(root: Path, pipeline: str, references: tuple[str, ...]) -> dict[str, str]:
    """Versions that a project's settings and the records of its last run name, and where.

    Args:
        root: the folder of pipelines.yaml.
        pipeline: the pipeline.
        references: its ``evaluate.references``.

    Raises:
        StoreError: a record cannot be read, so it is not known what it names.
    """
    named = {version: "named by evaluate.references" for version in references}
    for name, path in _RECORDS.items():
        version = _read(root / "runs" / pipeline / name, path)
        if version is not None:
            named.setdefault(version, f"named by runs/{pipeline}/{name}")
    return named


_RECORDS: Mapping[str, tuple[str, ...]] = {
    ".work/last.json": ("version",),
    ".work/resolved.json": ("champion", "version"),
    "resolved.json": ("champion", "version"),
    "release/release.json": ("version",),
}
"""Records of the last run, and of the one under way, below ``runs/<pipeline>``; where in them a version is named."""


def _version_in(record: Any, keys: tuple[str, ...]) -> str | None:
    """The version that a record names; None if it says that there is none."""
    for key in keys:
        if not isinstance(record, dict):
            raise ValueError(f"{record!r} instead of an object with {key}")
        record = record.get(key)
        if record is None:
            return None
    if not isinstance(record, str):
        raise ValueError(f"{record!r} instead of a version")
    return record


def _read(path: Path, keys: tuple[str, ...]) -> str | None:
    try:
        return _version_in(json.loads(path.read_text(encoding="utf-8")), keys)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StoreError(
            f"cannot read {path} ({error}), so which releases it names is not known; remove the file if nobody needs it"
        ) from error


def _approved(store: Store, pipeline: str) -> Iterator[tuple[str, str]]:
    """Versions approved for a channel that are newer than what it holds."""
    folder = f"approvals/{check_name('pipeline', pipeline)}"
    for key in store.list(folder):
        name, _, rest = key.removeprefix(f"{folder}/").partition("/")
        version, is_folder, _ = rest.partition("/")
        if not (is_folder and is_name(name) and is_name(version)):
            _LOG.warning("%s/%s is no approval; it is left alone", store.url, key)
            continue
        head = channel.head(store, pipeline, name)
        if head is None or version > head.change.version:
            yield version, f"approved for {name}"


def _key(pipeline: str) -> str:
    return f"latest/{check_name('pipeline', pipeline)}.json"
