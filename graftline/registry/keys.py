"""The key ring: whose signatures count, and for what. A YAML file in the repository, changed by pull request.

```yaml
keys:
- name: ada-2026
  person: ada                    # whose key it is: approvals are counted by person, not by key. Default: the key's name
  roles: [builder, maintainer]   # what it may do, see below; other roles: whatever a channel's policy asks for
  public_key: |
    -----BEGIN PUBLIC KEY-----
    …
  expires: 2027-12-31T00:00:00Z  # optional
  revoked: 2026-11-20T08:00:00Z  # optional: since when others may have had it
accepted: [sha256:…]             # optional: entries that count though they are not signed, or their keys have ended
```

Roles of machines: ``builder`` signs releases, ``promoter`` signs promotions, rollouts and rollbacks, ``rollback`` signs
rollbacks only, ``timestamp`` signs which entry is a channel's newest. A key with no other role approves nothing, unless
the policy names its role.

``unsigned: true`` with no keys says that nothing is checked: for a store that only its owner can write to.
"""

import json
import os
import tempfile
import unicodedata
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Any, Self

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import AwareDatetime, Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from graftline.digest import Digest
from graftline.errors import PromotionError, ReleaseError
from graftline.plain_text import one_line
from graftline.release.manifest import SIGNATURE_NAME, DigestText, Part
from graftline.release.signing import load_private_key, public_pem, verify_digests, verify_folder

BUILDER, PROMOTER, ROLLBACK, TIMESTAMP = "builder", "promoter", "rollback", "timestamp"
_MACHINES = frozenset({BUILDER, PROMOTER, ROLLBACK, TIMESTAMP})
_MAX_BYTES = 1 << 20

KEY_FILE = "keys.yaml"
"""Name of the key file, beside pipelines.yaml."""


class Key(Part):
    """One person's or machine's key."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    person: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    """Owner: two keys of one person count as one. None: the key's name is the person's."""
    roles: tuple[str, ...]
    public_key: str
    """PEM."""
    expires: AwareDatetime | None = None
    """When its signatures stop counting; None: never."""
    revoked: AwareDatetime | None = None
    """From when on somebody else may have had it; None: not revoked."""

    @field_validator("person")
    @classmethod
    def _check_person(cls, person: str | None) -> str | None:
        if person is None:
            return None
        plain = unicodedata.normalize("NFKC", person).casefold()
        if not plain.strip() or one_line(plain) != plain:
            raise ValueError("expected a name on one line, the same for each key of that person")
        return " ".join(plain.split())

    @field_validator("public_key")
    @classmethod
    def _check_key(cls, pem: str) -> str:
        if "PRIVATE KEY" in pem:
            raise ValueError("this is a PRIVATE key: remove it from the file and from history, and make a new one")
        try:
            key = serialization.load_pem_public_key(pem.encode())
        except (ValueError, UnsupportedAlgorithm) as error:
            raise ValueError(f"not a public key in PEM ({error})") from error
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
            raise ValueError("expected an ECDSA key over P-256; make one with `graftline new-key`")
        return public_pem(key)

    @property
    def ecdsa(self) -> ec.EllipticCurvePublicKey:
        """The parsed public key."""
        key = serialization.load_pem_public_key(self.public_key.encode())
        assert isinstance(key, ec.EllipticCurvePublicKey)
        return key

    def has_expired(self, now: datetime) -> bool:
        """Whether its signatures no longer count: it expired or was revoked by then."""
        return any(end is not None and now >= end for end in (self.expires, self.revoked))

    @property
    def end_in_words(self) -> str:
        """When it ended, for messages."""
        return f"was revoked as of {self.revoked}" if self.revoked else f"expired at {self.expires}"

    def may_approve(self, asked: Collection[str]) -> bool:
        """Whether it may approve: it is not only a machine's key, or has a role that the policy asks approvals of."""
        roles = set(self.roles)
        return not roles or bool(roles - _MACHINES) or bool(roles & set(asked))


class _Document(Part):
    keys: tuple[Key, ...] = ()
    accepted: tuple[DigestText, ...] = ()
    unsigned: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "keys" not in self.model_fields_set and not self.unsigned:
            raise ValueError("keys is missing; list the keys that count, or write `unsigned: true`: nothing is checked")
        return self


@dataclass(frozen=True)
class KeyRing:
    """The keys that are accepted, by name."""

    keys: Mapping[str, Key]
    accepted: frozenset[Digest] = frozenset()
    """Entries that count as they are: from before entries were signed, or by expired or revoked keys."""
    unsigned: bool = False
    """Whether nothing is checked, on purpose."""

    def person(self, name: str) -> str:
        """The owner of the key ``name``."""
        key = self.keys.get(name)
        return key.person if key and key.person else name

    @classmethod
    def load(cls, path: Path) -> "KeyRing":
        """Read a key file.

        Raises:
            PromotionError: it is missing, malformed, holds a private key, or the same name or key twice.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PromotionError(f"cannot read the key file {path}: {error}; list the keys that count there") from error
        return cls.parse(text, origin=str(path))

    @classmethod
    def parse(cls, text: str, *, origin: str) -> "KeyRing":
        """Read the text of a key file. See `load`."""
        try:
            if len(text) > _MAX_BYTES:
                raise ValueError(f"it is longer than {_MAX_BYTES} bytes")
            found = _Document.model_validate_json(json.dumps(YAML(typ="safe").load(text), default=_plain))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise PromotionError(f"{origin}: {where or 'document'}: {first['msg']}") from error
        except (YAMLError, ValueError, TypeError, RecursionError) as error:
            raise PromotionError(f"{origin} is no key file: {error}") from error
        for values in ([key.name for key in found.keys], [key.public_key for key in found.keys]):
            if len(set(values)) < len(values):
                raise PromotionError(
                    f"{origin}: a name or a key is listed twice; give each key a different name, and the keys of one "
                    "person the same `person`"
                )
        if found.unsigned and found.keys:
            raise PromotionError(
                f"{origin} lists keys, and `unsigned: true` would ignore them; remove that line, or the keys"
            )
        return cls({key.name: key for key in found.keys}, frozenset(found.accepted), found.unsigned)

    def own(self, private_key: Path, *, now: datetime) -> tuple[ec.EllipticCurvePrivateKey, Key]:
        """A private key and its place in the key file.

        Raises:
            PromotionError: it is not listed, or has expired or was revoked.
            ReleaseError: it cannot be read or is of the wrong kind.
        """
        secret = load_private_key(private_key)
        public = public_pem(secret.public_key())
        key = next((key for key in self.keys.values() if key.public_key == public), None)
        if key is None or key.has_expired(now):
            state = "is not in the key file" if key is None else f"of {key.name} {key.end_in_words}"
            raise PromotionError(
                f"the key {private_key.name} {state}; have its public half listed there by pull request"
            )
        return secret, key

    def verify_release(self, folder: Path, *, now: datetime) -> str:
        """Check a release's signature against the builders' keys; returns the name of the key that signed it.

        Raises:
            ReleaseError: unsigned, signed by an unknown key, or changed after it was signed.
        """
        return self._builder_of(str(folder), lambda public_key: verify_folder(folder, public_key), now)

    def verify_digests(self, digests: Mapping[str, Digest], signature: bytes, *, origin: str, now: datetime) -> str:
        """As `verify_release`, for the digests of files that were read elsewhere; ``origin`` is for messages."""
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / SIGNATURE_NAME
            path.write_bytes(signature)
            try:
                return self._builder_of(origin, lambda public_key: verify_digests(digests, path, public_key), now)
            except ReleaseError as error:
                raise ReleaseError(str(error).replace(place, origin)) from error

    def _builder_of(self, origin: str, check: Callable[[Path], None], now: datetime) -> str:
        builders = [key for key in self.keys.values() if BUILDER in key.roles and not key.has_expired(now)]
        problems: list[str] = []
        for key in builders:
            with tempfile.TemporaryDirectory() as place:
                public_key = Path(place) / key.name
                public_key.write_text(key.public_key, encoding="utf-8")
                try:
                    check(public_key)
                except ReleaseError as error:
                    problems.append(str(error))
                else:
                    return key.name
        known = ", ".join(key.name for key in builders) or "nobody"
        raise ReleaseError(
            f"{origin}: the signature is of none whose key has the role {BUILDER!r} now ({known}). "
            f"{' '.join(problems[:1])}"
        )


def _plain(value: Any) -> str:
    if isinstance(value, date):  # datetime included
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} is not allowed there")


class KeyFile:
    """The key ring in a file that is read again when it changes, so that revoked keys need no restart.

    Args:
        path: ``keys.yaml``.
        may_be_absent: there is no key ring until the file exists; False: a missing file is an error at once.

    Raises:
        PromotionError: the file is unusable at the start, when there is no earlier ring to keep.
    """

    def __init__(self, path: Path, *, may_be_absent: bool = False) -> None:
        self.path = path
        self.problem: str | None = None
        """Why the file cannot be used now; until it can, the last good ring counts."""
        self._ring: KeyRing | None = None
        self._data = _read(path)
        if os.path.lexists(path) or not may_be_absent:
            self._ring = self._load(self._data)

    @property
    def ring(self) -> KeyRing | None:
        """The keys that count now; None: there has never been a file.

        Raises:
            PromotionError: the file has never been usable.
        """
        if self._ring is None and self.problem:
            raise PromotionError(self.problem)
        return self._ring

    @property
    def is_unsigned(self) -> bool:
        """Whether nothing is checked, on purpose; False while the file cannot be used."""
        return self._ring.unsigned if self._ring else self.problem is None

    def refresh(self) -> bool:
        """Read the file if it has changed; returns whether other keys count from now on."""
        data = _read(self.path)
        if data == self._data and (data is not None or (self._ring is None and not os.path.lexists(self.path))):
            return False
        before, self._data = self._ring, data
        try:
            self._ring, self.problem = self._load(data), None
        except PromotionError as error:
            kept = "; the keys that were read before count until it is right" if before else ""
            self.problem = f"{error}{kept}"
            return False
        return self._ring != before

    def _load(self, data: bytes | None) -> KeyRing:
        if data is None:
            return KeyRing.load(self.path)  # says why it cannot be read
        try:
            return KeyRing.parse(data.decode(), origin=str(self.path))
        except UnicodeDecodeError as error:
            raise PromotionError(f"cannot read the key file {self.path}: {error}; write it in UTF-8") from error


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
