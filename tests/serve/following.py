"""Releases, promotions and a server that follows a channel, for tests."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from graftline.adapters.peft_format import load_adapter
from graftline.digest import Digest, of_bytes
from graftline.registry import channel as channels
from graftline.registry import heads
from graftline.registry.channel import ChannelChange
from graftline.registry.keys import KeyFile, KeyRing
from graftline.registry.leases import LeaseListing
from graftline.registry.policy import digest_of
from graftline.registry.releases import publish
from graftline.registry.seals import Evidence, seal
from graftline.registry.store import Store
from graftline.release.manifest import GateVerdict, describe, write_manifest
from graftline.release.signing import sign_folder
from graftline.serve import smoke
from graftline.serve.catalog import Catalog
from graftline.serve.follower import ChannelRef, Follower
from graftline.serve.served_base import Base, Runtime
from graftline.settings import Channel
from graftline.weights.identity import read_identity
from graftline.weights.quant.linear import load_model
from tests.registry.people import People
from tests.release.packages import LINEAGE
from tests.serve.conftest import make_adapter

PROMPTS = [[5, 6, 7, 8], [20, 21], list(range(30, 50))]


def leased(store: Store) -> set[str]:
    return set(LeaseListing.take(store, "demo").needed(store, now=datetime.now(UTC)))


def make_release(
    store: Store,
    base: Path,
    work: Path,
    *,
    seed: int,
    answers_of: Path | None = None,
    has_answers: bool = True,
    private_key: Path | None = None,
) -> tuple[str, Digest]:
    """A release with an adapter and recorded answers (of another adapter if asked); returns version and digest."""
    package = work / f"package-{seed}"
    adapter = make_adapter(base, package / "adapter", seed=seed)
    if has_answers:
        model = load_model(base)
        load_adapter(model, answers_of or adapter, base=read_identity(base))
        smoke.record(model, PROMPTS, package / smoke.SMOKE_FILE)
    nothing = of_bytes(b"")
    manifest = describe(
        package,
        pipeline="demo",
        created=datetime(2026, 1, 1, 0, 0, seed, tzinfo=UTC),
        lineage=LINEAGE.model_copy(update={"base_digest": read_identity(base).digest}),
        verdict=GateVerdict(outcome="pass", against="base", digest=nothing),
    )
    write_manifest(package, manifest)
    if private_key:
        sign_folder(package, private_key)
    published = publish(store, package)
    return published.version, published.digest


def promote(
    store: Store,
    version: str,
    digest: Digest,
    *,
    to: str = "production",
    people: People | None = None,
    builder: str | None = "bob",
) -> None:
    """Write an entry; with people, pia signs it."""
    log = channels.read(store, "demo", to)
    change = ChannelChange(
        action="promote",
        version=version,
        release=digest,
        verdict=GateVerdict(outcome="pass", against="base", digest=of_bytes(b"")),
        actor="somebody",
        reason="a test",
        time=datetime(2026, 1, 2, tzinfo=UTC),
    )
    entry = channels.next_entry(log, change)
    if people:
        key, evidence = people.private_key("pia"), Evidence(policy=digest_of(Channel()), builder=builder)
        entry = seal(entry, keys=people.keys, private_key=key, now=change.time, evidence=evidence)
    channels.append(store, entry)
    if people:
        now = datetime.now(UTC)  # the follower's clock
        heads.sign(store, entry, keys=people.keys, private_key=key, now=now, valid=timedelta(days=1))


def make_follower(
    store: Store,
    tiny: Path,
    runtime: Runtime,
    folder: Path,
    keys: KeyRing | KeyFile | None = None,
    channels: tuple[str, ...] = ("production",),
) -> Follower:
    catalog = Catalog()
    catalog.add_base("tiny", Base(tiny, runtime))
    follower = Follower(
        store,
        tuple(ChannelRef("demo", name) for name in channels),
        catalog,
        folder,
        keys=keys,
        policies={name: Channel() for name in channels},
        smoke=smoke.check,
        poll_seconds=0.05,
    )
    follower.catalog = catalog  # type: ignore[attr-defined]
    return follower


def served(follower: Follower, name: str = "production") -> str | None:
    return follower.catalog.resolve(f"demo@{name}").release  # type: ignore[attr-defined]


def state_of(follower: Follower, name: str = "production") -> dict[str, Any]:
    return follower.status()[f"demo@{name}"]


def assert_refused(follower: Follower, reason: str) -> None:
    """The follower looks, serves no version and says why."""
    follower.poll()
    state = follower.status()["demo@production"]
    assert state["version"] is None
    assert reason in state["error"]


def releases_on_disk(folder: Path) -> set[str]:
    return {path.name for path in (folder / "demo").iterdir()}
