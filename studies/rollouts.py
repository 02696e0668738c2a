"""Rollouts: how often is a good candidate rolled back, and how many keys meet a bad one before it is stopped?

simulation      rollouts at 5 % and 25 % by `graftline.serve.judge`, looked at after every key. Keys differ (some fail,
                are slow or chat more than others), and errors and latency rise and fall over the day. At the margin: a
                candidate exactly as much worse as is just allowed, where a false rollback is likeliest

The table in Markdown is that of docs/rollouts.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta

from graftline.serve.judge import Contest, Rule, as_margin
from studies.harness import Json, Setting

ALPHA = 0.05
SHARES = (0.05, 0.25)
MARGINS = {
    "errors": 0.02,
    "slower": as_margin(1.25),
    "longer": as_margin(1.5),
    "shorter": as_margin(1.5),
    "refusals": 0.05,
    "unended": 0.05,
    "feedback": 0.05,
}
_BLOCK, _CHUNK = 250, 250
"""Keys and rollouts computed at once."""
_DAY = 4000
"""Keys in a day."""


@dataclass(frozen=True, kw_only=True)
class Truth:
    """How a version answers: shares of requests, and factors on the incumbent's seconds and tokens."""

    errors: float = 0.01
    seconds: float = 1.0
    tokens: float = 1.0
    refusals: float = 0.03
    unended: float = 0.02
    bad: float = 0.03
    """Share of requests that are rated bad; 0.05 are rated good."""


INCUMBENT = Truth()
CANDIDATES: Mapping[str, Truth] = {
    "equal": INCUMBENT,
    "worse within the margins": Truth(errors=0.015, seconds=1.08, refusals=0.04),
    "at the margin of errors": Truth(errors=0.01 + MARGINS["errors"]),
    "clearly bad: refuses and is cut short": Truth(refusals=0.2, tokens=0.5, bad=0.1),
    "slow: twice the seconds": Truth(seconds=2.0),
    "failing: one request in three": Truth(errors=0.33),
}


def draw(
    rng: np.random.Generator, truth: Truth, shape: tuple[int, int], *, first_key: int, share: float
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Figures and versions of (rollouts, keys): a candidate like ``truth`` beside `INCUMBENT`."""
    is_candidate = rng.random(shape) < share
    wave = np.sin(2 * np.pi * (first_key + np.arange(shape[1])) / _DAY)
    requests = 1 + rng.poisson(2.0, shape)

    def shares(name: str, spread: float = 4.0) -> np.ndarray:
        rate = np.where(is_candidate, getattr(truth, name), getattr(INCUMBENT, name))
        # A key's tendency: a gamma factor of mean 1, so that many keys never fail and a few fail often.
        tendency = rng.standard_gamma(1 / spread, shape) * spread
        return rng.binomial(requests, np.minimum(rate * tendency, 1.0)) / requests

    figures = {"errors": shares("errors"), "refusals": shares("refusals"), "unended": shares("unended")}
    good = rng.binomial(requests, 0.05) / requests
    figures["feedback"] = np.clip(0.5 + (shares("bad") - good) / 2, 0.0, 1.0)
    slow = np.where(is_candidate, truth.seconds, 1.0) * np.exp(0.3 * wave)
    figures["seconds"] = slow * np.exp(rng.normal(0.0, 0.6, shape))
    figures["tokens"] = np.where(is_candidate, truth.tokens, 1.0) * np.exp(rng.normal(5.0, 0.8, shape))
    return figures, is_candidate


@dataclass
class Share:
    """The rollouts' fates at one share, one number for each: keys until it went back or moved on."""

    entered: int
    back: list[int]
    met: list[int]
    """The candidate's keys until it went back."""
    on: list[int]


def roll_out(rng: np.random.Generator, truth: Truth, num_rollouts: int, max_keys: int) -> list[Share]:
    """Simulate rollouts side by side; those that move on enter the next share."""
    shares: list[Share] = []
    for share in SHARES:
        entered = len(shares[-1].on) if shares else num_rollouts
        shares.append(_at_share(rng, truth, share, entered, max_keys))
    return shares


def _at_share(rng: np.random.Generator, truth: Truth, share: float, entered: int, max_keys: int) -> Share:
    contest = Contest(Rule(share=share, num_shares=len(SHARES), alpha=ALPHA, margins=MARGINS), entered)
    found, candidates = Share(entered, [], [], []), np.zeros(entered, dtype=int)
    for first_key in range(0, max_keys, _BLOCK):
        if not len(candidates):
            break
        figures, is_candidate = draw(rng, truth, (len(candidates), _BLOCK), first_key=first_key, share=share)
        at_back, at_on = (_first(one) for one in contest.add(figures, is_candidate))
        goes_back, moves_on = (at_back <= at_on) & (at_back < _BLOCK), at_on < at_back
        seen = candidates[:, None] + np.cumsum(is_candidate, axis=1)
        found.back += (first_key + 1 + at_back[goes_back]).tolist()
        found.met += seen[goes_back, at_back[goes_back]].tolist()
        found.on += (first_key + 1 + at_on[moves_on]).tolist()
        stays = ~(goes_back | moves_on)
        candidates = seen[stays, -1]
        contest.keep(stays)
    return found


def _first(decided: np.ndarray) -> np.ndarray:
    """The first key of a block that decides, for each rollout; the block's length where none does."""
    return np.where(decided.any(axis=1), decided.argmax(axis=1), _BLOCK)


def simulation(setting: Setting) -> Json:
    """Every candidate; 10,000 rollouts each, of at most 20,000 keys a share."""
    num_rollouts, max_keys = setting.rounds or setting.size(10_000, 20), setting.size(20_000, 1_000)
    found: Json = {}
    for number, (name, truth) in enumerate(CANDIDATES.items()):
        rng = np.random.default_rng([setting.seed, number])
        chunk = min(num_rollouts, _CHUNK)
        parts = [roll_out(rng, truth, chunk, max_keys) for _ in range(num_rollouts // chunk)]
        found[name] = summary(parts)
    lines = [
        "| candidate | promoted | back (upper 95 % limit) | held | back at 5 % | its keys until back | until 25 % |",
        "|---|---|---|---|---|---|---|",
        *(_row(name, cell) for name, cell in found.items()),
    ]
    return {"alpha": ALPHA, "margins": MARGINS, "max_keys": max_keys, "candidates": found, "markdown": lines}


def summary(parts: list[list[Share]]) -> Json:
    """Shares of rollouts, and the median and the 95 % quantile of keys."""
    num_rollouts = sum(part[0].entered for part in parts)
    num_back, num_promoted = (sum(len(s.back) for part in parts for s in part), sum(len(p[-1].on) for p in parts))
    return {
        "rollouts": num_rollouts,
        "promoted": num_promoted / num_rollouts,
        "rolled_back": num_back / num_rollouts,
        "rolled_back_upper_95": upper_limit(num_back, num_rollouts),
        "rolled_back_at_first_share": sum(len(part[0].back) for part in parts) / num_rollouts,
        "held": 1 - (num_promoted + num_back) / num_rollouts,
        "candidates_keys_until_back": _quantiles([keys for part in parts for keys in part[0].met]),
        "keys_until_second_share": _quantiles([keys for part in parts for keys in part[0].on]),
    }


def upper_limit(count: int, total: int) -> float:
    """One-sided upper 95 % limit of a probability (Clopper and Pearson)."""
    return float(beta.ppf(0.95, count + 1, total - count)) if count < total else 1.0


def _quantiles(keys: list[int]) -> list[int] | None:
    return [int(np.quantile(keys, q)) for q in (0.5, 0.95)] if keys else None


def _row(name: str, cell: Json) -> str:
    def keys(found: list[int] | None) -> str:
        return f"{found[0]:,} ({found[1]:,})" if found else "-"

    return (
        f"| {name} | {cell['promoted']:.2%} | {cell['rolled_back']:.2%} ({cell['rolled_back_upper_95']:.2%}) "
        f"| {cell['held']:.2%} | {cell['rolled_back_at_first_share']:.2%} | {keys(cell['candidates_keys_until_back'])} "
        f"| {keys(cell['keys_until_second_share'])} |"
    )


PARTS = {"simulation": simulation}
