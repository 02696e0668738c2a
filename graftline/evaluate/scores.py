"""The results of an evaluation, item by item, and their file.

`Scores` holds five kinds of results: options of the pipeline's task scored by log-likelihood (`items`), options of
general tasks (`general`), NLL of general text by document (`documents`), generated answers (`answers`) and plain
measured numbers (`numbers`: bytes, seconds, counts, errors). Two `Scores` can be compared on a section only if their
item-set digests agree and, where the pipeline's template renders prompts, their template digests too
(`require_comparable`).

The file is JSON lines, UTF-8: a header, then one item per line. The header states the format, the digests and the
number of lines that follow, so a truncated or edited file is detected. Format 2 adds which bytes were scored
(`graftline.evaluate.verdict`) and a digest of its lines; format 1 is older and still written for scores without that
record. Invariant: ``read_scores(p)`` after ``write_scores(p, s)`` equals s.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from graftline.data.rows import Row
from graftline.digest import Digest, atomic_write, canonical_json, of_json, of_stream
from graftline.errors import EvaluationError, GraftlineError
from graftline.evaluate.verdict import ScoredInputs, ScoredRelease
from graftline.settings.gate_metrics import ANCHOR, PRODUCTION

CANDIDATE = "candidate"
"""Name of the judged model; the others have the names that gates use in ``against``."""
OWN_ENGINE = "own_engine"
"""Name of the candidate on our own engine, where the gates judge it on another one (``evaluate.engine``)."""

FORMATS = (1, 2)
Section = Literal["items", "general", "documents", "answers"]
ID_DIGITS = 16
_SHOWN_IDS = 3


def item_id(row: Row) -> str:
    """An id that depends only on what the row says: equal rows of two evaluations get equal ids."""
    messages = [(message.role, message.content) for message in row.messages]
    if row.rejected is not None:
        return of_json([messages, row.tools, row.rejected]).hex[:ID_DIGITS]
    return of_json([messages, row.tools] if row.tools else messages).hex[:ID_DIGITS]


@dataclass(frozen=True)
class ItemScore:
    """One item whose options were scored.

    ``log_likelihoods`` (nats, one per option), ``chosen`` and ``gold`` (option indices), ``nll`` (nats, sum over the
    gold option's ``num_tokens`` tokens), ``stop``: whether an end token is the most likely one after the gold option
    (None if not measured).
    """

    item_id: str
    log_likelihoods: tuple[float, ...]
    chosen: int
    gold: int
    correct: bool
    nll: float
    num_tokens: int
    stop: bool | None = None

    @property
    def nll_per_token(self) -> float:
        """NLL of the gold option in nats per token."""
        return self.nll / self.num_tokens

    @property
    def class_nll(self) -> float:
        """NLL of the gold option among the options, in nats: of likelihoods of labels, and of a head's classes."""
        most = max(self.log_likelihoods)
        total = most + math.log(sum(math.exp(value - most) for value in self.log_likelihoods))
        return total - self.log_likelihoods[self.gold]


@dataclass(frozen=True)
class DocumentScore:
    """NLL of one document of general text: ``nll`` in nats, summed over the ``num_tokens`` predicted tokens."""

    item_id: str
    nll: float
    num_tokens: int


@dataclass(frozen=True)
class AnswerScore:
    """One generated answer against its references; `exact_match`, `f1` and `rouge_l` lie in [0, 1]."""

    item_id: str
    answer: str
    exact_match: float
    f1: float
    rouge_l: float
    num_tokens: int
    stop: bool
    own: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Further values by name (`graftline.evaluate.own`)."""


@dataclass(frozen=True)
class Scores:
    """All results of one evaluation.

    ``template``: how prompts were rendered; ``labels``: the options' texts; ``scored``: which bytes were scored, None
    if not recorded; ``key``: digest of everything that these scores except ``numbers`` depend on
    (`graftline.evaluate.kept`), None if not computed.
    """

    template: Digest
    labels: tuple[str, ...] = ()
    items: tuple[ItemScore, ...] = ()
    general: tuple[ItemScore, ...] = ()
    documents: tuple[DocumentScore, ...] = ()
    answers: tuple[AnswerScore, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)
    scored: ScoredInputs | None = None
    key: Digest | None = None
    measured_by: Mapping[str, str] = field(default_factory=dict)
    """Of metrics that a project's files compute, the digest of these files."""
    served_by: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """The server that the model was scored through (`graftline.evaluate.engine.EngineRecord`); empty: our own code."""

    def ids(self, section: Section) -> list[str]:
        """Item ids of a section, in its order."""
        return [row.item_id for row in getattr(self, section)]

    def item_set(self, section: Section) -> Digest:
        """Digest of a section's set of items, in any order; for options it includes gold answers and labels.

        Ids are digests of the items' text (see `items.item_id`), so equal ids mean equal content.
        """
        if section in ("items", "general"):
            rows: tuple[ItemScore, ...] = getattr(self, section)
            labels = self.labels if section == "items" else ()
            return of_json({"labels": labels, "items": sorted((row.item_id, row.gold) for row in rows)})
        return of_json(sorted(self.ids(section)))


def require_comparable(candidate: Scores, reference: Scores, section: Section) -> None:
    """Check that two evaluations scored the same items in the same way.

    General text and general tasks are scored without the pipeline's template: there only the item set must agree.

    Raises:
        EvaluationError: other templates or items; both digests and the first ids that differ are named.
    """
    if section in ("items", "answers") and candidate.template != reference.template:
        raise EvaluationError(
            f"the candidate was scored with template {candidate.template}, the reference with {reference.template}; "
            "scores of two templates cannot be compared: score the reference again with the candidate's template"
        )
    ours, theirs = candidate.item_set(section), reference.item_set(section)
    if ours != theirs:
        raise EvaluationError(
            f"the candidate was scored on {section} {ours} ({len(candidate.ids(section))}), the reference on {theirs} "
            f"({len(reference.ids(section))}){_difference(candidate, reference, section)}; a paired comparison needs "
            "the same items: score both on one evaluation set"
        )


def _difference(candidate: Scores, reference: Scores, section: Section) -> str:
    ours, theirs = set(candidate.ids(section)), set(reference.ids(section))
    parts = []
    for name, missing in (("reference", sorted(ours - theirs)), ("candidate", sorted(theirs - ours))):
        if missing:
            parts.append(f"{len(missing)} missing in the {name}, such as {', '.join(missing[:_SHOWN_IDS])}")
    return ": " + "; ".join(parts) if parts else ": the gold answers or labels differ"


_ROW_TYPES: dict[str, type[Any]] = {
    "items": ItemScore,
    "general": ItemScore,
    "documents": DocumentScore,
    "answers": AnswerScore,
}
SECTIONS: tuple[Section, ...] = ("items", "general", "documents", "answers")
"""All sections, in the order of a file's lines."""


def write_scores(path: Path, scores: Scores) -> Digest:
    """Write scores as JSON lines, atomically. Returns the file's digest.

    Raises:
        EvaluationError: an id appears twice in a section, or a value is not finite.
        GraftlineError: the file cannot be written.
    """
    lines = list(_lines(scores))
    with atomic_write(path) as out:
        for line in lines:
            out.write(line + b"\n")
    return out.digest


def scores_digest(scores: Scores) -> Digest:
    """Digest of what `write_scores` would write, without ``key``."""
    return of_stream(_lines(replace(scores, key=None)))


def _lines(scores: Scores) -> Iterator[bytes]:
    for section in SECTIONS:
        check_unique(scores.ids(section))
    rows = [row_line(section, row) for section in SECTIONS for row in getattr(scores, section)]
    header: dict[str, Any] = {
        "format": 1,
        "template": str(scores.template),
        "labels": list(scores.labels),
        "numbers": dict(scores.numbers),
        "counts": {section: len(scores.ids(section)) for section in SECTIONS},
        "item_sets": {section: str(scores.item_set(section)) for section in SECTIONS},
    }
    if scores.scored:
        header |= {"format": 2, "scored": scores.scored.as_json(), "lines": str(of_stream(rows))}
    if scores.measured_by:
        header["measured_by"] = dict(scores.measured_by)
    if scores.served_by:
        header["served_by"] = dict(scores.served_by)
    if scores.key:
        header["key"] = str(scores.key)
    yield _json_line(header, "the header")
    yield from rows


def row_line(section: Section, row: ItemScore | DocumentScore | AnswerScore) -> bytes:
    """One row of a section as a line of a scores file, without the newline.

    Raises:
        EvaluationError: a value is not finite.
    """
    values = asdict(row)
    if values.get("own") == {}:  # a file without further values is as it always was
        del values["own"]
    return _json_line({"section": section, **values}, row.item_id)


def _json_line(value: Mapping[str, Any], name: str) -> bytes:
    try:
        return canonical_json(value)
    except ValueError as error:
        raise EvaluationError(
            f"scores of {name} hold a number that is not finite; "
            "the model gave NaN or infinity there: check its weights"
        ) from error


def check_unique(ids: list[str]) -> None:
    """Refuse item ids that appear twice.

    Raises:
        EvaluationError: an id appears twice; the first one is named.
    """
    seen: set[str] = set()
    for item_id in ids:
        if item_id in seen:
            raise EvaluationError(f"item {item_id} appears twice; every item is scored once: remove the duplicate row")
        seen.add(item_id)


def read_scores(path: Path) -> Scores:
    """Read a scores file and check it against its own header.

    Raises:
        EvaluationError: a missing file, not JSON lines, another format, truncated, edited, or a non-finite value.
    """
    try:
        # Split only at newlines: an answer may hold U+2028, where splitlines() splits too.
        lines = path.read_bytes().decode().removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"cannot read the scores {path}: {error}; run the evaluate stage again") from error
    if lines == [""]:
        raise EvaluationError(f"the scores {path} are empty; run the evaluate stage again")
    header = _parse(path, 1, lines[0])
    if header.get("format") not in FORMATS:
        raise EvaluationError(
            f"the scores {path} have format {header.get('format')!r}, this version reads "
            f"{' and '.join(map(str, FORMATS))}: evaluate again"
        )
    rows: dict[str, list[Any]] = {section: [] for section in SECTIONS}
    for number, line in enumerate(lines[1:], start=2):
        section, row = parse_row(path, number, line)
        rows[section].append(row)
    scores = _assemble(path, header, rows)
    if header["format"] != 1 and header.get("lines") != str(of_stream(line.encode() for line in lines[1:])):
        raise EvaluationError(f"the lines of the scores {path} are not those that were written: evaluate again")
    return scores


def _assemble(path: Path, header: dict[str, Any], rows: dict[str, list[Any]]) -> Scores:
    try:
        scores = Scores(
            template=Digest.parse(header["template"]),
            labels=tuple(header["labels"]),
            numbers={str(name): float(value) for name, value in header["numbers"].items()},
            scored=ScoredInputs.from_json(header["scored"]) if header["format"] != 1 else None,
            key=Digest.parse(header["key"]) if "key" in header else None,
            measured_by={str(name): str(by) for name, by in header.get("measured_by", {}).items()},
            served_by=dict(header.get("served_by", {})),
            **{section: tuple(found) for section, found in rows.items()},
        )
        expected = {section: (header["counts"][section], header["item_sets"][section]) for section in SECTIONS}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, GraftlineError) as error:
        raise EvaluationError(f"the header of the scores {path} is not right ({error}); evaluate again") from error
    for section in SECTIONS:
        check_unique(scores.ids(section))
        found = (len(scores.ids(section)), str(scores.item_set(section)))
        if found != expected[section]:
            raise EvaluationError(
                f"the scores {path} hold {found[0]} {section} ({found[1]}), its header says {expected[section][0]} "
                f"({expected[section][1]}); the file was cut or edited: evaluate again"
            )
    return scores


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise EvaluationError(f"line {number} of the scores {path} is not JSON ({error}); evaluate again") from error
    if not isinstance(value, dict):
        raise EvaluationError(f"line {number} of the scores {path} is {type(value).__name__}, expected an object")
    return value


def parse_row(path: Path, number: int, line: str) -> tuple[str, Any]:
    """Section and row of a line that `row_line` wrote.

    Raises:
        EvaluationError: not such a line, or invalid values; path and line are named.
    """
    value = _parse(path, number, line)
    section = value.pop("section", None)
    if section not in _ROW_TYPES:
        raise EvaluationError(
            f"line {number} of the scores {path} has section {section!r}, expected {sorted(_ROW_TYPES)}"
        )
    try:
        if _ROW_TYPES[section] is ItemScore:
            value["log_likelihoods"] = tuple(value["log_likelihoods"])
        row = _ROW_TYPES[section](**value)
        problem = _problem(row)
    except (TypeError, KeyError, OverflowError, AttributeError) as error:
        raise EvaluationError(f"line {number} of the scores {path} is not a score ({error}); evaluate again") from error
    if problem:
        raise EvaluationError(f"line {number} of the scores {path}: {problem}; evaluate again")
    return section, row


def _problem(row: ItemScore | DocumentScore | AnswerScore) -> str | None:
    """The first error in a row that was read; None if it is valid."""
    if isinstance(row, AnswerScore):
        numbers: tuple[float, ...] = (row.exact_match, row.f1, row.rouge_l, *row.own.values())
    else:
        numbers = (row.nll, *row.log_likelihoods) if isinstance(row, ItemScore) else (row.nll,)
        if row.num_tokens < 1:
            return f"{row.num_tokens} tokens, expected at least 1"
    if not all(math.isfinite(number) for number in numbers):
        return "a value is not finite"
    if not isinstance(row.item_id, str):
        return f"item_id {row.item_id!r} is not text"
    if isinstance(row, ItemScore):
        options = range(len(row.log_likelihoods))
        if row.chosen not in options or row.gold not in options or row.correct != (row.chosen == row.gold):
            return f"chosen {row.chosen}, gold {row.gold} and correct {row.correct} do not fit {len(options)} options"
    return None


def with_stand_ins(found: Mapping[str, Scores]) -> dict[str, Scores]:
    """Scores by the names that gates use: the base stands in for production, and production for the anchor."""
    production = found.get(PRODUCTION, found["base"])
    return {PRODUCTION: production, ANCHOR: production, **found}


def against(found: Mapping[str, Scores]) -> ScoredRelease | None:
    """The release in production when the scores were made; None if there was none."""
    scores = found.get(PRODUCTION)
    return scores.scored.release if scores and scores.scored else None
