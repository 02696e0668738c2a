"""Do users ask other things than the release in production was trained on? Looked at by `flows.watch`.

The release brings its training prompts (`graftline.workflow.drift_profile`). Each key of the request log counts once,
with its first prompt that this release answered. What was compared is kept in the log's store, as numbers without
text, so that the test goes on where it stopped, on any machine, when the log itself is long deleted.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from graftline import settings
from graftline.digest import of_bytes, of_json
from graftline.errors import DataError, ReleaseError
from graftline.evaluate.statistics.drift import NUMBERS, DriftTest, Prompt
from graftline.plain_text import count
from graftline.registry.releases import load_manifest, release_key
from graftline.registry.request_log import LoggedRequest, LogPlace
from graftline.registry.store import Store, open_store
from graftline.registry.trust import judged_head, open_trust
from graftline.workflow.drift_profile import PROMPTS_FILE, opening, prompt_of, read_prompts

MAX_KEYS = 5_000
"""Keys compared for one release: drift that so many do not show is small."""
MIN_PROMPTS = 20
_SETTLED = timedelta(minutes=5)
"""Age from which no older part is expected any more."""


@dataclass(frozen=True)
class Found:
    """What a look at one pipeline found."""

    version: str
    has_drifted: bool
    retrain: bool
    """Whether to retrain now; true once for each release."""
    told: str
    """One sentence with numbers."""


@dataclass
class _State:
    """What was compared so far."""

    until: str = ""
    """Key of the last part that was read."""
    keys: dict[str, list[float]] = field(default_factory=dict)
    """By key's hash, in order, the numbers of its prompt."""
    directions: list[list[float]] | None = None
    """Of the first look, by which the numbers were computed."""
    asked: bool = False
    """Whether a retraining was asked for."""


def look(config: settings.Config, pipeline: str, *, now: datetime | None = None) -> Found | None:
    """Read what is new in the log of a pipeline's channel and judge; None where drift is not looked for.

    Raises:
        GraftlineError: the log, the release or the channel cannot be read.
    """
    channel = config.pipeline(pipeline).release.channel
    section = config.request_log(channel)
    if section is None or section.drift is None:
        return None
    store = open_store(config.store_url(pipeline))
    head, _ = judged_head(store, pipeline, channel, open_trust(config.root, config.channels))
    if head is None:
        return Found("", False, False, f"drift: nothing was ever promoted into {channel}")
    version = head.change.version
    prompts = _prompts_of(store, pipeline, version)
    if len(prompts) < MIN_PROMPTS:
        wanted = f"{PROMPTS_FILE} with {MIN_PROMPTS} prompts"
        told = f"drift: release {version} has no {wanted}; release again, with texts shown"
        return Found(version, False, False, told)
    place = LogPlace(open_store(section.store), pipeline, channel, section.retention_days)
    state = _load(place, version)
    try:
        test = DriftTest(prompts, section.drift.alpha, state.directions)
    except ValueError as error:
        raise _unreadable(place, version, error) from error
    state.directions = test.directions
    _read_on(place, version, test, state, now or datetime.now(UTC))
    for key, numbers in state.keys.items():
        test.add_numbers(numbers, _draw(version, key))
    retrain = bool(test.found) and section.drift.retrain and not state.asked
    state.asked = state.asked or retrain
    place.store.put_bytes(_state_key(place, version), json.dumps({"format": 1, **vars(state)}).encode())
    return Found(version, bool(test.found), retrain, _told(test, version))


def _prompts_of(store: Store, pipeline: str, version: str) -> list[Prompt]:
    """A release's training prompts, compared with its manifest; empty if it has none."""
    manifest = load_manifest(store, pipeline, version)
    digest = next((entry.digest for entry in manifest.files if entry.path == PROMPTS_FILE), None)
    if digest is None:
        return []
    data = store.get(release_key(pipeline, version, PROMPTS_FILE)) or b""
    if of_bytes(data) != digest:
        raise ReleaseError(f"{PROMPTS_FILE} of release {version} is missing or damaged in {store.url}; release again")
    return read_prompts(data, version)


def _read_on(place: LogPlace, version: str, test: DriftTest, state: _State, now: datetime) -> None:
    """Add the keys of the parts that are new and settled."""
    settled = place.part_key("", 0, now - _SETTLED)
    for part in place.parts(now=now):
        if not state.until < part < settled:
            continue
        for one in place.read_part(part):
            if not isinstance(one, LoggedRequest) or one.release != f"{place.pipeline}@{version}":
                continue
            if one.key not in state.keys and len(state.keys) < MAX_KEYS:
                state.keys[one.key] = test.numbers(prompt_of(list(_texts(one))))
        state.until = part


def _texts(one: LoggedRequest) -> Iterator[str]:
    if one.messages is None:
        yield one.prompt or ""
        return
    turns = [(str(turn.get("role")), str(turn.get("content") or "")) for turn in one.messages]
    yield from opening(turns)


def _draw(version: str, key: str) -> float:
    """A number in (0, 1) that is the same at each look."""
    return (int(of_json([version, key]).hex[:13], 16) + 0.5) / 16**13


def _state_key(place: LogPlace, version: str) -> str:
    return f"drift/{place.pipeline}/{place.channel}/{version}.json"


def _load(place: LogPlace, version: str) -> _State:
    data = place.store.get(_state_key(place, version))
    if data is None:
        return _State()
    try:
        value: dict[str, Any] = json.loads(data)
        if value["format"] != 1:
            raise ValueError("it is of another format")
        if value["until"] and not str(value["until"]).startswith(f"{place.folder}/"):
            raise ValueError("it names a part of another log")
        keys = {str(key): _finite(numbers, len(NUMBERS)) for key, numbers in value["keys"].items()}
        directions = [_finite(row, None) for row in value["directions"]]
        state = _State(str(value["until"]), keys, directions, value["asked"] is True)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(place, version, error) from error
    return state


def _unreadable(place: LogPlace, version: str, error: Exception) -> DataError:
    where = f"{place.store.url}/{_state_key(place, version)}"
    return DataError(f"{where} cannot be read ({error}); remove it to begin anew")


def _finite(given: Any, length: int | None) -> list[float]:
    numbers = [float(number) for number in given]
    if length not in (None, len(numbers)) or not all(map(math.isfinite, numbers)):
        raise ValueError("other numbers than are compared here")
    return numbers


def _told(test: DriftTest, version: str) -> str:
    """The result in a sentence, with the evidence and how far prompts lie from the middle."""
    shown = ", ".join(
        f"{name} {wealth:.3g} (mean rank {rank:.2f})"
        for name, wealth, rank in zip(NUMBERS, test.highest, test.mean_ranks, strict=True)
    )
    needed = f"evidence, of {len(NUMBERS) / test.alpha:.0f} needed: {shown}"
    keys = f"{count(test.num_prompts, 'key')} of {version}"
    if test.found:
        return f"prompts have drifted from the training rows: {', '.join(test.found)}; {keys}; {needed}"
    return f"no drift of prompts found; {keys}; {needed}"
