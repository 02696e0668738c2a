"""What the doctor says about gates: would a candidate that is as good as production pass?"""

import json
from collections.abc import Iterator
from pathlib import Path

from graftline.doctor.finding import Finding
from graftline.errors import GraftlineError
from graftline.evaluate.gate_power import POWER_TESTS, gate_power, weakness
from graftline.evaluate.gate_rules import METRICS as BY_ITEM
from graftline.evaluate.statistics.power import ASSUMED_DISCORDANT_SHARE, Power
from graftline.evaluate.verdict import GateResult, verdict_from_dict
from graftline.settings import Gate, Pipeline
from graftline.settings.measured import MANY, METRICS

_ADVICE = "change the margin or data.evaluation_rows (docs/gates.md)"


def look(name: str, pipeline: Pipeline, verdict: Path) -> Iterator[Finding]:
    """One finding for each gate that an equal candidate should pass.

    Args:
        name: of the pipeline.
        pipeline: its settings.
        verdict: of its last run, whose figures are taken where the gate asks the same; it need not exist.
    """
    last = _last_results(verdict)
    for gate_name, gate in pipeline.gates.items():
        if gate.test in POWER_TESTS:
            yield _look(f"gate {name}/{gate_name}", gate, pipeline, last.get(gate_name))


def _look(name: str, gate: Gate, pipeline: Pipeline, last: GateResult | None) -> Finding:
    count = METRICS[gate.metric].num_items
    num_items = count(pipeline) if count else 0
    if last is not None and _asks_the_same(gate, last) and last.power is not None and last.num_items <= num_items:
        power, num_items = Power(last.power, last.power_margin, last.power_items), last.num_items
        source = "by the last run"
    elif BY_ITEM[gate.metric].kind == "rate" and num_items < MANY:
        share = ASSUMED_DISCORDANT_SHARE
        power = gate_power("rate", gate.test, gate.margin, num_items, spread=share, alpha=gate.alpha)
        source = f"if it answers {share:.0%} of the items differently"
    else:
        return Finding(
            name, "ok", f"how often an equal candidate passes is known after a run, which shows {_unknown(gate.metric)}"
        )
    weak = weakness(power, gate.margin, num_items)
    if weak is None:
        return Finding(name, "ok", f"an equal candidate passes {power.value:.0%} of the time, {source}")
    return Finding(name, "note", f"{weak} ({source})", _ADVICE)


def _unknown(metric: str) -> str:
    if BY_ITEM[metric].kind == "mean":
        return f"how much {metric} differs from item to item"
    return f"how many items {metric} has"


def _asks_the_same(gate: Gate, last: GateResult) -> bool:
    """Whether a result's figures are those of this gate: it may have been changed since."""
    asked = (gate.metric, gate.test, gate.margin, gate.alpha, gate.against)
    return asked == (last.metric, last.test, last.margin, last.alpha, last.against)


def _last_results(path: Path) -> dict[str, GateResult]:
    try:
        verdict = verdict_from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, GraftlineError):  # none yet, or of another version: what is asked for counts
        return {}
    return {result.name: result for result in verdict.gates}
