"""A cache of scores by the digest of everything they depend on: no model is scored twice on the same items.

    <cache>/scores/<key>/scores.jsonl       every section but `Scores.numbers`, in the format of `scores`
    <cache>/scores/<key>/record.json        format, key, the key's ingredients, digest of scores.jsonl
    <cache>/scores/<key>/items-00000.jsonl  one batch, until all are done

A key is the digest of the model's files, the rows, the tokens to score, the scoring code and libraries, and the kind of
machine, which determines how sums are rounded: cached scores equal recomputed ones bit for bit. The record is written
last. Scores that do not match it or the requested key are logged, ignored and computed again.
"""

import contextlib
import json
import logging
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from graftline.digest import Digest, atomic_write, canonical_json, of_file, of_json, of_stream, write_json
from graftline.errors import EvaluationError, GraftlineError
from graftline.evaluate.parts import ScoreRow
from graftline.evaluate.scores import (
    CANDIDATE,
    OWN_ENGINE,
    Scores,
    Section,
    parse_row,
    read_scores,
    row_line,
    write_scores,
)
from graftline.evaluate.verdict import ScoredInputs, differences
from graftline.weights.cast import type_name

logger = logging.getLogger("graftline")

FORMAT = 1


def machine(device: str, *, threads: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The properties of a machine and of its arithmetic that determine how floating-point sums are rounded.

    Args:
        device: ``cpu`` or ``cuda``.
        threads: CPU threads per operation.
        dtype: number type of the arithmetic.
    """
    rounded = {} if dtype == torch.float32 else {"arithmetic": type_name(dtype)}
    found: dict[str, Any]
    if device == "cuda":
        found = {"device": torch.cuda.get_device_name(), "capability": list(torch.cuda.get_device_capability())}
        return found | rounded
    instructions = torch.backends.cpu.get_cpu_capability()
    found = {"device": "cpu", "processor": platform.machine(), "instructions": instructions, "threads": threads}
    return found | rounded


@dataclass(frozen=True, kw_only=True)
class Ingredients:
    """Everything that scores depend on."""

    scored: ScoredInputs
    """The model's files and the files of rows; the release is ignored."""
    prepared: Digest
    """Digest of what is scored (`evaluation.Prepared`)."""
    code: Digest
    """Digest of the modules and library versions that compute scores."""
    machine: Mapping[str, Any]
    """See `machine`."""

    def as_json(self) -> dict[str, Any]:
        """The JSON value that the key is the digest of."""
        return {
            "format": FORMAT,
            "scored": replace(self.scored, release=None).as_json(),
            "prepared": str(self.prepared),
            "code": str(self.code),
            "machine": dict(self.machine),
        }

    @property
    def key(self) -> Digest:
        """The cache key."""
        return of_json(self.as_json())


class KeptScores:
    """The scores of one model on one set of items, in a cache folder that several processes and machines may share."""

    def __init__(self, folder: Path, ingredients: Ingredients) -> None:
        """Set the paths; nothing is read or written.

        Args:
            folder: the cache of all scores.
            ingredients: what the scores depend on.
        """
        self.key, self._about = ingredients.key, ingredients.as_json()
        self.folder = folder / self.key.hex
        self._scores, self._record = self.folder / "scores.jsonl", self.folder / "record.json"

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Lock these scores; wait if another process is computing them.

        Raises:
            GraftlineError: the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / "lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                logger.info("another run scores the same model on the same items: waiting for it")
                lock.acquire()
        except OSError as error:
            raise GraftlineError(f"cannot keep scores in {self.folder}: {error.strerror or error}") from error
        try:
            yield
        finally:
            lock.release()

    def read(self) -> Scores | None:
        """The cached scores; None if there are none or they are damaged, which is logged."""
        if not self._record.is_file():
            return None
        try:
            record = json.loads(self._record.read_text(encoding="utf-8"))
            expected = {"format": FORMAT, "key": str(self.key), "about": self._about}
            if {name: record.get(name) for name in expected} != expected:
                raise EvaluationError(f"{self._record} is of another format or about something else")
            if (found := of_file(self._scores)) != Digest.parse(record["scores"]):
                raise EvaluationError(f"{self._scores} has digest {found}, {record['scores']} was written")
            return replace(read_scores(self._scores), key=self.key)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, GraftlineError) as error:
            logger.warning("kept scores are damaged, so the model is scored again: %s", error)
            return None

    def write(self, scores: Scores) -> None:
        """Store scores and remove those of single batches.

        Raises:
            GraftlineError: the folder cannot be written.
        """
        digest = write_scores(self._scores, replace(scores, numbers={}, scored=None, key=None))
        write_json(self._record, {"format": FORMAT, "key": str(self.key), "about": self._about, "scores": str(digest)})
        for path in self.folder.glob("*-*.jsonl"):
            path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove everything that is kept of them."""
        for path in (self._record, self._scores, *self.folder.glob("*-*.jsonl")):
            path.unlink(missing_ok=True)

    def read_part(self, section: Section, index: int) -> list[ScoreRow] | None:
        """Stored scores of one batch (`parts.Parts`); None if there are none or they are damaged, which is logged."""
        path = self._part(section, index)
        if not path.is_file():
            return None
        try:
            header, *lines = path.read_bytes().decode().removesuffix("\n").split("\n")
            if json.loads(header) != self._part_header(section, index, [line.encode() for line in lines]):
                raise EvaluationError(f"{path} is of another format, or not as it was written")
            return [parse_row(path, number, line)[1] for number, line in enumerate(lines, start=2)]
        except (OSError, ValueError, GraftlineError) as error:
            logger.warning("kept scores of a batch are damaged, so it is scored again: %s", error)
            return None

    def write_part(self, section: Section, index: int, rows: list[ScoreRow]) -> None:
        """Store the scores of one batch (`parts.Parts`).

        Raises:
            EvaluationError: a score is not finite.
            GraftlineError: the folder cannot be written.
        """
        lines = [row_line(section, row) for row in rows]
        header = canonical_json(self._part_header(section, index, lines))
        with atomic_write(self._part(section, index)) as out:
            out.write(b"".join(line + b"\n" for line in (header, *lines)))

    def _part(self, section: Section, index: int) -> Path:
        return self.folder / f"{section}-{index:05}.jsonl"

    def _part_header(self, section: Section, index: int, lines: list[bytes]) -> dict[str, Any]:
        of_part = {"section": section, "index": index, "lines": str(of_stream(lines))}
        return {"format": FORMAT, "key": str(self.key)} | of_part


def of_release(folder: Path, key: Digest, scored: ScoredInputs) -> Scores | None:
    """The scores that a release carries from when it was the candidate; None if they do not match, which is logged.

    Args:
        folder: the release's files, already compared with its manifest.
        key: the cache key that the scores must have.
        scored: the local files that are to be scored.
    """
    path = folder / "evaluation" / f"{CANDIDATE}.jsonl"
    if (own := path.with_stem(OWN_ENGINE)).is_file():
        path = own
    try:
        scores = read_scores(path)
    except EvaluationError as error:
        logger.info("the release has no scores that can be used, so it is scored again: %s", error)
        return None
    if scores.key != key:
        logger.info("the release was scored with other rows, settings or code or on another machine: scored again")
        return None
    if scores.scored is None or (other := differences(scores.scored, scored)):
        about = "it does not say of what" if scores.scored is None else "; ".join(other)
        logger.warning("the release has scores of other files, so it is scored again: %s", about)
        return None
    answers = tuple(replace(answer, own={}) for answer in scores.answers)
    return replace(scores, answers=answers, numbers={}, scored=None)
