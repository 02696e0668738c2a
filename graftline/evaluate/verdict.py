"""The verdict as data, as JSON and as Markdown for a pull request, and the digests of what it covers."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

from graftline.digest import Digest, of_files
from graftline.errors import EvaluationError, GraftlineError
from graftline.settings.model import metric_where

# Which bytes were scored: digests that accompany the scores through gate and package into the release.
#
# A verdict covers one adapter on one base, on given rows. Every later step compares its files with those that were
# scored (`differences`), so that nothing is released with another model's verdict.

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "added_tokens.json",
)
"""Files of the base that a release includes beside its adapter."""


@dataclass(frozen=True)
class ScoredRelease:
    """The release of a scored model."""

    version: str
    digest: Digest
    """Digest of its manifest's bytes."""


@dataclass(frozen=True, kw_only=True)
class ScoredInputs:
    """Digests of what was scored, as it was when the model was loaded."""

    base: Digest
    """Weights of the loaded folder (`graftline.weights.identity`); for a merged model, its own."""
    base_files: Digest
    """All other files of that folder: architecture, tokenizer."""
    tokenizer: Digest
    """The tokenizer's files in that folder."""
    adapter: Digest | None
    """All files of the adapter's folder except a tokenizer's; None without an adapter."""
    rows: Digest
    """The file of evaluation rows."""
    texts: Digest
    """The file of general texts."""
    release: ScoredRelease | None = None
    """None for a model that is not released yet, and for the base."""

    def as_json(self) -> dict[str, Any]:
        """A JSON value."""
        digests = {name: None if (found := getattr(self, name)) is None else str(found) for name in DIGESTS}
        release = self.release and {"version": self.release.version, "digest": str(self.release.digest)}
        return digests | {"release": release}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read the value of `as_json`.

        Raises:
            EvaluationError: a digest is missing or invalid.
        """
        try:
            if value.keys() != {*DIGESTS, "release"}:
                raise KeyError(f"has {', '.join(sorted(value))}, expected {', '.join((*DIGESTS, 'release'))}")
            found = {name: value[name] and Digest.parse(value[name]) for name in DIGESTS}
            if missing := [name for name in DIGESTS if name != "adapter" and not found[name]]:
                raise KeyError(f"without {', '.join(missing)}")
            release = value["release"] and ScoredRelease(
                str(value["release"]["version"]), Digest.parse(value["release"]["digest"])
            )
        except (KeyError, TypeError, AttributeError, GraftlineError) as error:
            raise EvaluationError(f"the record of what was scored is damaged: {error}; evaluate again") from error
        return cls(**found, release=release)


DIGESTS = tuple(field.name for field in fields(ScoredInputs) if field.name != "release")


def adapter_digest(files: Mapping[str, Digest]) -> Digest:
    """Digest of an adapter from the digests of the files in its folder; tokenizer files there are ignored."""
    return of_files({path: digest for path, digest in files.items() if path not in TOKENIZER_FILES})


def tokenizer_digest(files: Mapping[str, Digest]) -> Digest:
    """Digest of a tokenizer from the digests of the files in its folder."""
    return of_files({path: digest for path, digest in files.items() if path in TOKENIZER_FILES})


def differences(scored: ScoredInputs, found: ScoredInputs) -> list[str]:
    """Digests that differ from the scored ones, as ``adapter: scored sha256:…, found sha256:…``."""
    pairs = {name: (getattr(scored, name), getattr(found, name)) for name in DIGESTS}
    return [f"{name}: scored {was}, found {here}" for name, (was, here) in pairs.items() if was != here]


# The verdict as data, as JSON and as Markdown for a pull request.
#
# `verdict_to_dict` gives JSON values of schema version `FORMAT`; keys are only ever added. Invariant:
# ``verdict_from_dict(verdict_to_dict(v)) == v``.

FORMAT = 1
Outcome = Literal["pass", "fail", "inconclusive"]
OUTCOMES: tuple[Outcome, ...] = ("pass", "fail", "inconclusive")
_ADDED = frozenset(
    (
        *("guard", "power", "power_margin", "power_items", "p_broken", "adjusted_p_broken"),
        *("num_clusters", "design_effect", "slice"),
    )
)
"""Keys that older verdicts lack."""
_MARKS = {"pass": "✅ pass", "fail": "❌ fail", "inconclusive": "❔ inconclusive"}


@dataclass(frozen=True)
class GateResult:
    """The result of one gate. Fields that do not apply to it are None.

    ``difference`` and ``interval`` (two-sided, 1 - 2 alpha) are candidate minus reference in the metric's unit; for a
    limit they are the candidate's value. ``smallest_effect`` is the distance from the condition's bound that this many
    items show with power 0.8. ``more_items``: how many more would decide an inconclusive gate at the observed
    difference. ``guard``: the guard that this condition belongs to, None for a pipeline's own gate. ``power``: how
    often a comparing gate passes a candidate that equals ``against``; if it is below 0.8, ``power_margin`` (with these
    items) or ``power_items`` (with this margin) would raise it to 0.8. ``p_value`` is that of "the condition does not
    hold", ``p_broken`` that of "it holds", ``adjusted_p_broken`` the same after Holm over all gates. ``num_clusters``
    and ``design_effect`` (variance relative to as many independent items) are set for clustered items.
    ``adjusted_p_value`` is set only in old verdicts, from when passes were corrected too.
    """

    name: str
    outcome: Outcome
    reason: str
    metric: str
    test: str
    direction: str
    margin: float
    limit: float | None
    alpha: float
    against: str | None
    min_items: int
    num_items: int = 0
    candidate: float | None = None
    reference: float | None = None
    difference: float | None = None
    interval: tuple[float, float] | None = None
    p_value: float | None = None
    adjusted_p_value: float | None = None
    p_no_change: float | None = None
    method: str | None = None
    smallest_effect: float | None = None
    more_items: int | None = None
    guard: str | None = None
    power: float | None = None
    power_margin: float | None = None
    power_items: int | None = None
    p_broken: float | None = None
    adjusted_p_broken: float | None = None
    num_clusters: int | None = None
    design_effect: float | None = None
    slice: Mapping[str, str] | None = None
    """The column and the value of the rows that were judged; None: all rows."""

    @property
    def line(self) -> str:
        """``accuracy 0.840 against 0.447 (base): +0.393 [+0.330, +0.450]``."""
        metric = metric_where(self.metric, self.slice)
        if self.candidate is None:
            return f"{metric}: not measured"
        interval = "" if self.interval is None else f" [{_number(self.interval[0])}, {_number(self.interval[1])}]"
        if self.reference is None:
            side = "at least" if self.direction == "higher" else "at most"
            return f"{metric} {_number(self.candidate)}{interval}, {side} {_number(self.limit)} asked"
        if self.interval is not None:
            interval = f" [{_signed(self.interval[0])}, {_signed(self.interval[1])}]"
        return (
            f"{metric} {_number(self.candidate)} against {_number(self.reference)} ({self.against}): "
            f"{_signed(self.difference)}{interval}"
        )


@dataclass(frozen=True)
class SliceResult:
    """The pipeline's metric on the rows with one value of a column.

    ``difference`` and ``interval`` (90 %, two-sided) are candidate minus reference; all but the count are None where
    the rows are too few for an interval. ``decides``: whether there are enough to decide anything.
    """

    column: str
    value: str
    num_items: int
    candidate: float | None = None
    reference: float | None = None
    difference: float | None = None
    interval: tuple[float, float] | None = None
    decides: bool = False


@dataclass(frozen=True)
class AnchorResult:
    """The candidate against the anchor (`graftline.evaluate.anchor`); ``release`` is the digest of its manifest.

    ``is_better``: it is shown to be better, so that the anchor moves to it when it is promoted.
    """

    version: str
    release: Digest
    is_better: bool
    evidence: str

    @property
    def note(self) -> str:
        """What a promotion would do, and why, in one sentence."""
        result = "a promotion moves the anchor to this candidate" if self.is_better else "it stays the anchor"
        return f"anchor {self.version}: {result} ({self.evidence})"


@dataclass(frozen=True)
class Verdict:
    """All gates together: ``fail`` if one fails, else ``inconclusive`` if one is, else ``pass``.

    ``notes``: sentences with anything else that the person who decides should know. ``anchor``: None without one.
    """

    outcome: Outcome
    gates: tuple[GateResult, ...]
    notes: tuple[str, ...] = ()
    slices: tuple[SliceResult, ...] = ()
    anchor: AnchorResult | None = None

    @property
    def summary(self) -> str:
        """One line: the deciding gate, and how many gates pass."""
        deciding = next((gate for gate in self.gates if gate.outcome == self.outcome), self.gates[0])
        passed = sum(gate.outcome == "pass" for gate in self.gates)
        count = f" ({passed} of {len(self.gates)} gates pass)" if len(self.gates) > 1 else ""
        return f"{deciding.line}{count}"


def verdict_to_dict(verdict: Verdict) -> dict[str, Any]:
    """JSON values: ``format``, ``outcome``, ``summary``, ``gates``, ``notes``; ``slices``, ``anchor`` if there are."""
    gates = [{**asdict(gate), "line": gate.line} for gate in verdict.gates]
    for gate in gates:
        gate["interval"] = None if gate["interval"] is None else list(gate["interval"])
        if gate["slice"] is None:
            del gate["slice"]
    head = {"format": FORMAT, "outcome": verdict.outcome, "summary": verdict.summary}
    slices = [{**asdict(each), "interval": each.interval and list(each.interval)} for each in verdict.slices]
    found = head | {"gates": gates, "notes": list(verdict.notes)} | ({"slices": slices} if slices else {})
    if verdict.anchor:
        found["anchor"] = asdict(verdict.anchor) | {"release": str(verdict.anchor.release)}
    return found


def verdict_from_dict(value: Mapping[str, Any]) -> Verdict:
    """Read what `verdict_to_dict` wrote.

    Raises:
        EvaluationError: another format, an unknown outcome, missing keys, or an outcome that its gates contradict.
    """
    if not isinstance(value, Mapping) or value.get("format") != FORMAT:
        given = value.get("format") if isinstance(value, Mapping) else type(value).__name__
        raise EvaluationError(f"a verdict of format {given!r} was given, this version reads {FORMAT}: gate again")
    try:
        gates = tuple(_gate_from_dict(gate) for gate in value["gates"])
        outcome, notes = value["outcome"], tuple(str(note) for note in value.get("notes", ()))
        slices = tuple(_slice_from_dict(each) for each in value.get("slices", ()))
        anchor = _anchor_from_dict(value["anchor"]) if value.get("anchor") else None
    except (KeyError, TypeError, ValueError, GraftlineError) as error:
        raise EvaluationError(f"the verdict is not whole ({error!r}); gate again") from error
    if not gates or outcome != combined_outcome(gates):
        raise EvaluationError(f"the verdict says {outcome!r}, its {len(gates)} gates do not: gate again")
    return Verdict(outcome, gates, notes, slices, anchor)


def _slice_from_dict(value: Mapping[str, Any]) -> SliceResult:
    return SliceResult(**{**value, "interval": value["interval"] and tuple(value["interval"])})


def _anchor_from_dict(value: Mapping[str, Any]) -> AnchorResult:
    if not isinstance(value["is_better"], bool):
        raise TypeError(f"anchor.is_better is {value['is_better']!r}")
    release = Digest.parse(value["release"])
    return AnchorResult(str(value["version"]), release, value["is_better"], str(value["evidence"]))


def _gate_from_dict(value: Mapping[str, Any]) -> GateResult:
    known = {name: value[name] for name in GateResult.__dataclass_fields__ if name in value or name not in _ADDED}
    if known["interval"] is not None:
        low, high = known["interval"]
        known["interval"] = (low, high)
    if known["outcome"] not in OUTCOMES:
        raise ValueError(f"outcome {known['outcome']!r}")
    return GateResult(**known)


def combined_outcome(gates: tuple[GateResult, ...]) -> Outcome:
    """The outcome of all gates together."""
    found = {gate.outcome for gate in gates}
    if "fail" in found:
        return "fail"
    return "inconclusive" if "inconclusive" in found else "pass"


def verdict_markdown(verdict: Verdict) -> str:
    """A heading, a table with one row per gate, each gate's reason, and the notes."""
    lines = [
        f"### Gate: {_MARKS[verdict.outcome]}",
        "",
        "| gate | outcome | candidate | against | difference | interval | items | smallest effect |",
        "|---|---|---|---|---|---|---|---|",
        *(_table_line(gate) for gate in verdict.gates),
        "",
        *(f"- **{_escape(gate.name)}**: {_escape(gate.reason)}" for gate in verdict.gates),
        *(f"\n> {_escape(note)}" for note in verdict.notes),
        *_slice_lines(verdict.slices),
    ]
    return "\n".join(lines) + "\n"


def _slice_lines(slices: tuple[SliceResult, ...]) -> list[str]:
    if not slices:
        return []
    lines = ["", "| slice | candidate | against | difference | interval (90 %) | items |", "|---|---|---|---|---|---|"]
    for each in slices:
        interval = "–" if each.interval is None else f"[{_signed(each.interval[0])}, {_signed(each.interval[1])}]"
        items = f"{each.num_items}" if each.decides else f"{each.num_items}: too few to decide anything"
        numbers = [_number(each.candidate), _number(each.reference), _signed(each.difference), interval]
        lines.append("| " + " | ".join(map(_escape, [f"{each.column} = {each.value}", *numbers, items])) + " |")
    return lines


def _table_line(gate: GateResult) -> str:
    against = f"{_number(gate.reference)} ({gate.against})" if gate.reference is not None else gate.against or "–"
    if gate.test == "limit":
        against = f"{'≥' if gate.direction == 'higher' else '≤'} {_number(gate.limit)}"
    level = f"{round(100 * (1 - 2 * gate.alpha), 1):g} %"
    write = _number if gate.test == "limit" else _signed
    interval = "–" if gate.interval is None else f"[{write(gate.interval[0])}, {write(gate.interval[1])}] ({level})"
    cells = [
        gate.name,
        _MARKS[gate.outcome],
        _number(gate.candidate),
        against,
        "–" if gate.test == "limit" else _signed(gate.difference),
        interval,
        _items(gate),
        _number(gate.smallest_effect),
    ]
    return "| " + " | ".join(_escape(cell) for cell in cells) + " |"


def _items(gate: GateResult) -> str:
    if gate.num_clusters is None or gate.design_effect is None:
        return f"{gate.num_items}" if gate.num_items else "–"
    return f"{gate.num_items} in {gate.num_clusters} clusters, design effect {gate.design_effect:.2f}"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if 1e-3 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{'+' if value >= 0 else '−'}{_number(abs(value))}"
