"""The verdict as data, as JSON and as Markdown for a pull request.

`verdict_to_dict` gives JSON values of schema version `FORMAT`; keys are only ever added. Law:
``verdict_from_dict(verdict_to_dict(v)) == v``.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from graftline.errors import EvaluationError

FORMAT = 1
Outcome = Literal["pass", "fail", "inconclusive"]
OUTCOMES: tuple[Outcome, ...] = ("pass", "fail", "inconclusive")
_ADDED = frozenset({"guard", "power", "power_margin", "power_items"})
"""Keys that verdicts written before them do not have."""
_MARKS = {"pass": "✅ pass", "fail": "❌ fail", "inconclusive": "❔ inconclusive"}


@dataclass(frozen=True)
class GateResult:
    """What one gate found. Fields that a gate of its kind has no value for are None.

    ``difference`` and ``interval`` (two-sided, 1 - 2 alpha) are candidate minus reference in the metric's unit; for a
    limit they are the candidate's value. ``smallest_effect`` is the distance from the condition's bound that this many
    items show with power 0.8. ``more_items``: how many more would decide an inconclusive gate at the
    observed difference. ``guard``: the guard that this is a condition of, None for a gate of the pipeline's own.
    ``power``: how often a gate that compares passes a candidate that equals ``against``; where that is below 0.8,
    ``power_margin`` (with these items) or ``power_items`` (with this margin) would make it 0.8.
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

    @property
    def line(self) -> str:
        """``accuracy 0.840 against 0.447 (base): +0.393 [+0.330, +0.450]``."""
        if self.candidate is None:
            return f"{self.metric}: not measured"
        interval = "" if self.interval is None else f" [{_number(self.interval[0])}, {_number(self.interval[1])}]"
        if self.reference is None:
            side = "at least" if self.direction == "higher" else "at most"
            return f"{self.metric} {_number(self.candidate)}{interval}, {side} {_number(self.limit)} asked"
        if self.interval is not None:
            interval = f" [{_signed(self.interval[0])}, {_signed(self.interval[1])}]"
        return (
            f"{self.metric} {_number(self.candidate)} against {_number(self.reference)} ({self.against}): "
            f"{_signed(self.difference)}{interval}"
        )


@dataclass(frozen=True)
class Verdict:
    """All gates together: ``fail`` if one fails, else ``inconclusive`` if one is, else ``pass``."""

    outcome: Outcome
    gates: tuple[GateResult, ...]

    @property
    def summary(self) -> str:
        """One line: the gate that decided, and how many pass."""
        deciding = next((gate for gate in self.gates if gate.outcome == self.outcome), self.gates[0])
        passed = sum(gate.outcome == "pass" for gate in self.gates)
        count = f" ({passed} of {len(self.gates)} gates pass)" if len(self.gates) > 1 else ""
        return f"{deciding.line}{count}"


def verdict_to_dict(verdict: Verdict) -> dict[str, Any]:
    """JSON values with ``format``, ``outcome``, ``summary`` and ``gates``."""
    gates = [{**asdict(gate), "line": gate.line} for gate in verdict.gates]
    for gate in gates:
        gate["interval"] = None if gate["interval"] is None else list(gate["interval"])
    return {"format": FORMAT, "outcome": verdict.outcome, "summary": verdict.summary, "gates": gates}


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
        outcome = value["outcome"]
    except (KeyError, TypeError, ValueError) as error:
        raise EvaluationError(f"the verdict is not whole ({error!r}); gate again") from error
    if not gates or outcome != combined_outcome(gates):
        raise EvaluationError(f"the verdict says {outcome!r}, its {len(gates)} gates do not: gate again")
    return Verdict(outcome, gates)


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
    """A heading, a table with one line a gate, and the reasons of those that do not pass."""
    lines = [
        f"### Gate: {_MARKS[verdict.outcome]}",
        "",
        "| gate | outcome | candidate | against | difference | interval | items | smallest effect |",
        "|---|---|---|---|---|---|---|---|",
        *(_table_line(gate) for gate in verdict.gates),
        "",
        *(f"- **{_escape(gate.name)}**: {_escape(gate.reason)}" for gate in verdict.gates),
    ]
    return "\n".join(lines) + "\n"


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
        f"{gate.num_items}" if gate.num_items else "–",
        _number(gate.smallest_effect),
    ]
    return "| " + " | ".join(_escape(cell) for cell in cells) + " |"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if 1e-3 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{'+' if value >= 0 else '−'}{_number(abs(value))}"
