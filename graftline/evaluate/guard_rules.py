"""Guards: what every pipeline asks of a candidate beside its own gates, each unless it is switched off by name.

A guard is decided by the value that was observed (`graftline.evaluate.observed`), not by a test: its limits are wide,
so that what breaks one is broken, and few rows must not make a sound candidate wait for ever. It takes no part in the
correction of the gates' p-values and so costs them no power.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from graftline.evaluate.gate_rules import GateRule
from graftline.settings import Pipeline

MIN_STOP_RATE = 0.9
"""Share of answers that must end."""
MAX_STOP_RATE_LOSS = 0.05
"""How far below production's that share may lie."""
MAX_NLL_RISE = 1.0
"""How far the NLL of the rows' own answers may lie above production's, nats a token."""
MAX_FORGETTING = 1.0
"""How far the NLL of general text may lie above the base's, nats a token. The demo's adapter forgets 0.7."""


@dataclass(frozen=True)
class GuardRule(GateRule):
    """A condition that belongs to the guard ``guard``, a key of `graftline.settings.Guards`."""

    guard: str = ""
    min_items: int = 1


def pipeline_rules(pipeline: Pipeline) -> dict[str, GateRule]:
    """Everything that a pipeline asks of a candidate, by name: its gates, then its guards.

    A guard's rules are `GuardRule`; their names start with ``guard: ``, which no gate's name can. A gate on the same
    metric stands beside a guard and does not replace it.
    """
    gates: dict[str, GateRule] = {name: GateRule(**gate.model_dump()) for name, gate in pipeline.gates.items()}
    return gates | {name: rule for name, rule in _guards(pipeline) if getattr(pipeline.guards, rule.guard)}


def _guards(pipeline: Pipeline) -> Iterator[tuple[str, GuardRule]]:
    yield from _stops("guard: stops", "option_stop_rate")
    if pipeline.evaluate.answers is not None:
        yield from _stops("guard: stops (free answers)", "stop_rate")
    yield (
        "guard: likelihood",
        GuardRule("nll", "lower", "non-inferiority", MAX_NLL_RISE, against="production", guard="likelihood"),
    )
    # Against a number of the candidate itself: `observed` knows this guard.
    yield (
        "guard: training",
        GuardRule("training_loss_end", "lower", "superiority", against="training_loss_start", guard="training"),
    )
    yield "guard: leakage", GuardRule("leaked_rows", "lower", "limit", limit=0.0, guard="leakage")
    yield "guard: template", GuardRule("template_mismatches", "lower", "limit", limit=0.0, guard="template")
    if pipeline.evaluate.forgetting is not None:
        yield (
            "guard: forgetting",
            GuardRule("forgetting_nll", "lower", "non-inferiority", MAX_FORGETTING, against="base", guard="forgetting"),
        )


def _stops(name: str, metric: str) -> Iterator[tuple[str, GuardRule]]:
    yield name, GuardRule(metric, "higher", "limit", limit=MIN_STOP_RATE, guard="stops")
    yield (
        f"{name} against production",
        GuardRule(metric, "higher", "non-inferiority", MAX_STOP_RATE_LOSS, against="production", guard="stops"),
    )
