"""Guards: what every pipeline asks of a candidate beside its own gates, each unless it is switched off by name.

A guard is decided by the value that was observed (`graftline.evaluate.observed`), not by a test: its limits are wide,
so that what breaks one is broken, and few rows must not make a sound candidate wait for ever. It takes no part in the
correction of the gates' p-values and so costs them no power.
"""

from collections.abc import Iterator

from graftline.settings.model import Direction, Gate, Pipeline

MIN_STOP_RATE = 0.9
"""Share of answers that must end."""
MAX_STOP_RATE_LOSS = 0.05
"""How far below production's that share may lie."""
MAX_NLL_RISE = 1.0
"""How far the NLL of the rows' own answers may lie above production's, nats a token."""
MAX_FORGETTING = 1.0
"""How far the NLL of general text may lie above the base's, nats a token. The demo's adapter forgets 0.7."""


class GuardRule(Gate):
    """A condition that belongs to the guard ``guard``, a key of `graftline.settings.model.Guards`."""

    guard: str


def pipeline_rules(pipeline: Pipeline) -> dict[str, Gate]:
    """Everything that a pipeline asks of a candidate, by name: its gates, then its guards.

    A guard's rules are `GuardRule`; their names start with ``guard: ``, which no gate's name can. A gate on the same
    metric stands beside a guard and does not replace it.
    """
    return pipeline.gates | {name: rule for name, rule in _guards(pipeline) if getattr(pipeline.guards, rule.guard)}


def _guards(pipeline: Pipeline) -> Iterator[tuple[str, GuardRule]]:
    yield from _stops("guard: stops", "option_stop_rate")
    if pipeline.evaluate.answers is not None:
        yield from _stops("guard: stops (free answers)", "stop_rate")
    yield "guard: likelihood", _not_worse("likelihood", "nll", "lower", MAX_NLL_RISE, against="production")
    yield "guard: training", _training()
    yield "guard: leakage", _limit("leakage", "leaked_rows", "lower", 0.0)
    yield "guard: template", _limit("template", "template_mismatches", "lower", 0.0)
    if pipeline.evaluate.forgetting is not None:
        yield "guard: forgetting", _not_worse("forgetting", "forgetting_nll", "lower", MAX_FORGETTING, against="base")


def _stops(name: str, metric: str) -> Iterator[tuple[str, GuardRule]]:
    yield name, _limit("stops", metric, "higher", MIN_STOP_RATE)
    loss = _not_worse("stops", metric, "higher", MAX_STOP_RATE_LOSS, against="production")
    yield f"{name} against production", loss


def _limit(guard: str, metric: str, direction: Direction, limit: float) -> GuardRule:
    return GuardRule(guard=guard, metric=metric, direction=direction, test="limit", limit=limit, min_items=1)


def _not_worse(guard: str, metric: str, direction: Direction, margin: float, *, against: str) -> GuardRule:
    return GuardRule(
        guard=guard,
        metric=metric,
        direction=direction,
        test="non-inferiority",
        margin=margin,
        against=against,
        min_items=1,
    )


def _training() -> GuardRule:
    """Against a number of the candidate itself: `observed` knows this guard."""
    return GuardRule(
        guard="training",
        metric="training_loss_end",
        direction="lower",
        test="superiority",
        margin=0.0,
        against="training_loss_start",
        min_items=1,
    )
