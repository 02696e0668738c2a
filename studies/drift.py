"""Drift of prompts: how often is a release's drift told when there is none, and how many keys does a real one take?

simulation      releases with 1,000 training prompts by `graftline.evaluate.statistics.drift`, looked at after each key.
                Prompts have a topic with words of its own, common words and a length. Late: nothing changes for the
                first 500 keys; the keys until it is told count from there
false_alarms    many more releases whose users ask as the training rows do

The table in Markdown is that of docs/request-log.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from graftline.evaluate.statistics.drift import DriftTest, Prompt
from studies.harness import Json, Setting
from studies.rollouts import upper_limit

ALPHA = 0.05


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What users ask: mean length, share of the fourth topic, and keys before that begins."""

    length: float = 20.0
    topic: float = 0.1
    foreign: float = 0.0
    """Share of prompts about a topic that the training rows do not have."""
    begins: int = 0


USUAL = Truth()
USERS: Mapping[str, Truth] = {
    "as the training rows": USUAL,
    "15 % longer": Truth(length=23.0),
    "a topic in 20 % of prompts instead of 10 %": Truth(topic=0.2),
    "a topic in 40 % of prompts instead of 10 %": Truth(topic=0.4),
    "10 % about a topic that the rows do not have": Truth(foreign=0.1),
    "the same, late": Truth(foreign=0.1, begins=500),
}


def draw(rng: np.random.Generator, truth: Truth, number: int) -> list[Prompt]:
    """Prompts of a number of keys."""
    topics = rng.choice(5, size=number, p=_shares(truth))
    lengths = 4 + rng.poisson(truth.length - 4, number)
    found = []
    for topic, length in zip(topics.tolist(), lengths.tolist(), strict=True):
        # Squared, so that small numbers are common words and large ones are seldom.
        common = (400 * rng.random(length // 2) ** 3).astype(int).tolist()
        own = rng.integers(0, 60, length // 3).tolist()
        found.append(Prompt(length, tuple(sorted({*common, *(1000 * (topic + 1) + word for word in own)}))))
    return found


def _shares(truth: Truth) -> list[float]:
    known = 1 - truth.topic - truth.foreign
    return [known * 0.5, known * 0.3, known * 0.2, truth.topic, truth.foreign]


def keys_until_told(rng: np.random.Generator, truth: Truth, max_keys: int) -> int | None:
    """How many keys a release takes until its drift is told; None if it is not."""
    test = DriftTest(draw(rng, USUAL, 1_000), ALPHA)
    before, after = draw(rng, USUAL, truth.begins), draw(rng, truth, max_keys)
    draws = rng.random(len(before) + len(after)).tolist()
    for number, (prompt, between) in enumerate(zip([*before, *after], draws, strict=True), start=1):
        test.add_numbers(test.numbers(prompt), between)
        if test.found:
            return max(number - truth.begins, 0)
    return None


def simulation(setting: Setting) -> Json:
    """Every kind of users; 1,000 releases of each, of at most 1,000 keys."""
    num_releases, max_keys = setting.rounds or setting.size(1_000, 2), setting.size(1_000, 30)
    found: Json = {}
    for number, (name, truth) in enumerate(USERS.items()):
        rng = np.random.default_rng([setting.seed, number])
        until = [keys_until_told(rng, truth, max_keys) for _ in range(num_releases)]
        told = [keys for keys in until if keys is not None]
        found[name] = {
            "releases": num_releases,
            "told": len(told) / num_releases,
            "told_upper_95": upper_limit(len(told), num_releases),
            "keys_until_told": [int(np.quantile(told, q)) for q in (0.5, 0.95)] if told else None,
        }
    lines = ["| users ask | told (upper 95 % limit) | keys until told, median (95 % quantile) |", "|---|---|---|"]
    lines += [_row(name, cell) for name, cell in found.items()]
    return {"alpha": ALPHA, "max_keys": max_keys, "users": found, "markdown": lines}


def false_alarms(setting: Setting) -> Json:
    """800 releases without drift, 500 keys each."""
    num_releases, max_keys = setting.rounds or setting.size(800, 2), setting.size(500, 30)
    rng = np.random.default_rng([setting.seed, 99])
    told = sum(keys_until_told(rng, USUAL, max_keys) is not None for _ in range(num_releases))
    found = {"told": told / num_releases, "told_upper_95": upper_limit(told, num_releases)}
    return {"alpha": ALPHA, "max_keys": max_keys, "releases": num_releases, **found}


def _row(name: str, cell: Json) -> str:
    keys = cell["keys_until_told"]
    shown = f"{keys[0]:,} ({keys[1]:,})" if keys else "-"
    return f"| {name} | {cell['told']:.1%} ({cell['told_upper_95']:.1%}) | {shown} |"


PARTS = {"simulation": simulation, "false_alarms": false_alarms}
