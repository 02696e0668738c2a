"""Two versions behind one name: which version each key gets, and figures of the answers that each key got.

A key is what a client sends as ``safety_identifier``, ``user`` or ``prompt_cache_key``; without one, the beginning of
the conversation, which is the same in every turn. Its hash with the rollout's salt is a place in [0, 1): if that is
below the share, the candidate answers. So a key has the same version on every server, and a larger share only moves
keys to the candidate.

For each key a hash, counts and sums are kept; no text. Keys are observed for a window that begins with their first
request. Its length does not depend on the answers, so slow ones are neither waited for nor forgotten.
"""

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from graftline.serve.judge import Bools, Floats

Arm = Literal["incumbent", "candidate"]
Rating = Literal["good", "bad"]

MAX_KEYS = 200_000
"""Keys kept for one share; later ones are answered but not judged."""
MAX_ANSWERS = 100_000
"""Answers that can still be rated; the oldest are forgotten."""
REFUSAL_CHARACTERS = 200
"""Characters of an answer's beginning, which is looked at but not kept."""
_KEY_FIELDS = ("safety_identifier", "user", "prompt_cache_key")
_EPSILON = 1e-3


@dataclass(frozen=True, kw_only=True)
class Split:
    """A channel's traffic during a rollout."""

    channel: str
    """``pipeline@channel``: the name that clients ask for."""
    salt: str
    """The rollout's salt: the same on every server, and not known to anybody before the start."""
    incumbent: str
    """Name of the incumbent, ``pipeline@version``."""
    candidate: str
    share: float
    """Probability that a key is the candidate's, between 0 and 1."""
    mirror: float = 0.0
    """Probability that the candidate also answers the requests of one of the incumbent's keys."""
    window_seconds: float = 600.0
    refusals: tuple[str, ...] = ()
    """Beginnings of answers that count as refusals."""

    def arm(self, key: str) -> Arm:
        """Which version answers a key."""
        return "candidate" if self.place(key) < self.share else "incumbent"

    def is_mirrored(self, key: str) -> bool:
        """Whether the candidate also answers this key of the incumbent, unseen."""
        return self.arm(key) == "incumbent" and self.place(f"mirror {key}") < self.mirror

    def is_as(self, other: "Split") -> bool:
        """Whether keys seen under the other split still count."""
        return (self.channel, self.salt, self.share) == (other.channel, other.salt, other.share)

    def place(self, key: str) -> float:
        """The key's place in [0, 1)."""
        return int(self.hashed(key)[:13], 16) / 16**13

    def hashed(self, key: str) -> str:
        """The key as it is kept: 64 hex digits that reveal nothing without the key."""
        return hashlib.sha256(f"{self.salt}\n{key}".encode("utf-8", "surrogatepass")).hexdigest()

    def refuses(self, text: str) -> bool:
        """Whether an answer begins like a refusal."""
        begins = text.lstrip().casefold()
        return any(begins.startswith(refusal.casefold()) for refusal in self.refusals)


def key_of(fields: Mapping[str, Any], texts: Sequence[str]) -> str:
    """The key of a request.

    Args:
        fields: the request's body; the first field that names a user or a conversation counts.
        texts: the conversation up to the user's first turn, for requests that name nobody.
    """
    for name in _KEY_FIELDS:
        if isinstance(given := fields.get(name), str) and given:
            return f"{name}: {given}"
    return "text: " + "\n".join(texts)


@dataclass(frozen=True, kw_only=True)
class Answered:
    """How one request ended."""

    failed: bool = False
    seconds: float | None = None
    """None: it failed."""
    tokens: int | None = None
    refused: bool = False
    ended: bool = True
    """False: cut at its length."""


@dataclass
class _Key:
    arm: Arm
    first: float
    """Time of its first request, seconds since 1970."""
    requests: int = 0
    running: int = 0
    failed: int = 0
    refused: int = 0
    unended: int = 0
    timed: int = 0
    log_seconds: float = 0.0
    counted: int = 0
    log_tokens: float = 0.0
    ratings: dict[str, Rating] = field(default_factory=dict)

    def figures(self) -> dict[str, float | None]:
        """The key's figures as the judge reads them (graftline.serve.judge.COLUMNS)."""
        n = max(self.requests, 1)
        bad = sum(1 if rating == "bad" else -1 for rating in self.ratings.values())
        return {
            "errors": self.failed / n,
            "seconds": float(np.exp(self.log_seconds / self.timed)) if self.timed else None,
            "tokens": float(np.exp(self.log_tokens / self.counted)) if self.counted else None,
            "refusals": self.refused / n,
            # A request still running when the window is over did not end.
            "unended": (self.unended + self.running) / n,
            "feedback": 0.5 + bad / (2 * n),
        }


class Watch:
    """One request that counts for its key; call `end` once."""

    def __init__(self, end: Callable[[Answered], None]) -> None:
        self._end: Callable[[Answered], None] | None = end

    def end(self, answered: Answered) -> None:
        """Say how it ended; only the first time counts."""
        end, self._end = self._end, None
        if end is not None:
            end(answered)


class Observed:
    """What one server has seen of each channel's keys at its current share; thread-safe.

    Args:
        now: the clock, seconds since 1970.
        max_keys: keys kept for one share.
    """

    def __init__(self, now: Callable[[], float] = time.time, *, max_keys: int = MAX_KEYS) -> None:
        self._now, self._max_keys = now, max_keys
        self._splits: dict[str, Split] = {}
        self._keys: dict[str, dict[str, _Key]] = {}
        self._answers: OrderedDict[str, tuple[Split, str]] = OrderedDict()
        self._lock = threading.Lock()

    def set(self, channel: str, split: Split | None) -> None:
        """Split a channel's traffic from now on (None: stop splitting). A new share begins without keys."""
        with self._lock:
            before = self._splits.pop(channel, None)
            if split is not None:
                self._splits[channel] = split
            if split is None or before is None or not split.is_as(before):
                self._keys[channel] = {}

    def split(self, channel: str) -> Split | None:
        """How a channel's traffic is split now."""
        with self._lock:
            return self._splits.get(channel)

    def begin(self, split: Split, key: str, arm: Arm) -> Watch | None:
        """Count a request; None if it does not count: the key's window is over, or there are too many keys."""
        hashed, now = split.hashed(key), self._now()
        with self._lock:
            current = self._splits.get(split.channel)
            if current is None or not current.is_as(split):
                return None
            keys = self._keys[split.channel]
            seen = keys.get(hashed)
            if seen is None:
                if len(keys) >= self._max_keys:
                    return None
                seen = keys[hashed] = _Key(arm, now)
            if not 0 <= now - seen.first <= split.window_seconds / 2:
                return None
            seen.requests += 1
            seen.running += 1
        return Watch(lambda answered: self._end(split, seen, answered))

    def can_be_rated(self, split: Split, key: str, answer: str) -> None:
        """Remember whose answer it is, so that it can be rated."""
        with self._lock:
            self._answers[answer] = (split, split.hashed(key))
            if len(self._answers) > MAX_ANSWERS:
                self._answers.popitem(last=False)

    def rate(self, answer: str, rating: Rating) -> bool:
        """Take a rating, which replaces an earlier one; False if the answer is unknown or from an earlier share."""
        with self._lock:
            known = self._answers.get(answer)
            split = self._splits.get(known[0].channel) if known else None
            if known is None or split is None or not split.is_as(known[0]):
                return False
            key = self._keys[split.channel].get(known[1])
            # No more ratings than requests: an answer that was not counted cannot be held against the version either.
            if key is None or not self._is_open(split, key):
                return False
            if answer in key.ratings or len(key.ratings) < key.requests:
                key.ratings[answer] = rating
            return True

    def report(self) -> dict[str, dict[str, Any]]:
        """By channel: the share, and the figures of the keys whose windows are over, in order of arrival."""
        with self._lock:
            return {
                channel: {
                    "candidate": split.candidate,
                    "share": split.share,
                    "keys": [
                        {"key": hashed, "first": key.first, "candidate": key.arm == "candidate"} | key.figures()
                        for hashed, key in sorted(self._keys[channel].items(), key=lambda item: item[1].first)
                        if not self._is_open(split, key)
                    ],
                }
                for channel, split in self._splits.items()
            }

    def _is_open(self, split: Split, key: _Key) -> bool:
        return 0 <= self._now() - key.first <= split.window_seconds

    def _end(self, split: Split, key: _Key, answered: Answered) -> None:
        with self._lock:
            if not self._is_open(split, key):
                return  # it stays among those that did not end
            key.running -= 1
            key.failed += answered.failed
            key.refused += answered.refused
            key.unended += not answered.ended
            if answered.seconds is not None:
                key.timed += 1
                key.log_seconds += float(np.log(max(answered.seconds, _EPSILON)))
            if answered.tokens is not None:
                key.counted += 1
                key.log_tokens += float(np.log(answered.tokens + 1))


def merged(reports: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Floats], Bools]:
    """The keys of one share from several servers' reports, in order of arrival, for `judge.judge`.

    A key that several servers answered counts once, with the figures of the server that saw it first.
    """
    first: dict[str, Mapping[str, Any]] = {}
    for one in sorted(
        (key for report in reports for key in report["keys"]), key=lambda key: (key["first"], key["key"])
    ):
        first.setdefault(one["key"], one)
    columns = ("errors", "seconds", "tokens", "refusals", "unended", "feedback")
    values = {
        name: np.array([np.nan if key[name] is None else key[name] for key in first.values()], dtype=np.float64)
        for name in columns
    }
    return values, np.array([key["candidate"] for key in first.values()], dtype=np.bool_)
