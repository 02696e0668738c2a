"""Approvals: signed statements that one release may enter one channel.

A statement names the pipeline, the channel, the version, the release's digest, the signer and the time. It is signed
as `graftline.release.signing` says. An approval counts for its own digest and channel only, for one entry of the
channel, and for as long as the policy says.
"""

import logging
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import AwareDatetime

from graftline.digest import Digest
from graftline.errors import ReleaseError
from graftline.registry.keys import KeyRing
from graftline.registry.objects import check_name
from graftline.registry.store import Store
from graftline.release.manifest import DigestText, Record
from graftline.release.signing import is_signed, sign_statement

_PAYLOAD_TYPE = b"application/vnd.graftline.approval+json"
_LOG = logging.getLogger(__name__)
_CLOCK_SKEW = timedelta(minutes=5)


class Approval(Record):
    """The statement that is signed."""

    kind: ClassVar[str] = "approval"
    format: Literal[1] = 1
    pipeline: str
    channel: str
    version: str
    release: DigestText
    """Digest of the release's manifest."""
    approver: str
    """Name of the key in the key ring."""
    time: AwareDatetime
    nonce: str
    """Random, so that a used approval can be told from a new one."""


class SignedApproval(Record):
    """An approval and its signature."""

    kind: ClassVar[str] = "signed approval"
    statement: Approval
    signature: str
    """Base64 of the DER signature."""


@dataclass(frozen=True)
class ApprovalTarget:
    """The release and the channel that an approval is for."""

    pipeline: str
    channel: str
    version: str
    release: Digest


def approve(store: Store, target: ApprovalTarget, *, keys: KeyRing, private_key: Path, now: datetime) -> SignedApproval:
    """Sign an approval and store it beside the others.

    Raises:
        PromotionError: the key is not in the key file, or has expired.
        ReleaseError: the private key cannot be read or is of the wrong kind.
    """
    secret, key = keys.own(private_key, now=now)
    statement = Approval(
        pipeline=target.pipeline,
        channel=target.channel,
        version=target.version,
        release=target.release,
        approver=key.name,
        time=now.replace(microsecond=0),
        nonce=secrets.token_hex(8),
    )
    signature = sign_statement(secret, _PAYLOAD_TYPE, statement.to_bytes())
    approval = SignedApproval(statement=statement, signature=signature)
    store.create(f"{_folder(target)}/{key.name}-{statement.nonce}.json", approval.to_bytes())
    return approval


def collect(store: Store, target: ApprovalTarget) -> tuple[SignedApproval, ...]:
    """Approvals in the store for a release and a channel, not yet checked. Unreadable ones are skipped and logged."""
    found: list[SignedApproval] = []
    for key in store.list(_folder(target)):
        try:
            found.append(SignedApproval.parse(store.get(key) or b""))
        except ReleaseError as error:
            _LOG.warning("%s/%s does not count: %s", store.url, key, error)
    return tuple(found)


def why_not(
    approval: SignedApproval,
    target: ApprovalTarget,
    *,
    keys: KeyRing,
    valid: timedelta,
    used: Collection[Digest],
    now: datetime,
) -> str | None:
    """Why an approval does not count; None if it does. ``used``: digests of the approvals in the channel's history."""
    statement = approval.statement
    who = f"approval of {statement.approver!r}"
    named = ApprovalTarget(statement.pipeline, statement.channel, statement.version, statement.release)
    key = keys.keys.get(statement.approver)
    if named != target:
        return f"{who} is for {named.pipeline}/{named.version} ({named.release.short}) in {named.channel}"
    if key is None:
        return f"{who}: no such key in the key file"
    if not is_signed(key.ecdsa, approval.signature, _PAYLOAD_TYPE, statement.to_bytes()):
        return f"{who}: the signature is not from that key"
    if key.has_expired(now):
        return f"{who}: the key {key.end_in_words}"
    if statement.time > now + _CLOCK_SKEW:
        return f"{who} is dated {statement.time}, in the future"
    if now - statement.time > valid:
        return f"{who} is of {statement.time} and good for {valid.total_seconds() / 3600:g} hours"
    if statement.digest in used:
        return f"{who} was used for an earlier entry of the channel"
    return None


def _folder(target: ApprovalTarget) -> str:
    names = (("pipeline", target.pipeline), ("channel", target.channel), ("version", target.version))
    return "approvals/" + "/".join(check_name(kind, name) for kind, name in names)
