"""Drive a rollout: collect the servers' figures, judge them, and write the channel's next entry.

Without a driver nothing changes: no share grows by itself, and nothing goes back by itself. Several drivers do no harm:
each writes directly after the entry that it judged, so only one of them succeeds.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx

from graftline import settings
from graftline.data.sources import default_cache
from graftline.errors import ConfigError, ConflictError, PromotionError, StoreError
from graftline.plain_text import one_line
from graftline.registry import channel as channels
from graftline.registry.channel import Entry
from graftline.registry.keys import PROMOTER
from graftline.registry.rollout import Hand, go_back, move
from graftline.registry.store import Store, open_store
from graftline.registry.trust import CHANNEL_KEY, Trust, judged_head, open_trust
from graftline.serve import ADMIN_TOKENS_VARIABLE
from graftline.serve.judge import Rule, Standing, as_margin, judge
from graftline.serve.rollouts import merged
from graftline.settings.channels import Rollout, RolloutJudge, as_time

_TIMEOUT_SECONDS = 30.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Look:
    """The result of one look, and what was done about it."""

    version: str
    """What the channel holds."""
    under_way: bool
    told: str
    """One sentence on both."""


@dataclass
class Driver:
    """Judges one channel's rollout.

    Args:
        store: where the channel is.
        name: pipeline and channel.
        rollout: the channel's policy.
        servers: addresses of the servers (or routers) that answer the channel's requests.
        trust: the keys and policies that judge the channel's entries; None: they are not checked.
        hand: who signs the entries that are written.
    """

    store: Store
    name: tuple[str, str]
    rollout: Rollout
    servers: Sequence[str]
    trust: Trust | None = None
    hand: Hand = field(default_factory=Hand)
    keys: dict[tuple[str, int], dict[str, Mapping[str, Any]]] = field(default_factory=dict)
    """By candidate and share: the keys that were reported so far, so that a server's restart loses none of them."""

    def look(self) -> Look:
        """Look once; at most one entry is written.

        Raises:
            StoreError: the store does not answer, or the channel's history was changed.
            PromotionError: what would be promoted is not what was started.
            UntrustedError: the channel's newest entry does not count.
        """
        head, _ = judged_head(self.store, *self.name, self.trust)
        if head is None:
            raise PromotionError(f"nothing was ever promoted into {self.name[1]} of {self.name[0]}")
        if head.change.rollout is None:
            return Look(head.change.version, False, f"{head.change.action}: {head.change.reason}")
        standing = self.judge(head)
        try:
            after = self._decide(head, standing)
        except ConflictError as error:
            return Look(head.change.version, True, str(error))
        return Look(after.change.version, after.change.rollout is not None, f"{after.change.holds}: {standing.reason}")

    def judge(self, head: Entry) -> Standing:
        """Judge the keys of the current share."""
        step = head.change.rollout
        assert step is not None
        known = self.keys.setdefault((step.version, step.share), {})
        for server in self.servers:
            for key in self._report(server, f"{self.name[0]}@{step.version}", step.share):
                known.setdefault(key["key"], key)
        return judge(*merged([{"keys": list(known.values())}]), rule_of(self.rollout, step.share))

    def _decide(self, head: Entry, standing: Standing) -> Entry:
        step = head.change.rollout
        assert step is not None
        if standing.decision == "back":
            return go_back(self.store, head, reason=standing.reason, hand=self.hand)
        if self._time_at_share(head) < as_time(self.rollout.hold):
            return head
        if not self._may_move_on:
            return head  # whoever has a promoter's key moves it on
        if standing.decision == "on":
            return move(self.store, head, self.rollout, on=True, reason=standing.reason, hand=self.hand)
        if step.step == "hold":
            return head
        return move(self.store, head, self.rollout, on=False, reason=standing.reason, hand=self.hand)

    @property
    def _may_move_on(self) -> bool:
        """Whether the key, if there is one, may sign more than going back."""
        if self.hand.keys is None or self.hand.key is None:
            return True
        return PROMOTER in self.hand.keys.own(self.hand.key, now=datetime.now(UTC))[1].roles

    def _time_at_share(self, head: Entry) -> timedelta:
        """How long the candidate has had its share, by the store's clock."""
        since = head.change.time
        for entry in channels.backwards(self.store, *self.name):
            step = entry.change.rollout
            if step is None or head.change.rollout is None or step.share != head.change.rollout.share:
                break
            since = entry.change.time
        return (self.store.now() or datetime.now(UTC)) - since

    def _report(self, server: str, candidate: str, share: int) -> list[Mapping[str, Any]]:
        """A server's keys at the current share; none if it does not answer or is not at that share yet."""
        try:
            answer = httpx.get(f"{server.rstrip('/')}/v1/rollouts", headers=_headers(), timeout=_TIMEOUT_SECONDS)
            found = answer.json().get("@".join(self.name)) if answer.is_success else None
            if found and (found["candidate"], round(found["share"] * 100)) == (candidate, share):
                merged([found])  # raises where a figure is missing
                return list(found["keys"])
            problem = f"status {answer.status_code}, or another share"
        except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
            problem = one_line(str(error) or repr(error))
        else:
            if answer.status_code in (401, 403):
                raise ConfigError(
                    f"{server} answers {answer.status_code}; set {ADMIN_TOKENS_VARIABLE} to one of its administrators' "
                    "tokens"
                )
        logger.warning("%s does not say what its keys got: %s", server, problem)
        return []


def rule_of(rollout: Rollout, share: int) -> Rule:
    """The judge's rule at a share in percent."""
    given: RolloutJudge = rollout.judge
    margins = given.margins
    return Rule(
        share=share / 100,
        num_shares=sum(each < 100 for each in rollout.shares),
        alpha=given.alpha,
        margins={
            "errors": margins.errors,
            "slower": as_margin(margins.latency),
            "longer": as_margin(margins.length),
            "shorter": as_margin(margins.length),
            "refusals": margins.refusals,
            "unended": margins.unended,
            "feedback": margins.feedback,
        },
    )


def open_driver(pipeline: str, channel: str, servers: Sequence[str]) -> Driver:
    """A driver for a channel of the project in the current folder.

    Raises:
        ConfigError: pipelines.yaml has no such pipeline, channel or rollout, there are keys and none to sign with, or
            no keys.yaml says whose signatures count.
    """
    loaded = settings.load()
    store = open_store(loaded.store_url(pipeline), seen=default_cache(Path.cwd()) / "seen")
    rollout = loaded.channels[loaded.known_channel(channel)].rollout
    if rollout is None:
        raise ConfigError(f"channels.{channel} of {loaded.path.name} has no `rollout`; write its shares there")
    if not servers:
        raise ConfigError("no server was named; give the address of each that answers the channel's requests")
    trust = open_trust(loaded.root, loaded.channels)
    return Driver(store, (pipeline, channel), rollout, servers, trust, _hand(trust))


def _hand(trust: Trust | None) -> Hand:
    if trust is None:
        return Hand()
    if not (key := os.environ.get(CHANNEL_KEY)):
        raise ConfigError(
            f"each step has to be signed: set {CHANNEL_KEY} to a private key whose public half has the role `promoter` "
            "in keys.yaml, or `rollback` to go back only (docs/security.md)"
        )
    return Hand(trust.keys, Path(key).expanduser())


def drive(
    driver: Driver,
    *,
    every_seconds: float,
    tell: Callable[[str], None],
    pause: Callable[[float], None] = time.sleep,
) -> Look:
    """Look until the rollout is over. While the store does not answer, nothing changes; the next look tries again."""
    told = None
    while True:
        try:
            look = driver.look()
        except StoreError as error:
            look = Look("", True, f"nothing was decided: {error}")
        if look.told != told:
            tell(one_line(look.told))
            told = look.told
        if not look.under_way:
            return look
        pause(every_seconds)


def _headers() -> dict[str, str]:
    token = os.environ.get(ADMIN_TOKENS_VARIABLE, "").partition(",")[0].strip()
    return {"authorization": f"Bearer {token}"} if token else {}
