"""The schema of pipelines.yaml, second part: the policies of channels, and the document as a whole."""

from datetime import timedelta
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, StringConstraints

from graftline.settings.fields import Listed, Name, Section, Switch, Text
from graftline.settings.model import Pipeline, ServedBy
from graftline.settings.webhooks import Webhook

Share = Annotated[float, Field(ge=0, lt=1)]
Factor = Annotated[float, Field(gt=1, le=1000)]
Duration = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,5}[smhd]$")]
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def as_time(duration: str) -> timedelta:
    """The time that a `Duration` says: ``30m`` is half an hour."""
    return timedelta(**{_UNITS[duration[-1]]: int(duration[:-1])})


class Approvals(Section):
    """Who must sign before a promotion."""

    count: Annotated[int, Field(ge=0, le=100)] = 0
    """Different people who must sign."""
    roles: tuple[Name, ...] = ()
    """Roles of which each must be among the signers; roles are listed beside the keys in the repository."""
    valid_hours: Annotated[float, Field(gt=0, le=100_000)] = 168.0
    """Hours after which an approval no longer counts."""
    other_than_builder: bool = False
    """Whether at least one signer must be somebody else than who signed the release."""


class FreezeWindow(Section):
    """A time in which nothing is promoted."""

    starts: AwareDatetime
    """First moment, ISO 8601 with time zone: 2026-12-24T00:00:00Z."""
    ends: AwareDatetime
    """Last moment, ISO 8601 with time zone."""
    reason: Text
    """Shown to anyone who tries to promote in that time."""


class RolloutMargins(Section):
    """How much worse than the incumbent a candidate may be on live requests without counting as worse."""

    errors: Share = 0.02
    """Share of requests that fail: a 5xx, or an answer that breaks off."""
    latency: Factor = 1.25
    """Seconds of an answer, as a factor."""
    length: Factor = 1.5
    """Tokens of an answer, as a factor: that many times longer, or shorter."""
    refusals: Share = 0.05
    """Share of answers that begin with one of `refusals`."""
    unended: Share = 0.05
    """Share of answers that were cut at their length or did not end."""
    feedback: Share = 0.05
    """Mean rating, from 0 (all good) over 0.5 (none) to 1 (all bad)."""


class RolloutJudge(Section):
    """How sure a rollout's decisions must be, and what they are based on (docs/rollouts.md)."""

    alpha: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    """Largest probability of going back from a candidate within `margins`, and of moving on with one outside them."""
    margins: RolloutMargins = RolloutMargins()
    """How much worse a candidate may be without counting as worse."""
    window: Duration = "10m"
    """How long a key's requests are observed. Those that begin in the first half count; those that have not ended when
    it is over count as never ended."""
    refusals: Annotated[Listed[Text], Field(max_length=100)] = (
        "I can't",
        "I cannot",
        "I can’t",
        "I'm sorry",
        "I’m sorry",
        "I am sorry",
        "I'm unable",
        "I am unable",
        "I won't",
        "As an AI",
    )
    """Beginnings of answers that count as refusals; case does not matter."""


class Rollout(Section):
    """A release enters the channel by shares of its traffic; `flows/rollout.py` decides on the next one."""

    shares: Annotated[Listed[Annotated[int, Field(ge=1, le=100)]], Field(min_length=2, max_length=20)]
    """Percent of keys (users, conversations) that the candidate answers, one after another; the last is 100."""
    hold: Duration = "30m"
    """Least time at each share: 90s, 30m, 2h or 1d."""
    mirror: Annotated[int, Field(ge=0, le=100)] = 0
    """Percent of the incumbent's keys whose requests the candidate also answers, unseen by users; only metrics show
    these answers."""
    judge: RolloutJudge = RolloutJudge()
    """How sure the decisions must be."""


class Drift(Section):
    """Whether users ask other things than the release in production was trained on (docs/request-log.md)."""

    alpha: Annotated[float, Field(gt=0, le=0.5)] = 0.01
    """Largest probability of a false alarm about a release, however often `flows.watch` looks."""
    retrain: Switch = False
    """Start the flow `retrain` once for each release that drift is found for; by default it is only told."""


class RequestLog(Section):
    """Requests to the channel, and our server's answers, kept to learn from (docs/request-log.md)."""

    store: Text
    """Folder (relative to pipelines.yaml) or s3://bucket/prefix for the log. Whoever may read it reads what users
    wrote, so it is not a release store."""
    percent: Annotated[float, Field(gt=0, le=100)] = 100.0
    """Percent of keys (users, conversations) whose requests are logged, all of a key's or none."""
    remove: Annotated[Listed[Text], Field(max_length=100)] = ()
    """Regular expressions (RE2) of what is replaced by `[removed]` before anything is written, beside passwords, keys
    and tokens, which always are."""
    retention_days: Annotated[int, Field(ge=1, le=3650)] = 30
    """Days after which what was logged is deleted, and no longer read."""
    drift: Drift | None = None
    """Have `flows.watch` compare prompts with training rows; not when left out."""


class ChannelPolicy(Section):
    """What a release needs to enter a channel."""

    verdicts: Annotated[tuple[Literal["pass", "inconclusive"], ...], Field(min_length=1)] = ("pass",)
    """Gate verdicts that may be promoted."""
    approvals: Approvals = Approvals()
    """Signed approvals that are needed."""
    after: Name | None = None
    """Channel in which a release must have been before; any release when left out."""
    soak_hours: Annotated[float, Field(ge=0, le=100_000)] = 0.0
    """Hours that the release must have stayed in the channel `after`."""
    freeze_windows: tuple[FreezeWindow, ...] = ()
    """Times in which nothing is promoted; rollback is always allowed."""
    anchor: Switch | None = None
    """Also compare with a pinned release, the anchor (docs/promotion.md). By default on if nobody has to approve."""
    reserve: Switch = False
    """A release must meet the gates on rows that only promotions look at, too (`data.reserve_rows`); each look is
    counted."""


class Channel(ChannelPolicy):
    """The policy of a channel, such as staging or production."""

    rollout: Rollout | None = None
    """Shares of the traffic by which a release enters; at once when left out."""
    served_by: ServedBy | None = None
    """What serves the channel's adapters. A pipeline that releases into it is checked as with `base.served_by`, and a
    release whose adapter vLLM cannot load is not promoted."""
    request_log: RequestLog | None = None
    """Keep requests and answers to learn from; nothing is kept when left out."""
    webhooks: Annotated[Listed[Webhook], Field(max_length=20)] = ()
    """Who is told when a release enters the channel, wholly or by its first share, and when the channel goes back."""
    earlier: tuple[ChannelPolicy, ...] = ()
    """Policies that the channel had before: each entry is judged by the policy it was made under."""
    head_hours: Annotated[float, Field(gt=0, le=100_000)] = 168.0
    """Hours after which the newest entry, or a statement of `graftline refresh` that it is still the newest, is too old
    for a reader that sees the channel for the first time; a reader that has seen it before only reports this."""


class Document(Section):
    """The whole of pipelines.yaml."""

    pipelines: Annotated[dict[Name, Pipeline], Field(min_length=1)]
    """Pipelines by name: small letters, digits and hyphens."""
    channels: Annotated[dict[Name, Channel], Field(min_length=1)]
    """Policies of the channels that releases are promoted to, by name."""
