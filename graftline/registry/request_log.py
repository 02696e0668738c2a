"""A request log in its store: parts of JSON lines, each written once and removed when its time is over.

```
requests/<pipeline>/<channel>/<YYYY-MM-DD>/<HHMMSS>-<server>-<number>.jsonl
```

A line is a request with its answer, or a user's rating of an answer, which may come later and from another part. Texts
are as `graftline.serve.removal` left them.
"""

import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from graftline.digest import of_json
from graftline.errors import DataError
from graftline.plain_text import one_line
from graftline.registry.objects import ListedObject, check_name
from graftline.registry.store import Store

REMOVED = "[removed]"
"""What stands in place of a text that was removed."""
SUFFIX = ".jsonl"

logger = logging.getLogger(__name__)

_Id = Annotated[str, StringConstraints(min_length=1, max_length=200)]
_Count = Annotated[int, Field(ge=0)]


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    format: Literal[1] = 1
    id: _Id
    """The answer's, as the client got it."""
    time: AwareDatetime
    """When the request or the rating came, by the server's clock."""


class LoggedRequest(_Line):
    """A request and its answer."""

    kind: Literal["request"] = "request"
    model: str
    """The name that was asked for, ``pipeline@channel``."""
    release: str
    """What answered, ``pipeline@version``."""
    digest: str
    """The release's, of its manifest."""
    key: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
    """Hash of the user or the conversation."""
    messages: list[dict[str, Any]] | None
    """A chat's turns as the template got them; None: a plain completion."""
    prompt: str | None
    """A plain completion's text; None: a chat."""
    tools: list[dict[str, Any]]
    answer: dict[str, Any]
    """The answer as a turn."""
    ended: Literal["answered", "failed", "left", "refused"]
    """``left``: the client disconnected before the end."""
    finish_reason: str | None
    """None: it did not end."""
    seconds: Annotated[float, Field(ge=0)]
    """Until the last token."""
    prompt_tokens: _Count
    completion_tokens: _Count
    removed_from_prompt: _Count
    """How many pieces of text were removed, from tools too."""
    removed_from_answer: _Count

    @property
    def content(self) -> str:
        """Short digest of what a reviewer saw: prompt, tools and answer."""
        # A letter first, or a spreadsheet would take 1234567890e1 for a number.
        return f"c{of_json([self.messages, self.prompt, self.tools, self.answer]).short}"


class LoggedRating(_Line):
    """A user's rating of an answer; the last one counts."""

    kind: Literal["rating"] = "rating"
    rating: Literal["good", "bad"]


Logged = LoggedRequest | LoggedRating
_READER: TypeAdapter[Logged] = TypeAdapter(Annotated[Logged, Field(discriminator="kind")])


@dataclass(frozen=True)
class LogPlace:
    """The log of a channel: its store, and how long what is in it counts."""

    store: Store
    pipeline: str
    channel: str
    retention_days: int

    @property
    def name(self) -> str:
        """The name that clients ask for."""
        return f"{self.pipeline}@{self.channel}"

    @property
    def folder(self) -> str:
        """Key of the log's folder."""
        return f"requests/{check_name('pipeline', self.pipeline)}/{check_name('channel', self.channel)}"

    def part_key(self, server: str, number: int, now: datetime) -> str:
        """Key of a new part."""
        return f"{self.folder}/{now:%Y-%m-%d}/{now:%H%M%S}-{server}-{number}{SUFFIX}"

    def read(self, *, now: datetime | None = None) -> Iterator[Logged]:
        """All lines of all `parts`; one part is in memory at a time.

        Raises:
            DataError: a line is not right, or an answer is there twice; part and line are named.
            StoreError: the store cannot be read.
        """
        seen: dict[str, tuple[str, int]] = {}
        for key in self.parts(now=now):
            for number, logged in enumerate(self.read_part(key), start=1):
                if isinstance(logged, LoggedRequest):
                    part, line = seen.setdefault(logged.id, (key, number))
                    if (part, line) != (key, number):
                        raise DataError(
                            f"{self.store.url}/{key}, line {number}: answer {logged.id} is in {part}, line {line} "
                            "already; remove what was copied"
                        )
                yield logged

    def parts(self, *, now: datetime | None = None) -> list[str]:
        """Keys of the parts whose time is not over, oldest first; StoreError if the store cannot be read."""
        return [part.key for part in self._parts() if not self._is_over(part, now or datetime.now(UTC))]

    def read_part(self, key: str) -> Iterator[Logged]:
        """The lines of one part; raises as `read`."""
        data = self.store.get(key) or b""
        for number, line in enumerate(data.split(b"\n")[:-1], start=1):
            yield _parse(line, f"{self.store.url}/{key}, line {number}")
        if not data.endswith(b"\n") and data:
            raise DataError(f"{self.store.url}/{key} does not end with a line end; it was cut: remove it")

    def expire(self, *, now: datetime | None = None) -> int:
        """Delete the parts whose time is over; returns how many.

        Raises:
            StoreError: the store cannot be read, or refuses.
        """
        over = [part for part in self._parts() if self._is_over(part, now or datetime.now(UTC))]
        for part in over:
            self.store.delete(part.key)
        for write in self.store.unfinished(self.folder):  # a killed server's, which hold text too
            if (now or datetime.now(UTC)) - write.modified > timedelta(days=self.retention_days):
                self.store.discard(write)
        return len(over)

    def _parts(self) -> list[ListedObject]:
        return [part for part in self.store.listing(self.folder) if part.key.endswith(SUFFIX)]

    def _is_over(self, part: ListedObject, now: datetime) -> bool:
        """By the name's date or the store's, whichever is older: a copied part is as old as it was."""
        written = part.modified
        with suppress(ValueError, IndexError):
            day, name = part.key.removeprefix(f"{self.folder}/").split("/")
            written = min(written, datetime.strptime(f"{day} {name[:6]}", "%Y-%m-%d %H%M%S").replace(tzinfo=UTC))
        return now - written > timedelta(days=self.retention_days)


def _parse(line: bytes, place: str) -> Logged:
    try:
        return _READER.validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        told = first["msg"].replace(" at line 1 column", " at column")
        reason = one_line(f"{where}: {told}" if where else told)
        raise DataError(f"{place}: not a line of a request log: {reason}; remove the part, or restore it") from error
