"""Entries of channels without the checks of a promotion, for tests of what only reads them."""

from datetime import datetime

from graftline.registry import channel
from graftline.registry.channel import ChannelChange
from graftline.registry.store import Store
from graftline.release.manifest import Manifest
from tests.release.packages import CREATED


def promotion_of(manifest: Manifest, time: datetime = CREATED) -> ChannelChange:
    """What an entry says that promotes a release."""
    return ChannelChange(
        action="promote",
        version=manifest.version,
        release=manifest.digest,
        verdict=manifest.verdict,
        actor="ci",
        reason="nightly",
        time=time,
    )


def put_in(store: Store, manifest: Manifest, name: str = "production", *, time: datetime = CREATED) -> None:
    """Put a release into the channel ``name``."""
    log = channel.read(store, manifest.pipeline, name)
    channel.append(store, channel.next_entry(log, promotion_of(manifest, time)))
