"""Keys, a key ring and signed releases for tests."""

import copy
from datetime import UTC, datetime, timedelta
from pathlib import Path

from graftline.registry.approval import Approval, ApprovalTarget, SignedApproval, approve
from graftline.registry.channel import ChannelChange, Log, next_entry
from graftline.registry.keys import KeyRing
from graftline.registry.releases import publish
from graftline.registry.store import Store
from graftline.release.manifest import GateVerdict, Manifest
from graftline.release.signing import create_key, sign_folder
from tests.release.packages import VERDICT, make_package

NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
ROLES = {
    "bob": ("builder",),
    "ada": ("builder", "maintainer"),
    "eve": ("reviewer",),
    "mia": ("reviewer", "security"),
    "pia": ("promoter", "timestamp"),
    "rob": ("rollback",),
}


class People:
    """bob builds, ada also maintains, eve and mia review, pia promotes, rob rolls back; nobody listed ``mallory``."""

    def __init__(self, folder: Path, *, expires: dict[str, datetime] | None = None) -> None:
        self._folder = folder
        lines = ["keys:"]
        for name, roles in ROLES.items():
            lines += [f"- name: {name}", f"  roles: [{', '.join(roles)}]", "  public_key: |"]
            lines += [f"    {line}" for line in self._make(name).read_text().splitlines()]
            lines += [f"  expires: {when.isoformat()}" for who, when in (expires or {}).items() if who == name]
        self._make("mallory")
        self.text = "\n".join(lines) + "\n"
        self.keys = KeyRing.parse(self.text, origin="keys.yaml")

    def but(self) -> "People":
        """The same people, whose key ring can be changed apart."""
        return copy.copy(self)

    def _make(self, name: str) -> Path:
        private = self.private_key(name)
        return private.with_name(f"{name}.pub") if private.exists() else create_key(private)

    def private_key(self, name: str) -> Path:
        return self._folder / name

    def release(
        self,
        store: Store,
        folder: Path,
        seed: str = "a",
        *,
        builder: str | None = "bob",
        verdict: GateVerdict = VERDICT,
        reserve: str = "",
    ) -> Manifest:
        """A published release, signed if there is a builder."""
        make_package(folder, seed, verdict=verdict, reserve=reserve)
        if builder:
            sign_folder(folder, self.private_key(builder))
        return publish(store, folder)

    def approve(self, store: Store, target: ApprovalTarget, name: str, *, hours_ago: float = 1.0) -> SignedApproval:
        when = NOW - timedelta(hours=hours_ago)
        return approve(store, target, keys=self.keys, private_key=self.private_key(name), now=when)


def target_of(manifest: Manifest, channel: str = "production") -> ApprovalTarget:
    return ApprovalTarget(manifest.pipeline, channel, manifest.version, manifest.digest)


def log_of(*changes: tuple[str, float], channel: str = "production", approvals: tuple[SignedApproval, ...] = ()) -> Log:
    """A history of (version, hours ago); ``approvals`` were used for its last entry."""
    log = Log("demo", channel, ())
    for index, (version, hours_ago) in enumerate(changes):
        change = ChannelChange(
            action="promote",
            version=version,
            release=VERDICT.digest,
            verdict=VERDICT,
            actor="ci",
            reason="nightly",
            time=NOW - timedelta(hours=hours_ago),
            approvals=approvals if index == len(changes) - 1 else (),
        )
        log = Log("demo", channel, (*log.entries, next_entry(log, change)))
    return log


def forged(approval: SignedApproval, **changes: object) -> SignedApproval:
    """The same signature under another statement."""
    statement = Approval.model_validate({**dict(approval.statement), **changes})
    return approval.model_copy(update={"statement": statement})
