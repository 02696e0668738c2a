"""Approvals: signed statements that one release may enter one channel.

A statement names the pipeline, the channel, the version, the release's digest, the signer and the time. The signature
covers the pre-authentication encoding of DSSE v1
(https://github.com/secure-systems-lab/dsse/blob/master/protocol.md) with ECDSA over P-256 and SHA-256. An approval
counts for its own digest and channel only, for one entry of the channel, and for as long as the policy says.
"""

import base64
import logging
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import ClassVar, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import AwareDatetime

from graftline.digest import Digest
from graftline.errors import PromotionError, ReleaseError
from graftline.registry.keys import Key, KeyRing
from graftline.registry.objects import check_name
from graftline.registry.store import Store
from graftline.release.manifest import DigestText, Record
from graftline.release.signing import load_private_key, public_pem

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
    secret = load_private_key(private_key)
    own = public_pem(secret.public_key())
    key = next((key for key in keys.keys.values() if key.public_key == own), None)
    if key is None or key.has_expired(now):
        state = "is not in the key file" if key is None else f"of {key.name} expired at {key.expires}"
        raise PromotionError(f"the key {private_key.name} {state}; have its public half listed there by pull request")
    statement = Approval(
        pipeline=target.pipeline,
        channel=target.channel,
        version=target.version,
        release=target.release,
        approver=key.name,
        time=now.replace(microsecond=0),
        nonce=secrets.token_hex(8),
    )
    signature = secret.sign(_encode(statement), ec.ECDSA(hashes.SHA256()))
    approval = SignedApproval(statement=statement, signature=base64.b64encode(signature).decode())
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
    if not _is_signed_by(key, approval):
        return f"{who}: the signature is not from that key"
    if key.has_expired(now):
        return f"{who}: the key expired at {key.expires}"
    if statement.time > now + _CLOCK_SKEW:
        return f"{who} is dated {statement.time}, in the future"
    if now - statement.time > valid:
        return f"{who} is of {statement.time} and good for {valid.total_seconds() / 3600:g} hours"
    if statement.digest in used:
        return f"{who} was used for an earlier entry of the channel"
    return None


def _is_signed_by(key: Key, approval: SignedApproval) -> bool:
    try:
        signature = base64.b64decode(approval.signature, validate=True)
        key.ecdsa.verify(signature, _encode(approval.statement), ec.ECDSA(hashes.SHA256()))
    except (ValueError, InvalidSignature):
        return False
    return True


def _encode(statement: Approval) -> bytes:
    """DSSE's pre-authentication encoding: ``DSSEv1 len(type) type len(body) body``."""
    body = statement.to_bytes()
    return b"DSSEv1 %d %b %d %b" % (len(_PAYLOAD_TYPE), _PAYLOAD_TYPE, len(body), body)


def _folder(target: ApprovalTarget) -> str:
    names = (("pipeline", target.pipeline), ("channel", target.channel), ("version", target.version))
    return "approvals/" + "/".join(check_name(kind, name) for kind, name in names)
