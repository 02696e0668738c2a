"""Tell receivers about a channel's promotions and rollbacks, by signed messages: Standard Webhooks.

The channel's log is the list of what to tell, so nothing has to be written before or together with an entry: whoever
looks next sends what no mark says was received, ``told/<pipeline>/<channel>/<receiver>/0000000042.json``. A promoter
that dies after its entry therefore loses no message, and one that dies before its mark sends the message again under
the same ``webhook-id``, by which receivers drop what they know. A receiver that is down changes nothing in the channel.

Source: https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md: three headers,
``webhook-id``, ``webhook-timestamp`` (of the try, in seconds) and ``webhook-signature``, which is ``v1,`` and the
base64 of HMAC-SHA256 over ``id.timestamp.body``; any 2xx answer is a receipt, redirects are not followed.
"""

import base64
import binascii
import hashlib
import hmac
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial

import httpx

from graftline.address import mask_secrets
from graftline.digest import of_bytes
from graftline.errors import ConfigError, GraftlineError
from graftline.plain_text import one_line
from graftline.registry.channel import Entry, Log
from graftline.registry.log_checkpoints import recall
from graftline.registry.store import Store
from graftline.registry.trust import EntryJudge, Trust
from graftline.retry import Retry, may_pass
from graftline.settings.webhooks import Webhook

GIVEN_UP = timedelta(days=3)
"""A message that no try within this time has delivered is not sent any more; a new receiver gets no older ones."""
_TIMEOUT = httpx.Timeout(15.0, connect=5.0)
_RETRY = Retry(attempts=4, base_seconds=0.5, deadline_seconds=20.0)
_PREFIX = "whsec_"
_KINDS = {"promote": "release.promoted", "rollback": "release.rolled_back", "rollout": "release.rollout_started"}


def sign(secrets: Iterable[bytes], message_id: str, timestamp: int, body: bytes) -> str:
    """The header ``webhook-signature``: one signature for each secret, separated by spaces."""
    signed = b"%b.%d.%b" % (message_id.encode(), timestamp, body)
    made = (base64.b64encode(hmac.digest(secret, signed, hashlib.sha256)).decode() for secret in secrets)
    return " ".join(f"v1,{signature}" for signature in made)


def read_secrets(variable: str) -> tuple[bytes, ...]:
    """The secrets in an environment variable; ConfigError, which does not show them, if it holds none."""
    words = os.environ.get(variable, "").split()
    try:
        found = tuple(base64.b64decode(word.removeprefix(_PREFIX), validate=True) for word in words)
    except (binascii.Error, ValueError):
        found = ()
    if (
        not found
        or not all(word.startswith(_PREFIX) for word in words)
        or not all(24 <= len(key) <= 64 for key in found)
    ):
        state = "holds something else" if words else "is not set"
        raise ConfigError(
            f"the variable {variable} {state}; expected {_PREFIX} and 24 to 64 bytes in base64, the receiver's secret: "
            f"echo {_PREFIX}$(openssl rand -base64 32)"
        )
    return found


@dataclass(frozen=True)
class Message:
    """What receivers get for one entry; the same bytes whenever they are made."""

    id: str
    body: bytes


def message(entry: Entry) -> Message | None:
    """The message about an entry; None for a rollout's later steps, which change shares only."""
    change, step = entry.change, entry.change.rollout
    if step and step.step != "start":
        return None
    data = {
        "pipeline": entry.pipeline,
        "channel": entry.channel,
        "entry": entry.number,
        "entry_digest": str(entry.digest),
        "version": change.version,
        "release": str(change.release),
        "actor": change.actor,
        "reason": change.reason,
    }
    if step:
        data["candidate"] = {"version": step.version, "release": str(step.release), "percent_of_keys": step.share}
    told = {"type": _KINDS[change.action], "timestamp": f"{change.time:%Y-%m-%dT%H:%M:%SZ}", "data": data}
    body = json.dumps(told, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
    return Message(f"msg_{entry.digest.hex}", body)


@dataclass
class Telling:
    """What one round of telling did."""

    told: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Teller:
    """Tells the receivers of one pipeline's channels."""

    store: Store
    pipeline: str
    trust: Trust | None
    """Keys and policies that judge the channel's entries: what does not count is not told. None: nothing is checked."""
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    retry: Retry = _RETRY

    def tell(self, channel: str, webhooks: Sequence[Webhook]) -> Telling:
        """Send each receiver the messages that it has not got yet, oldest first.

        A receiver that cannot be reached gets no further message in this round; one that refuses a message is sent the
        next ones. Returns what was told, and a sentence for everything that was not: nothing is raised, because the
        entries are already in the channel.
        """
        found = Telling()
        if not webhooks:
            return found
        try:
            outstanding = list(self._outstanding(channel, found))
        except GraftlineError as error:
            found.problems.append(f"nobody was told about {channel} of {self.pipeline}: {error}")
            return found
        with httpx.Client(timeout=_TIMEOUT, follow_redirects=False) as client:
            for webhook in webhooks:
                try:
                    self._tell_one(client, channel, webhook, outstanding, found)
                except GraftlineError as error:
                    found.problems.append(f"{shown_address(webhook)} was not told: {error}")
        return found

    def _outstanding(self, channel: str, found: Telling) -> Iterator[tuple[Entry, Message]]:
        """The entries that are new enough to be told about, and count."""
        now = self.now()
        judge = EntryJudge(self.store, self.pipeline, self.trust, now=now) if self.trust else None
        log = judge.read(channel, may_be_stale=True).log if judge else recall(self.store, self.pipeline, channel)
        for index in _recent(log, now):
            entry = log.entries[index]
            if judge and (problem := judge.why_not(log, index)):
                found.problems.append(f"nobody is told of entry {entry.number} of {channel}: it {problem}")
            elif told := message(entry):
                yield entry, told

    def _tell_one(
        self,
        client: httpx.Client,
        channel: str,
        webhook: Webhook,
        outstanding: Sequence[tuple[Entry, Message]],
        found: Telling,
    ) -> None:
        secrets, folder = read_secrets(webhook.secret), folder_of(self.pipeline, channel, webhook)
        marks = set(self.store.list(folder))
        for entry, told in outstanding:
            mark = f"{folder}/{entry.number:010d}.json"
            if mark in marks and self.store.get(mark) == _mark(entry):
                continue
            name = f"entry {entry.number} of {channel}"
            try:
                self.retry.call(partial(_post, client, webhook, secrets, told), transient=_is_transient)
            except httpx.HTTPStatusError as error:
                status = error.response.status_code
                found.problems.append(f"{shown_address(webhook)} answered {status} to {name}; {_advice(status)}")
                if may_pass(status):
                    return
            except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
                problem = one_line(mask_secrets(str(error) or type(error).__name__))
                found.problems.append(f"{shown_address(webhook)} was not told of {name}: {problem}; {_LATER}")
                return
            else:
                found.told.append(f"{shown_address(webhook)} was told of {name}")
                self._note(mark, entry, found)

    def _note(self, mark: str, entry: Entry, found: Telling) -> None:
        try:
            self.store.put_bytes(mark, _mark(entry))
        except GraftlineError as error:
            found.problems.append(f"{mark} cannot be written, so the message will be sent again: {error}")


def folder_of(pipeline: str, channel: str, webhook: Webhook) -> str:
    """Where the marks of a receiver are."""
    return f"told/{pipeline}/{channel}/{of_bytes(webhook.url.encode()).short}"


def _recent(log: Log, now: datetime) -> Iterator[int]:
    return (index for index, entry in enumerate(log.entries) if now - entry.change.time < GIVEN_UP)


def _mark(entry: Entry) -> bytes:
    # With the digest: after a channel was restored from a copy, another entry may have this number.
    return (json.dumps({"entry": str(entry.digest)}) + "\n").encode()


def _post(client: httpx.Client, webhook: Webhook, secrets: Sequence[bytes], told: Message) -> None:
    timestamp = int(time.time())
    headers = {
        "content-type": "application/json",
        "user-agent": "graftline",
        "webhook-id": told.id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": sign(secrets, told.id, timestamp, told.body),
    }
    # Streamed, because the answer's body is not needed and may be endless.
    with client.stream("POST", webhook.url, content=told.body, headers=headers) as answer:
        if not answer.is_success:
            raise httpx.HTTPStatusError(f"status {answer.status_code}", request=answer.request, response=answer)


def _is_transient(error: Exception) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return may_pass(error.response.status_code)
    return isinstance(error, httpx.TransportError) and not isinstance(error, httpx.UnsupportedProtocol)


_LATER = "it is sent again by the next promotion or rollback, flows.nightly or `graftline tell`"


def _advice(status: int) -> str:
    if status == 410:
        return "it wants no more messages: remove it from pipelines.yaml"
    if 300 <= status < 400:
        return "redirects are not followed: write the new address into pipelines.yaml"
    return _LATER


def shown_address(webhook: Webhook) -> str:
    """A receiver's address without its query, which often holds a token."""
    return mask_secrets(webhook.url.partition("?")[0])
