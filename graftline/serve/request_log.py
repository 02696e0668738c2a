"""Keeps requests and answers to learn from, where a channel's policy says so; off by default.

A request is noted when it has ended, and everything else happens on a thread: secrets are removed, lines are made, and
parts are written to the log's store. No request waits for that or fails because of it. While the store refuses, lines
wait in memory up to a limit; beyond it they are dropped and counted, and the log says so once.
"""

import hashlib
import json
import logging
import secrets
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from graftline.data.answer_parts import Said, joined
from graftline.errors import GraftlineError
from graftline.plain_text import count, one_line
from graftline.registry.request_log import LoggedRating, LoggedRequest, LogPlace
from graftline.serve.answers import RunningRequest
from graftline.serve.catalog import ServedModel
from graftline.serve.protocol import ChatRequest, CompletionRequest
from graftline.serve.removal import Remover
from graftline.serve.rollouts import MAX_ANSWERS, Rating
from graftline.serve.versions import request_key
from graftline.settings.channels import RequestLog as RequestLogSettings

MAX_PENDING_BYTES = 32 << 20
"""Of requests and lines in memory; more are dropped."""
MAX_LINE_BYTES = 1 << 20
PART_BYTES = 4 << 20
MAX_RATINGS = 5
"""Changes of mind about one answer that are kept."""
_EXPIRE_SECONDS = 3600.0
_STOP_SECONDS = 10.0

logger = logging.getLogger(__name__)


@dataclass
class _Channel:
    """One channel's log, and the lines that are not written yet."""

    place: LogPlace
    percent: float
    remover: Remover
    lines: list[bytes] = field(default_factory=list)
    number: int = 0
    written: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    unsure: tuple[str, int] | None = None
    """Key and number of lines of a write that failed, which the store may have done nevertheless."""
    problem: str | None = None
    """Why the store took nothing at the last try."""
    expired: float | None = None
    """When old parts were last deleted, by the monotonic clock."""

    def drop(self, reason: str, number: int = 1) -> None:
        self.dropped[reason] += number


@dataclass(frozen=True)
class _Note:
    """A request or a rating as it waits for the thread."""

    to: _Channel
    num_bytes: int
    rating: LoggedRating | None = None
    request: "_Request | None" = None


@dataclass(frozen=True, kw_only=True)
class _Request:
    body: ChatRequest | CompletionRequest
    served: ServedModel
    key: str
    began: datetime
    seconds: float
    exchange: RunningRequest
    said: Said


class OpenNote:
    """A request that will be logged when it has ended."""

    def __init__(self, log: "RequestLog", to: _Channel, body: ChatRequest | CompletionRequest, key: str) -> None:
        self._log, self._to, self._body, self._key = log, to, body, key
        self._began, self._clock = datetime.now(UTC), time.monotonic()

    def end(self, served: ServedModel, exchange: RunningRequest) -> None:
        """Note how it ended. Never raises."""
        try:
            said, seconds = joined(exchange.kept or ()), time.monotonic() - self._clock
            exchange.kept = None
            request = _Request(
                body=self._body,
                served=served,
                key=self._key,
                began=self._began,
                seconds=seconds,
                exchange=exchange,
                said=said,
            )
            self._log.add(_Note(self._to, _size(self._body, said), request=request))
        except Exception as error:  # noqa: BLE001  # the answer is sent whatever happens here
            _drop(self._to, error)


class RequestLog(Collector):
    """The request logs of the channels that one server follows; thread-safe, and a source of metrics.

    Args:
        channels: each place, and the channel's settings.
        flush_seconds: time between two writes.
        max_bytes: of requests and lines in memory.
    """

    def __init__(
        self,
        channels: Sequence[tuple[LogPlace, RequestLogSettings]],
        *,
        flush_seconds: float = 15.0,
        max_bytes: int = MAX_PENDING_BYTES,
    ) -> None:
        self._channels = {
            place.name: _Channel(place, settings.percent, Remover(settings.remove)) for place, settings in channels
        }
        self._flush_seconds, self._max_bytes = flush_seconds, max_bytes
        self._server = secrets.token_hex(4)
        self._notes: list[_Note] = []
        self._num_bytes = 0
        self._answers: OrderedDict[str, tuple[_Channel, list[Rating]]] = OrderedDict()
        self._lock, self._wake, self._stopped = threading.Lock(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="request-log", daemon=True)

    def start(self) -> None:
        """Write in the background, if there is anything to log."""
        if self._channels:
            self._thread.start()

    def stop(self) -> None:
        """Write what is left, for at most ten seconds."""
        self._stopped.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_SECONDS)
        lost = sum(len(one.lines) for one in self._channels.values()) + len(self._notes)
        if lost:
            logger.warning("%s of the request log were not written before the end", count(lost, "line"))

    def begin(self, body: ChatRequest | CompletionRequest, exchange: RunningRequest) -> OpenNote | None:
        """Begin to keep a request's answer; None where it is not logged."""
        to = self._channels.get(body.model)
        if to is None:
            return None
        hashed = hashlib.sha256(f"{body.model}\n{request_key(body)}".encode("utf-8", "surrogatepass")).hexdigest()
        if int(hashed[:13], 16) / 16**13 >= to.percent / 100:
            return None
        exchange.kept = []
        with self._lock:
            self._answers[exchange.id] = (to, [])
            if len(self._answers) > MAX_ANSWERS:
                self._answers.popitem(last=False)
        return OpenNote(self, to, body, hashed)

    def rate(self, answer: str, rating: Rating) -> bool:
        """Log a rating; False if the answer is not among those logged here, or was rated too often."""
        with self._lock:
            to, ratings = self._answers.get(answer, (None, []))
            if to is None or len(ratings) >= MAX_RATINGS:
                return False
            if ratings[-1:] == [rating]:
                return True
            ratings.append(rating)
        rated = LoggedRating(id=answer, time=datetime.now(UTC), rating=rating)
        self.add(_Note(to, 500, rating=rated))
        return True

    def add(self, note: _Note) -> None:
        """Hand a note to the thread, or drop it where too much waits."""
        with self._lock:
            if self._num_bytes + note.num_bytes > self._max_bytes:
                note.to.drop("full")
                return
            self._notes.append(note)
            self._num_bytes += note.num_bytes
            if self._num_bytes >= PART_BYTES:
                self._wake.set()

    def flush(self) -> None:
        """Make lines of what was noted, and write what waits. Problems are counted, and logged once."""
        with self._lock:
            notes, self._notes = self._notes, []
        for note in notes:
            line = _line(note)
            if line is not None:
                note.to.lines.append(line)
            with self._lock:
                self._num_bytes += (len(line) if line else 0) - note.num_bytes
        for one in self._channels.values():
            try:
                self._write(one)
            except Exception as error:  # noqa: BLE001  # whatever it is, requests do not depend on it
                self._tell(one, error)
            else:
                self._tell(one, None)

    def collect(self) -> Iterator[Metric]:
        """Records written and dropped, what waits, and whether a store refuses."""
        written = CounterMetricFamily("graftline_request_log_lines", "Lines written to a log", labels=["channel"])
        dropped = CounterMetricFamily(
            "graftline_request_log_dropped", "Requests and ratings that were not logged", labels=["channel", "reason"]
        )
        failing = GaugeMetricFamily("graftline_request_log_failing", "1 while its store refuses", labels=["channel"])
        for name, one in self._channels.items():
            written.add_metric([name], one.written)
            failing.add_metric([name], float(one.problem is not None))
            for reason in ("full", "too_large", "failed"):
                dropped.add_metric([name, reason], one.dropped[reason])
        pending = GaugeMetricFamily("graftline_request_log_pending_bytes", "Bytes that wait to be written")
        pending.add_metric([], self._num_bytes)
        yield from (written, dropped, failing, pending)

    def _run(self) -> None:
        while True:
            self._wake.wait(self._flush_seconds)
            self._wake.clear()
            is_last = self._stopped.is_set()
            self.flush()
            if is_last:
                return
            self._expire()

    def _write(self, one: _Channel) -> None:
        if one.unsure is not None:
            key, num_lines = one.unsure
            # Written again under another name, its lines would be there twice, and no reader would take them.
            if key in one.place.store.list(key.rpartition("/")[0]):
                self._wrote(one, num_lines)
            one.unsure = None
        while one.lines:
            num_lines, num_bytes = 0, 0
            for line in one.lines:
                if num_lines and num_bytes + len(line) > PART_BYTES:
                    break
                num_lines, num_bytes = num_lines + 1, num_bytes + len(line)
            key = one.place.part_key(self._server, one.number, datetime.now(UTC))
            one.unsure = (key, num_lines)
            one.place.store.put_bytes(key, b"".join(one.lines[:num_lines]))
            self._wrote(one, num_lines)

    def _wrote(self, one: _Channel, num_lines: int) -> None:
        num_bytes = sum(map(len, one.lines[:num_lines]))
        del one.lines[:num_lines]
        one.number, one.written, one.unsure = one.number + 1, one.written + num_lines, None
        with self._lock:
            self._num_bytes -= num_bytes

    def _expire(self) -> None:
        for one in self._channels.values():
            now = time.monotonic()
            if one.expired is not None and now - one.expired < _EXPIRE_SECONDS:
                continue
            one.expired = now
            try:
                if number := one.place.expire():
                    logger.info(
                        "%s: %s of its log older than %d days deleted",
                        one.place.name,
                        count(number, "part"),
                        one.place.retention_days,
                    )
            except Exception as error:  # noqa: BLE001  # tried again in an hour
                logger.warning("%s: the old parts of its log were not deleted: %s", one.place.name, _reason(error))

    def _tell(self, one: _Channel, error: Exception | None) -> None:
        """Log that a store refuses, and that it takes lines again; once each."""
        before, one.problem = one.problem, _reason(error) if error else None
        if error and before is None:
            logger.warning(
                "%s: its requests are not logged until %s takes them, and are answered as before: %s",
                one.place.name,
                one.place.store.url,
                one.problem,
            )
        elif before is not None and error is None:
            logger.info("%s: its requests are logged again", one.place.name)


def _drop(to: _Channel, error: Exception) -> None:
    """Count what cannot be logged. The error's message may quote a client's text, so it is not repeated."""
    to.drop("failed")
    logger.warning("%s: a request could not be logged: %s", to.place.name, type(error).__name__)


def _reason(error: Exception) -> str:
    return one_line(str(error) if isinstance(error, GraftlineError) else repr(error))


def _size(body: ChatRequest | CompletionRequest, said: Said) -> int:
    """About the bytes that a request takes in memory, at most."""
    answer = len(said.words) + len(said.reasoning) + sum(len(call.arguments) for call in said.calls)
    if isinstance(body, CompletionRequest):
        unit = 4 if isinstance(body.prompt, str) else 40  # bytes of a letter, or of a token's number in a list
        return 4000 + 4 * answer + unit * len(body.prompt)
    tools = len(repr([tool.shown for tool in body.tools]))
    calls = sum(len(repr(call)) for message in body.messages for call in message.tool_calls)
    words = sum(len(message.text) + len(message.reasoning_content or "") + 500 for message in body.messages)
    return 4000 + 4 * (answer + tools + calls + words)


def _line(note: _Note) -> bytes | None:
    """The line of a note; None where it cannot be one, which is counted."""
    try:
        logged = note.rating or _logged(note)
        value = logged.model_dump(mode="json")
        line = json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except Exception as error:  # noqa: BLE001  # a client's text may be anything
        _drop(note.to, error)
        return None
    if len(line) > MAX_LINE_BYTES:
        note.to.drop("too_large")
        return None
    return line


def _logged(note: _Note) -> LoggedRequest:
    request = note.request
    assert request is not None
    body, served, exchange, clean = request.body, request.served, request.exchange, note.to.remover.clean
    given: list[Any]
    if isinstance(body, ChatRequest):
        given = [[turn.turn for turn in body.turns], None, [tool.shown for tool in body.callable_tools]]
    else:
        given = [None, _text(body, served), []]
    (messages, prompt, tools), from_prompt = clean(given)
    answer, from_answer = clean(_turn(request.said))
    return LoggedRequest(
        id=exchange.id,
        time=request.began,
        model=body.model,
        release=served.release or served.name,
        digest=str(served.digest or ""),
        key=request.key,
        messages=messages,
        prompt=prompt,
        tools=tools,
        answer=answer,
        ended=exchange.ended,
        finish_reason=exchange.finish_reason,
        seconds=round(request.seconds, 6),
        prompt_tokens=exchange.usage["prompt_tokens"],
        completion_tokens=exchange.usage["completion_tokens"],
        removed_from_prompt=from_prompt,
        removed_from_answer=from_answer,
    )


def _text(body: CompletionRequest, served: ServedModel) -> str:
    if isinstance(body.prompt, str):
        return body.prompt
    return str(served.base.tokenizer.decode(body.prompt))


def _turn(said: Said) -> dict[str, Any]:
    """An answer as a turn of a conversation, as rows have it."""
    turn: dict[str, Any] = {"role": "assistant", "content": said.words}
    if said.reasoning:
        turn["reasoning_content"] = said.reasoning
    if said.calls:
        # As objects, so that secrets are found by their names.
        turn["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": json.loads(call.arguments)}}
            for call in said.calls
        ]
    return turn
