"""Log lines for people or machines, and progress of long work.

With ``GRAFTLINE_LOG=json`` each line on standard error is one JSON object:

    {"time": "2026-11-24T02:00:13.214+00:00", "level": "info", "logger": "graftline", "message": "…",
     "run": "…", "pipeline": "…", "stage": "…"}

``run`` is the flow run that started the process (``GRAFTLINE_RUN``); unknown fields are left out. Printed lines, such
as progress, become objects too.
"""

import contextlib
import io
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import TextIO

from graftline.address import mask_secrets
from graftline.errors import ConfigError

FORMAT_VARIABLE = "GRAFTLINE_LOG"
RUN_VARIABLE = "GRAFTLINE_RUN"
FORMATS = ("text", "json")


def configure(name: str, *, about: Mapping[str, str]) -> None:
    """Make the root logger write to standard error in the format that the environment requests.

    Args:
        name: what the process does; precedes each line of text.
        about: fields of every JSON object, such as pipeline and stage.

    Raises:
        ConfigError: ``GRAFTLINE_LOG`` names an unknown format.
    """
    print_any_text()
    asked = os.environ.get(FORMAT_VARIABLE) or "text"
    if asked not in FORMATS:
        raise ConfigError(f"{FORMAT_VARIABLE} is {asked!r}; expected one of {', '.join(FORMATS)}")
    if asked == "text":
        logging.basicConfig(level=logging.WARNING, format=f"{name}: %(message)s", stream=sys.stderr)
        return
    run = os.environ.get(RUN_VARIABLE)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter({**({"run": run} if run else {}), **about}))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    sys.stderr = _Lines(handler, sys.stderr)


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """Restore the root logger at the end, whatever the imports inside change."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


# As ONNX Runtime, Python's logging and others write it: 2026-11-24 02:00:13.214, 2026-11-24T02:00:13,214Z, in brackets.
_TIME = re.compile(r"^\[?\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:[.,]\d+)?(?:Z|[+-]\d\d:?\d\d)?\]?(?:\s*[|:-]\s+|\s+|$)")


def without_time(line: str) -> str:
    """A line without its leading time, for a log that adds its own."""
    return _TIME.sub("", line, count=1)


def print_any_text() -> None:
    """Make standard output and error escape what the locale's encoding lacks (−, …), instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class JsonFormatter(logging.Formatter):
    """A record as one JSON object, secrets masked."""

    def __init__(self, about: Mapping[str, str]) -> None:
        super().__init__()
        self._about = dict(about)

    def format(self, record: logging.LogRecord) -> str:
        """One line without the newline."""
        found = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": mask_secrets(record.getMessage()),
            **self._about,
        }
        if record.exc_info:
            found["error"] = mask_secrets(self.formatException(record.exc_info))
        return json.dumps(found, ensure_ascii=False)


class _Lines(io.TextIOBase):
    """Standard error for printed text: each complete line becomes a record of the logger ``stderr``."""

    def __init__(self, handler: logging.Handler, real: TextIO) -> None:
        self._handler, self._real, self._begun = handler, real, ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in filter(None, map(str.rstrip, lines)):
            self._handler.handle(logging.LogRecord("stderr", logging.INFO, "", 0, line, None, None))
        return len(text)

    def flush(self) -> None:
        self._real.flush()

    def fileno(self) -> int:
        return self._real.fileno()


# Progress of long work as plain lines with rate and time left.
#
# Library functions take an optional ``on_progress(done, total)``; the caller decides what prints it. `Reporter` prints
# a line at most every two seconds, so that its output suits a terminal, a file and a flow run's log.

OnProgress = Callable[[int, int], None]
"""Called with the number of units done and the total."""


def silent(done: int, total: int) -> None:
    """The progress callback that prints nothing."""


class Reporter:
    """Print ``train  34/84 steps  1.20 steps/s  42 s left`` at most every ``interval_seconds``."""

    def __init__(self, name: str, unit: str, *, interval_seconds: float = 2.0, stream: TextIO | None = None) -> None:
        self._name, self._unit, self._interval_seconds = name, unit, interval_seconds
        self._stream = stream or sys.stderr
        self._started: float | None = None
        self._first_done = 0
        self._printed = 0.0

    def __call__(self, done: int, total: int, *, note: str = "") -> None:
        """Record ``done`` of ``total`` units; print if it is time, and at the end. ``note`` is appended.

        ``total`` 0: the number is not known.
        """
        now = time.monotonic()
        if self._started is None:
            # A resumed run starts at done > 0: its rate counts from there.
            self._started, self._first_done, self._printed = now, done, now
            return
        last_of_long_work = 0 < total <= done and now - self._started > self._interval_seconds
        if now - self._printed < self._interval_seconds and not last_of_long_work:
            return
        self._printed = now
        line = self._line(done, total, now - self._started)
        print(f"{line}  {note}".rstrip(), file=self._stream, flush=True)

    def _line(self, done: int, total: int, elapsed_seconds: float) -> str:
        rate = (done - self._first_done) / max(elapsed_seconds, 1e-9)
        if not total:
            return f"{self._name}  {done} {self._unit}  {rate:.3g} {self._unit}/s"
        left = f"{(total - done) / rate:.0f} s left" if rate > 0 else "time left unknown"
        return f"{self._name}  {done}/{total} {self._unit}  {rate:.3g} {self._unit}/s  {left}"
