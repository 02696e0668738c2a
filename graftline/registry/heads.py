"""Signed, dated and expiring statements that an entry is its channel's newest (as TUF's timestamp role).

Every `sign` replaces ``heads/<pipeline>/<channel>/newest.json``. It protects a reader that sees the channel for the
first time from being shown an old state of it. ``heads/<pipeline>/<channel>/0000000042.json`` is the first statement
about entry 42: it proves by when the entry existed, which the key that signed the entry no longer proves once somebody
else may have it.
"""

import logging
from datetime import datetime, timedelta
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import AwareDatetime

from graftline.errors import GraftlineError, PromotionError, ReleaseError, StoreUnavailableError
from graftline.registry.channel import Entry
from graftline.registry.keys import TIMESTAMP, KeyRing
from graftline.registry.objects import check_name
from graftline.registry.policy import TOLERANCE
from graftline.registry.store import Store
from graftline.release.manifest import DigestText, Record
from graftline.release.signing import is_signed, sign_statement

_PAYLOAD_TYPE = b"application/vnd.graftline.head+json"
_LOG = logging.getLogger(__name__)


class Head(Record):
    """The statement that is signed."""

    kind: ClassVar[str] = "head"
    format: Literal[1] = 1
    pipeline: str
    channel: str
    number: int
    entry: DigestText
    """Digest of the newest entry."""
    time: AwareDatetime
    expires: AwareDatetime
    signer: str
    """Name of the key in the key ring."""


class SignedHead(Record):
    """A head and its signature."""

    kind: ClassVar[str] = "signed head"
    statement: Head
    signature: str


def sign(
    store: Store, newest: Entry, *, keys: KeyRing, private_key: Path, now: datetime, valid: timedelta
) -> SignedHead:
    """State that an entry is its channel's newest now. The caller must have verified the channel.

    Raises:
        PromotionError: the key is not in the key file, has ended, or lacks the role ``timestamp``.
        ReleaseError: the private key cannot be read or is of the wrong kind.
    """
    secret, key = keys.own(private_key, now=now)
    if TIMESTAMP not in key.roles:
        raise PromotionError(
            f"the key {key.name} has the roles {', '.join(key.roles) or 'none'}; to state what a channel's newest "
            f"entry is it needs {TIMESTAMP!r}: add it in keys.yaml by pull request, or use another key"
        )
    time = now.replace(microsecond=0)
    statement = Head(
        pipeline=newest.pipeline,
        channel=newest.channel,
        number=newest.number,
        entry=newest.digest,
        time=time,
        expires=time + valid,
        signer=key.name,
    )
    head = SignedHead(statement=statement, signature=sign_statement(secret, _PAYLOAD_TYPE, statement.to_bytes()))
    folder = _folder(newest.pipeline, newest.channel)
    if proved(store, newest, keys=keys, now=now) is None:
        store.put_bytes(f"{folder}/{newest.number:010d}.json", head.to_bytes())
    store.put_bytes(f"{folder}/newest.json", head.to_bytes())
    return head


def newest(store: Store, pipeline: str, channel: str, *, keys: KeyRing, now: datetime) -> Head | None:
    """The last statement about a channel, even an expired one, if its key still counts."""
    return _read(store, f"{_folder(pipeline, channel)}/newest.json", pipeline, channel, keys=keys, now=now)


def proved(store: Store, entry: Entry, *, keys: KeyRing, now: datetime) -> datetime | None:
    """A time by which an entry existed, by the first statement about it; None if there is none that counts."""
    key = f"{_folder(entry.pipeline, entry.channel)}/{entry.number:010d}.json"
    found = _read(store, key, entry.pipeline, entry.channel, keys=keys, now=now)
    return found.time if found and found.entry == entry.digest else None


def _read(store: Store, key: str, pipeline: str, channel: str, *, keys: KeyRing, now: datetime) -> Head | None:
    try:
        data = store.get(key)
    except StoreUnavailableError:
        raise
    except GraftlineError as error:
        # S3 roles from before there were heads may not read them.
        _LOG.warning("%s/%s is not read: %s", store.url, key, error)
        return None
    if data is None:
        return None
    try:
        head = SignedHead.parse(data)
    except ReleaseError as error:
        _LOG.warning("%s/%s does not count: %s", store.url, key, error)
        return None
    statement, signer = head.statement, keys.keys.get(head.statement.signer)
    problem = None
    if (statement.pipeline, statement.channel) != (pipeline, channel):
        problem = f"it is about {statement.pipeline}/{statement.channel}"
    elif signer is None or TIMESTAMP not in signer.roles or signer.has_expired(now):
        problem = f"{statement.signer!r} is not a key with the role {TIMESTAMP!r} now"
    elif not is_signed(signer.ecdsa, head.signature, _PAYLOAD_TYPE, statement.to_bytes()):
        problem = f"the signature is not that of {statement.signer!r}"
    elif statement.time > now + TOLERANCE:
        problem = f"it is dated {statement.time}, in the future"
    if problem:
        _LOG.warning("%s/%s does not count: %s", store.url, key, problem)
        return None
    return statement


def _folder(pipeline: str, channel: str) -> str:
    return f"heads/{check_name('pipeline', pipeline)}/{check_name('channel', channel)}"
