"""Log lines for people, or for machines: with ``GRAFTLINE_LOG=json`` each line on standard error is one JSON object.

    {"time": "2026-11-24T02:00:13.214+00:00", "level": "info", "logger": "graftline", "message": "…",
     "run": "…", "pipeline": "…", "stage": "…"}

``run`` is the flow run that started the process (``GRAFTLINE_RUN``); what is not known is left out. Lines that are
printed, such as those of progress, become objects too.
"""

import contextlib
import io
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import TextIO

from graftline.address import mask_secrets
from graftline.errors import ConfigError

FORMAT_VARIABLE = "GRAFTLINE_LOG"
RUN_VARIABLE = "GRAFTLINE_RUN"
FORMATS = ("text", "json")


def configure(name: str, *, about: Mapping[str, str]) -> None:
    """Make the root logger write to standard error in the format that the environment asks for.

    Args:
        name: what the process does; stands before each line of text.
        about: fields of every JSON object, such as pipeline and stage.

    Raises:
        ConfigError: ``GRAFTLINE_LOG`` names no format.
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
    """Leave the root logger as it was, whatever is imported inside."""
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
    """A line without the time that it begins with, for a log that puts its own there."""
    return _TIME.sub("", line, count=1)


def print_any_text() -> None:
    """Let standard output and error print as an escape what the locale's encoding lacks (−, …), instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class JsonFormatter(logging.Formatter):
    """A record as one JSON object, secrets masked."""

    def __init__(self, about: Mapping[str, str]) -> None:
        super().__init__()
        self._about = dict(about)

    def format(self, record: logging.LogRecord) -> str:
        """One line without its end."""
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
    """Standard error for those who print: each whole line becomes a record of the logger ``stderr``."""

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
