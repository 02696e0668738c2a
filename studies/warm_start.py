"""Warm start: does an adapter that continues from last night's release beat a fresh one, and what does it forget?

nights   five nights, each with another fifth of the rows (`studies.trials`: a tiny base with some wrong beliefs, and
         general text). Each night three adapters of one shape are trained on all rows so far: fresh, from last night's
         adapter with as many steps, and from it with a quarter of them. Measured: accuracy on held-out rows, loss on
         general text above the base's, and seconds. Intervals are over seeds
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from graftline.adapters.attach import attach
from graftline.adapters.peft_config import AdapterIdentity
from graftline.adapters.peft_format import AdapterWeights, attach_trained, save_adapter
from graftline.data.template import encode
from graftline.evaluate.metrics import accuracy, nll_per_token
from graftline.settings.model import Adapter
from graftline.weights.identity import read_identity
from studies.harness import Json, Setting
from studies.trials import World, evaluate, fit, load_base, make_world

SHAPE = Adapter(method="lora", rank=8, alpha=16)
NUM_NIGHTS, EPOCHS, BATCH, LEARNING_RATE = 5, 4, 16, 3e-3
ARMS = {"fresh": (False, 1.0), "warm": (True, 1.0), "warm, a quarter of the steps": (True, 0.25)}
"""By name: whether an adapter starts from last night's, and its share of a fresh one's steps."""


@dataclass(frozen=True)
class Night:
    """The figures of one night's adapter."""

    accuracy: float
    forgetting: float
    """Nats a token of general text above the base's."""
    seconds: float
    steps: int


def nights(setting: Setting) -> Json:
    """Every arm's nights, as means over seeds with the standard deviation between them."""
    found: dict[str, list[list[Night]]] = {name: [] for name in ARMS}
    for seed in range(setting.turns(setting.size(3, 1))):
        world = make_world(setting.work / f"world-{seed}", seed=seed, steps=setting.size(400, 40))
        for name, (is_warm, share) in ARMS.items():
            found[name].append(_nights(setting, world, seed, is_warm=is_warm, share=share))
    return {name: [_summary(list(night)) for night in zip(*seeds, strict=True)] for name, seeds in found.items()}


def _nights(setting: Setting, world: World, seed: int, *, is_warm: bool, share: float) -> list[Night]:
    before = nll_per_token(evaluate(world, load_base(world)).documents)
    rows = [encode(row, world.tokenizer, template=world.template) for row in world.training]
    previous: Path | None = None
    made = []
    for night in range(1, setting.size(NUM_NIGHTS, 2) + 1):
        so_far = rows[: night * len(rows) // NUM_NIGHTS]
        steps = max(1, round(len(so_far) * EPOCHS / BATCH * (share if previous else 1.0)))
        model = load_base(world)
        if previous:
            attach_trained(model, SHAPE, AdapterWeights.open(previous))
        else:
            attach(model, SHAPE, seed=seed)
        started = time.monotonic()
        fit(model, [so_far], steps=steps, learning_rate=LEARNING_RATE, seed=seed * NUM_NIGHTS + night, batch_size=BATCH)
        seconds = time.monotonic() - started
        scores = evaluate(world, model)
        made.append(Night(accuracy(scores.items), nll_per_token(scores.documents) - before, seconds, steps))
        if is_warm:
            previous = setting.work / f"adapter-{seed}-{share}-{night}"
            identity = AdapterIdentity(base_digest=read_identity(world.base).digest, quantizer=None)
            save_adapter(model, previous, identity=identity)
    return made


def _summary(seeds: list[Night]) -> Json:
    def spread(values: list[float]) -> Json:
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return {"mean": round(statistics.mean(values), 4), "deviation": round(deviation, 4)}

    return {
        "steps": seeds[0].steps,
        "accuracy": spread([night.accuracy for night in seeds]),
        "forgetting": spread([night.forgetting for night in seeds]),
        "seconds": spread([night.seconds for night in seeds]),
    }


PARTS = {"nights": nights}
