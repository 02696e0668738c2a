"""Seals: what an entry of a channel is signed with, by whom it may be, and whether a signature counts."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from graftline.digest import Digest
from graftline.errors import PromotionError
from graftline.plain_text import one_line
from graftline.registry.channel import Entry, Seal
from graftline.registry.keys import KEY_FILE, PROMOTER, ROLLBACK, Key, KeyRing
from graftline.release.signing import is_signed, sign_statement

ROLES: Mapping[str, tuple[str, ...]] = {
    "promote": (PROMOTER,),
    "rollout": (PROMOTER,),
    "rollback": (PROMOTER, ROLLBACK),
}
"""Whose keys may sign an entry, by what it does."""
_PAYLOAD_TYPE = b"application/vnd.graftline.entry+json"


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What an entry is sealed with beside its change."""

    policy: Digest | None = None
    """`digest_of` the policy that was met."""
    builder: str | None = None
    compared_with: str | None = None


def signer(keys: KeyRing, private_key: Path, action: str, *, now: datetime) -> tuple[ec.EllipticCurvePrivateKey, Key]:
    """The key to sign an entry with; raises as `seal`."""
    secret, key = keys.own(private_key, now=now)
    if not set(ROLES[action]) & set(key.roles):
        raise PromotionError(
            f"the key {key.name} has the roles {', '.join(key.roles) or 'none'}; to {action} it needs "
            f"{' or '.join(map(repr, ROLES[action]))}: add it in {KEY_FILE} by pull request, or use another key (--key)"
        )
    return secret, key


def seal(entry: Entry, *, keys: KeyRing, private_key: Path, now: datetime, evidence: Evidence = Evidence()) -> Entry:
    """Sign an entry.

    Raises:
        PromotionError: the key is not in the key file, has ended, or lacks the role for what the entry does.
        ReleaseError: the private key cannot be read or is of the wrong kind.
    """
    secret, key = signer(keys, private_key, entry.change.action, now=now)
    made = Seal(
        signer=key.name,
        policy=evidence.policy,
        builder=evidence.builder,
        compared_with=evidence.compared_with,
        signature="",
    )
    unsigned = entry.model_copy(update={"format": 2, "seal": made})
    signature = sign_statement(secret, _PAYLOAD_TYPE, unsigned.to_bytes())
    return unsigned.model_copy(update={"seal": made.model_copy(update={"signature": signature})})


def why_not_signed(entry: Entry, keys: KeyRing, at: datetime) -> str | None:
    """Why the signature of an entry that existed at a time does not count; None if it does."""
    if entry.seal is None:
        return "is not signed"
    name, roles = one_line(entry.seal.signer), ROLES[entry.change.action]
    key = keys.keys.get(entry.seal.signer)
    if key is None:
        return f"is signed by {name!r}, whom {KEY_FILE} does not list"
    if not set(roles) & set(key.roles):
        return f"is signed by {name!r}, who has not the role {' or '.join(map(repr, roles))} in {KEY_FILE}"
    if key.has_expired(at):
        return f"is signed by {name!r}, whose key {key.end_in_words}; that it was there before is not proved"
    empty = entry.model_copy(update={"seal": entry.seal.model_copy(update={"signature": ""})})
    if not is_signed(key.ecdsa, entry.seal.signature, _PAYLOAD_TYPE, empty.to_bytes()):
        return f"has a signature that is not from the key of {name!r}"
    return None
