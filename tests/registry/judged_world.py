"""A channel with its people and its history, before readers who judge every entry: what an attacker finds."""

import shutil
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from graftline.registry import heads
from graftline.registry.channel import ChannelChange, Entry, Log, append, next_entry, read
from graftline.registry.keys import KeyRing
from graftline.registry.policy import digest_of
from graftline.registry.promotion import PromotionChecks, PromotionRequest, promote
from graftline.registry.seals import Evidence, seal
from graftline.registry.store import Store, open_store
from graftline.registry.trust import EntryJudge, JudgedLog, Trust
from graftline.release.manifest import Manifest
from graftline.settings import Approvals, Channel
from tests.registry.people import NOW, People, target_of

POLICY = Channel(approvals=Approvals(count=1, roles=("reviewer",)), head_hours=24)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)


@dataclass
class World:
    """Production holds v2 since an hour ago, v1 was there before; v3 is built, signed and in no channel.

    What an attacker does is done on ``store``; ``read`` is a reader who sees the store for the first time.
    """

    folder: Path
    people: People
    made: dict[str, Manifest]
    policies: dict[str, Channel] = field(default_factory=lambda: {"production": POLICY})
    now: datetime = NOW

    @property
    def store(self) -> Store:
        return open_store(str(self.folder))

    @property
    def trust(self) -> Trust:
        return Trust(keys=self.people.keys, policies=self.policies)

    def log(self) -> Log:
        return read(self.store, "demo", "production")

    def read(self, store: Store | None = None) -> JudgedLog:
        return EntryJudge(store or self.store, "demo", self.trust, now=self.now).read("production")

    def holds(self, version: str) -> bool:
        head = self.read().log.head
        return head is not None and head.change.version == self.made[version].version

    def change(
        self, version: str, action: str = "promote", *, hours_ago: float = 0.0, approver: str = ""
    ) -> ChannelChange:
        manifest = self.made[version]
        signed = (self.people.approve(self.store, target_of(manifest), approver),) if approver else ()
        values = {
            "action": action,
            "version": manifest.version,
            "release": manifest.digest,
            "verdict": manifest.verdict,
        }
        time = self.now - timedelta(hours=hours_ago)
        return ChannelChange.model_validate(
            {**values, "actor": "ci", "reason": "nightly", "time": time, "approvals": signed}
        )

    def sign(self, entry: Entry, by: str, *, policy: Channel = POLICY) -> Entry:
        """Seal an entry with a key, whatever its role: what a thief's own software does."""
        ring = self.people.keys
        keys = {
            name: key.model_copy(update={"roles": ("promoter",), "expires": None, "revoked": None})
            for name, key in ring.keys.items()
        }
        if by == "mallory":
            public = self.people.private_key("mallory").with_name("mallory.pub").read_text()
            keys["mallory"] = ring.keys["pia"].model_copy(update={"name": "mallory", "public_key": public})
        evidence = Evidence(policy=None if entry.change.action == "rollback" else digest_of(policy), builder="bob")
        return seal(entry, keys=KeyRing(keys), private_key=self.people.private_key(by), now=self.now, evidence=evidence)

    def enter(self, change: ChannelChange, by: str | None, *, policy: Channel = POLICY) -> Entry:
        """Append an entry as a thief would, checked by nobody."""
        entry = next_entry(self.log(), change)
        entry = self.sign(entry, by, policy=policy) if by else entry
        append(self.store, entry)
        return entry

    def truncate(self, to: int) -> None:
        """Remove the newest entries and what was stated of them."""
        for file in (self.folder / "channels" / "demo" / "production").iterdir():
            if int(file.stem) > to:
                file.chmod(0o644)
                file.unlink()
        shutil.rmtree(self.folder / "heads", ignore_errors=True)

    def state(self, by: str = "pia", *, hours_ago: float = 0.0, of: Entry | None = None) -> None:
        entry = of or self.log().entries[-1]
        when = self.now - timedelta(hours=hours_ago)
        heads.sign(
            self.store, entry, keys=self.people.keys, private_key=self.people.private_key(by), now=when, valid=DAY
        )

    def with_key(self, name: str, **changes: object) -> None:
        key = self.people.keys.keys[name].model_copy(update=changes)
        self.people.keys = replace(self.people.keys, keys={**self.people.keys.keys, name: key})


def promoted(world: World, store: Store, version: str, *, hours_ago: float, policy: Channel = POLICY) -> Entry:
    """The product's own promotion, approved by eve and signed by pia."""
    manifest, when = world.made[version], NOW - timedelta(hours=hours_ago)
    world.people.approve(store, target_of(manifest), "eve", hours_ago=hours_ago + 1)
    checks = PromotionChecks(
        policy=policy,
        keys=world.people.keys,
        smoke=lambda folder: None,
        production=None,
        trust=world.trust,
        key=world.people.private_key("pia"),
    )
    wish = PromotionRequest(
        pipeline="demo", channel="production", version=manifest.version, actor="ci", reason="nightly"
    )
    return promote(store, wish, checks, folder=world.folder.parent / f"fetched-{version}", now=lambda: when)


@pytest.fixture(scope="module")
def began(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("trust")
    people = People(folder)
    store = open_store(str(folder / "store"))
    made = {f"v{seed}": people.release(store, folder / f"package-{seed}", str(seed)) for seed in (1, 2, 3)}
    world = World(folder / "store", people, made)
    promoted(world, store, "v1", hours_ago=30)
    world.state(hours_ago=29)
    promoted(world, store, "v2", hours_ago=1)  # the same machine, which has seen v1
    return world


@pytest.fixture
def world(began: World, tmp_path: Path) -> World:
    shutil.copytree(began.folder, tmp_path / "store")
    return World(tmp_path / "store", began.people.but(), began.made)


def unsigned_history(world: World) -> None:
    world.truncate(0)
    for version in ("v1", "v2"):
        world.enter(world.change(version, hours_ago=2), None)
