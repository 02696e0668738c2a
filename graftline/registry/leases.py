"""Leases: a running server says which release it serves, so that nobody cleans it away.

``leases/<pipeline>/<holder>.json`` names a version and until when. A server writes it when it loads a release and again
well before it ends; one that died stops counting by itself.
"""

import logging
from datetime import datetime
from typing import ClassVar, Literal

from pydantic import AwareDatetime

from graftline.errors import ReleaseError
from graftline.registry.objects import check_name
from graftline.registry.store import Store
from graftline.release.record import Record

_LOG = logging.getLogger(__name__)


class Lease(Record):
    """One server's use of one release."""

    kind: ClassVar[str] = "lease"
    format: Literal[1] = 1
    holder: str
    version: str
    until: AwareDatetime


def hold(store: Store, pipeline: str, lease: Lease) -> None:
    """Say that ``lease.holder`` uses a release; its lease before is replaced."""
    store.put_bytes(f"{_folder(pipeline)}/{check_name('holder', lease.holder)}.json", lease.to_bytes())


def held_versions(store: Store, pipeline: str, *, now: datetime) -> dict[str, str]:
    """Versions in use, with one holder each."""
    held: dict[str, str] = {}
    for key in store.list(_folder(pipeline)):
        try:
            lease = Lease.parse(store.get(key) or b"")
        except ReleaseError as error:
            _LOG.warning("%s/%s is no lease: %s", store.url, key, error)
            continue
        if lease.until > now:
            held[lease.version] = lease.holder
    return held


def _folder(pipeline: str) -> str:
    return f"leases/{check_name('pipeline', pipeline)}"
