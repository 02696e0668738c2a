"""Assemble a server from its settings and run it."""

import ipaddress
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn

from graftline.errors import ServingError
from graftline.registry.keys import KeyFile
from graftline.registry.request_log import LogPlace
from graftline.registry.store import open_store
from graftline.registry.trust import judged_head, trust_in
from graftline.serve import smoke
from graftline.serve.app import AccessRules, Server, create_app
from graftline.serve.catalog import Catalog
from graftline.serve.follower import ChannelRef, Follower, fetch_verified
from graftline.serve.request_log import RequestLog
from graftline.serve.scheduler import Limits, Scheduler
from graftline.serve.served_base import Base, Runtime
from graftline.settings.channels import Channel, RolloutJudge
from graftline.settings.channels import RequestLog as RequestLogSettings

logger = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 75
"""How long an idle connection stays open: longer than clients (httpx, openai: 5 s) and load balancers (60 s) keep one.
If the server closed first, a request that is just being sent would be lost."""


@dataclass(frozen=True, kw_only=True)
class FollowSettings:
    """Which channels to serve, and from where."""

    store: str
    """URL of the release store."""
    channels: tuple[ChannelRef, ...]
    folder: Path
    """Where releases are fetched to."""
    keys: Path | None = None
    """``keys.yaml``, read again when it changes; None: nothing is checked."""
    unsigned: bool = False
    """Check nothing until the file exists."""
    policies: Mapping[str, Channel] = field(default_factory=dict)
    """The channels' policies."""
    rollouts: Mapping[str, RolloutJudge] = field(default_factory=dict)
    """By channel, how candidates are judged there."""
    request_logs: Mapping[str, RequestLogSettings] = field(default_factory=dict)
    """By channel, which requests are kept and where; the others keep none."""
    seen: Path | None = None
    """Folder for what this machine has seen of channels; None: in memory."""


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """The settings of a server."""

    bases: tuple[tuple[str, Path], ...]
    """Names and model folders; merged models too."""
    adapters: tuple[tuple[str, Path], ...] = ()
    """Names and adapter folders; each finds its base by digest."""
    following: FollowSettings | None = None
    runtime: Runtime
    limits: Limits = field(default_factory=Limits)
    access: AccessRules = field(default_factory=AccessRules)


def make_server(settings: ServeSettings) -> Server:
    """Load everything that the settings name.

    Raises:
        ServingError: there is nothing to serve, or a name is given twice.
        GraftlineError: a base or an adapter is refused.
    """
    if not settings.bases:
        raise ServingError("there is nothing to serve; name at least one base")
    catalog = Catalog()
    for name, folder in settings.bases:
        catalog.add_base(name, Base(folder, settings.runtime))
        logger.info("serving the base %s as %s", folder, name)
    for name, folder in settings.adapters:
        catalog.load_adapter(name, folder)
        logger.info("serving the adapter %s as %s", folder, name)
    follower = _make_follower(settings.following, catalog) if settings.following else None
    request_log = _make_request_log(settings.following) if settings.following else RequestLog(())
    return Server(catalog, Scheduler(settings.limits), follower, settings.access, request_log)


def serve(settings: ServeSettings, *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve until SIGTERM or SIGINT; running requests are finished first. Raises as the checks and `make_server`."""
    check_exposure(host, settings.access.tokens)
    check_administrators(settings.access)
    uvicorn.run(
        create_app(make_server(settings)),
        host=host,
        port=port,
        log_level="warning",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=60,
    )


def fetch_followed(following: FollowSettings) -> list[tuple[str, Path]]:
    """Channel names and adapter folders of the releases that the channels hold now, fetched and verified.

    Raises:
        ServingError: a channel is empty.
        GraftlineError: a release is refused; the reason is given.
    """
    store, found = open_store(following.store, seen=following.seen), []
    keys = _keys(following)
    ring = keys.ring if keys else None
    trust = trust_in(ring, following.policies)
    for one in following.channels:
        entry, judged = judged_head(store, one.pipeline, one.channel, trust)
        if entry is None:
            raise ServingError(f"nothing was ever promoted into {one.name}; promote a release first")
        at = judged.proved if judged else None
        folder = fetch_verified(store, entry, following.folder, trust.keys if trust else None, at=at)
        found.append((one.name, folder / "adapter"))
    return found


def check_exposure(host: str, tokens: tuple[str, ...]) -> None:
    """Raise ServingError for listening beyond this machine without a token."""
    if tokens or host == "localhost":
        return
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local:
        raise ServingError(
            f"{host} can be reached from other machines and no token is set; set GRAFTLINE_SERVE_TOKENS, or listen on "
            "127.0.0.1"
        )


def check_administrators(access: AccessRules) -> None:
    """Raise ServingError if a client's token is an administrator's, or adapters could be loaded but by nobody."""
    if set(access.tokens) & set(access.admin_tokens):
        raise ServingError(
            "a token in GRAFTLINE_SERVE_ADMIN_TOKENS is in GRAFTLINE_SERVE_TOKENS too, so every client that has it "
            "would be an administrator; use different ones"
        )
    if access.adapter_folder is not None and not access.admin_tokens:
        raise ServingError(
            f"adapters from {access.adapter_folder} are to be loaded by request, which takes an administrator's token, "
            "and there is none; set GRAFTLINE_SERVE_ADMIN_TOKENS"
        )


def _make_follower(following: FollowSettings, catalog: Catalog) -> Follower:
    follower = Follower(
        open_store(following.store, seen=following.seen),
        following.channels,
        catalog,
        following.folder,
        keys=_keys(following),
        policies=following.policies,
        smoke=smoke.check,
    )
    follower.judges = following.rollouts
    return follower


def _make_request_log(following: FollowSettings) -> RequestLog:
    kept = [(one, following.request_logs.get(one.channel)) for one in following.channels]
    return RequestLog(
        [
            (LogPlace(open_store(log.store), one.pipeline, one.channel, log.retention_days), log)
            for one, log in kept
            if log is not None
        ]
    )


def _keys(following: FollowSettings) -> KeyFile | None:
    return KeyFile(following.keys, may_be_absent=following.unsigned) if following.keys else None
