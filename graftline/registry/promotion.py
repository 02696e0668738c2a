"""Promote a release into a channel, or roll a channel back: read, check everything, then write one log entry.

Nothing enters a channel that was not verified: signature, then manifest, then every digest, then the policy, then a
smoke run. A promoter that dies at any step leaves the channel as it was or fully changed, and may be run again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path

from graftline.errors import PromotionError
from graftline.progress import OnProgress, silent
from graftline.registry import channel
from graftline.registry.approval import Target, collect
from graftline.registry.binding import BASE, check_binding
from graftline.registry.channel import Change, Entry, Log
from graftline.registry.keys import KeyRing
from graftline.registry.log_checkpoints import keep, recall
from graftline.registry.policy import Case, Policy, Rule, check, counted_approvals
from graftline.registry.releases import fetch, load_manifest, release_key
from graftline.registry.store import Store
from graftline.release.manifest import GateVerdict


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What somebody wants to promote, where to and why."""

    pipeline: str
    channel: str
    version: str
    actor: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Checks:
    """What a promotion is held against."""

    policy: Policy
    keys: KeyRing
    smoke: Callable[[Path], None]
    """Serve the release in this folder, compare with its recorded answers; raises `PromotionError` if they differ."""
    production: str | None = "production"
    """Channel that verdicts are against; None: always the base."""
    verdict: GateVerdict | None = None
    """A newer verdict than the manifest's, for when production has moved on since."""


def promote(
    store: Store,
    wish: Wish,
    checks: Checks,
    *,
    folder: Path,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    on_progress: OnProgress = silent,
) -> Entry:
    """Put a release into a channel.

    Args:
        store: where releases and channels are.
        wish: what, where to, who and why.
        checks: policy, keys, smoke run.
        folder: where the release is fetched to, to be verified and served; kept for the next time.
        now: the clock.
        on_progress: called with the bytes fetched and the total.

    Returns:
        The new entry; the channel's newest one if it holds this release already.

    Raises:
        ReleaseError: unsigned, signed by nobody on the list, or damaged.
        PromotionError: the policy or the smoke run forbids it; every rule that is not met is named.
        ConflictError: somebody else was first; the channel is as that one left it.
        UnsafeStoreError: the store cannot promise that only one promoter wins.
    """
    log = recall(store, wish.pipeline, wish.channel)
    if log.head and log.head.change.version == wish.version:
        return log.head
    manifest = fetch(store, wish.pipeline, wish.version, folder, on_progress=on_progress)
    check_binding(manifest, lambda path: (folder / path).read_bytes())
    reference = _reference(store, log, checks.production)
    started, target = now(), Target(wish.pipeline, wish.channel, wish.version, manifest.digest)
    case = Case(
        target=target,
        builder=checks.keys.verify_release(folder, now=started),
        verdict=checks.verdict or manifest.verdict,
        reference=reference.version if reference else BASE,
        reference_release=reference.release if reference else None,
        log=log,
        earlier=recall(store, wish.pipeline, checks.policy.after) if checks.policy.after else None,
        approvals=collect(store, target),
        keys=checks.keys,
        now=started,
    )
    rules = check(checks.policy, case)
    _refuse_unmet(wish, rules)
    checks.smoke(folder)
    entry = channel.next_entry(log, _promotion(wish, case, checks.policy, rules, time=now()))
    channel.append(store, entry)
    keep(store, log)
    return entry


def rollback(
    store: Store, *, pipeline: str, to_channel: str, version: str | None = None, actor: str, reason: str
) -> Entry:
    """Point a channel back at a release it held before. Nothing is uploaded; freezes and approvals do not apply.

    The history is read from its newest entry back to the one that held the release, and no further.

    Args:
        store: where the channel is.
        pipeline: pipeline of the channel.
        to_channel: the channel.
        version: one the channel held; None: the one before the present one.
        actor: who.
        reason: why.

    Returns:
        The new entry.

    Raises:
        PromotionError: there is nothing to go back to, or the channel never held that release.
        ReleaseError: the release is no longer whole in the store.
        ConflictError: somebody else changed the channel at the same time.
    """
    head, past = _entry_to_return_to(store, pipeline, to_channel, version)
    manifest = load_manifest(store, pipeline, past.change.version)
    if manifest.digest != past.change.release:
        raise PromotionError(
            f"release {past.change.version} has digest {manifest.digest}, the history says {past.change.release}; "
            "it was changed after it was promoted, choose another"
        )
    present = set(store.list(release_key(pipeline, past.change.version)))
    missing = [
        entry.path for entry in manifest.files if release_key(pipeline, past.change.version, entry.path) not in present
    ]
    if missing:
        raise PromotionError(f"release {past.change.version} misses {missing[0]} in the store; choose another version")
    change = Change(
        action="rollback",
        version=past.change.version,
        release=past.change.release,
        verdict=past.change.verdict,
        actor=actor,
        reason=reason,
        time=datetime.now(UTC).replace(microsecond=0),
        checks=(f"held before: entry {past.number}",),
    )
    entry = channel.next_entry(Log(pipeline, to_channel, (head,)), change)
    channel.append(store, entry)
    return entry


def _promotion(wish: Wish, case: Case, policy: Policy, rules: tuple[Rule, ...], *, time: datetime) -> Change:
    """The change that a promotion writes: with everything it was held against."""
    met = [f"{rule.name}: {rule.reason}" for rule in rules]
    return Change(
        action="promote",
        version=wish.version,
        release=case.target.release,
        verdict=case.verdict,
        actor=wish.actor,
        reason=wish.reason,
        time=time.replace(microsecond=0),
        approvals=counted_approvals(policy, case)[0],
        checks=(f"signature: by {case.builder}", *met, "smoke: matched"),
    )


def _reference(store: Store, log: Log, production: str | None) -> Change | None:
    """What verdicts have to be against: the change that put it into production; None for the base."""
    if production is None:
        return None
    head = log.head if production == log.channel else channel.head(store, log.pipeline, production)
    return head.change if head else None


def _refuse_unmet(wish: Wish, rules: tuple[Rule, ...]) -> None:
    unmet = [rule for rule in rules if not rule.met]
    if unmet:
        lines = "\n".join(f"  {rule.name}: {rule.reason}" for rule in unmet)
        raise PromotionError(f"{wish.version} may not enter {wish.channel} of {wish.pipeline}:\n{lines}")


def _entry_to_return_to(store: Store, pipeline: str, name: str, version: str | None) -> tuple[Entry, Entry]:
    """The channel's newest entry, and the newest one that held the release that is wanted."""
    entries = channel.backwards(store, pipeline, name)
    head = next(entries, None)
    if head is None:
        raise PromotionError(f"channel {name!r} of {pipeline!r} is empty; there is nothing to go back to")
    held: dict[str, None] = {}
    for entry in chain([head], entries):
        if entry.change.version == version or (version is None and entry.change.version != head.change.version):
            return head, entry
        held[entry.change.version] = None
    wanted = f"release {version!r}" if version else "any other release"
    raise PromotionError(f"channel {name!r} of {pipeline!r} never held {wanted}; it held {', '.join(held)}")
