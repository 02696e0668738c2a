"""Is a candidate worse on live requests than the incumbent? Always-valid sequential tests, one value per key.

A hash sends each key (a user, a conversation) to one version, so its version is a coin toss that gives the candidate
with probability s, whatever the key asks. With y the key's value in [0, 1] and c the incumbent's mean of earlier keys,

    d = (y - c) / s            where the candidate answered
    d = -(y - c) / (1 - s)     where the incumbent did

has the expected value "candidate's mean minus incumbent's" for every key, even while traffic changes over the day. Two
gamblers bet on each d: one that the difference is above the guard's margin m, one that it is below. Their wealth

    W <- W * (1 + f * (d - m) / (largest loss)),  averaged over several fractions f

is a nonnegative supermartingale where the bettor is wrong, so P(W ever reaches 1/alpha) <= alpha (Ville; betting as in
Waudby-Smith & Ramdas, 2010.09686, with inverse probabilities as in 2210.10768): looking after every key costs nothing.

A rollback needs the mean over guards of the wealth "worse by more than the margin" to reach (number of judged
shares) / alpha: a mean of such wealths is again a supermartingale, and the shares split alpha. Moving on needs each
guard's wealth "not worse by the margin" to have reached 1/alpha: all of them must, so no correction is needed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Decision = Literal["back", "on", "hold"]

_FRACTIONS = np.array([0.8, 0.32, 0.128, 0.0512, 0.02])
"""Of the largest bet that cannot ruin: large bets find large differences within few keys, small bets small ones."""


@dataclass(frozen=True)
class Guard:
    """One way to be worse: the value of a key in [0, 1], higher is worse."""

    column: str
    """Which of a key's figures it reads."""
    relative: int = 0
    """1: values are v / (v + r), where r is the geometric mean of the incumbent's keys so far: 1/2 is as usual, 2/3
    twice as much. -1: r / (v + r). 0: the figure is a share already."""

    @property
    def prior(self) -> float:
        """The incumbent's mean before its first key."""
        return 0.5 if self.relative or self.column == "feedback" else 0.0


GUARDS: Mapping[str, Guard] = {
    "errors": Guard("errors"),
    "slower": Guard("seconds", 1),
    "longer": Guard("tokens", 1),
    "shorter": Guard("tokens", -1),
    "refusals": Guard("refusals"),
    "unended": Guard("unended"),
    "feedback": Guard("feedback"),
}
COLUMNS = tuple(dict.fromkeys(guard.column for guard in GUARDS.values()))
"""A key's figures: shares of its requests that failed, were refused by the model or did not end (0 to 1); geometric
means of seconds and tokens of those that were answered (NaN: none was); feedback from 0 (all good) over 1/2 (none) to
1 (all bad)."""


def as_margin(factor: float) -> float:
    """The margin of a relative guard that allows ``factor`` times as much: 1.25 gives 0.056."""
    return factor / (1 + factor) - 0.5


class Bets:
    """The two gamblers of one guard, for R rollouts side by side; keys come in blocks, in the order of their arrival.

    Args:
        guard: what is judged.
        share: probability that a key is the candidate's, between 0 and 1.
        margin: largest difference of means that counts as not worse, at least 0.
        num_rollouts: R.
    """

    def __init__(self, guard: Guard, *, share: float, margin: float, num_rollouts: int = 1) -> None:
        self._guard, self._share, self._margin = guard, share, margin
        self._worse = np.ones((len(_FRACTIONS), num_rollouts, 1))
        self._fine = self._worse.copy()
        self._level = _Mean(num_rollouts, guard.prior, weight=1.0)
        self._usual = _Mean(num_rollouts, 0.0, weight=0.0)

    def bet(self, figures_RK: Floats, is_candidate_RK: Bools) -> tuple[Floats, Floats]:
        """Wealth after each of K further keys: of "worse by more than the margin", and of "not worse by the margin".

        Both have the shape (R, K).
        """
        y_RK = self._values(figures_RK, ~is_candidate_RK)
        c_RK = self._level.before(y_RK, ~is_candidate_RK)
        share, margin = self._share, self._margin
        d_RK = np.where(is_candidate_RK, (y_RK - c_RK) / share, (c_RK - y_RK) / (1 - share))
        lowest_RK = np.maximum(c_RK / share, (1 - c_RK) / (1 - share)) + margin
        highest_RK = np.maximum((1 - c_RK) / share, c_RK / (1 - share)) - margin
        f_F11 = _FRACTIONS[:, None, None]
        with np.errstate(over="ignore"):  # an infinite wealth decides, too
            worse_FRK = self._worse * np.cumprod(1 + f_F11 * ((d_RK - margin) / lowest_RK), axis=-1)
            fine_FRK = self._fine * np.cumprod(1 - f_F11 * ((d_RK - margin) / highest_RK), axis=-1)
        if y_RK.shape[-1]:
            self._worse, self._fine = worse_FRK[..., -1:], fine_FRK[..., -1:]
        return worse_FRK.mean(axis=0), fine_FRK.mean(axis=0)

    def keep(self, rows: Bools) -> None:
        """Keep only some of the rollouts."""
        self._worse, self._fine = self._worse[:, rows], self._fine[:, rows]
        self._level.keep(rows)
        self._usual.keep(rows)

    def _values(self, figures_RK: Floats, is_incumbent_RK: Bools) -> Floats:
        if not self._guard.relative:
            return figures_RK
        logs_RK = np.log(figures_RK)
        known_RK = ~np.isnan(logs_RK)
        logs_RK = np.where(known_RK, logs_RK, 0.0)
        usual_RK = self._usual.before(logs_RK, is_incumbent_RK & known_RK)
        # v / (v + r) is the logistic function of log(v / r).
        values_RK: Floats = 1 / (1 + np.exp(-self._guard.relative * (logs_RK - usual_RK)))
        return np.where(known_RK & ~np.isnan(usual_RK), values_RK, 0.5)


class _Mean:
    """A running mean of what was counted before each key."""

    def __init__(self, num_rollouts: int, prior: float, *, weight: float) -> None:
        self._total = np.full((num_rollouts, 1), prior * weight)
        self._count = np.full((num_rollouts, 1), weight)

    def before(self, values_RK: Floats, counts_RK: Bools) -> Floats:
        """The mean before each key, which no later key changes; NaN before the first."""
        added_RK = np.where(counts_RK, values_RK, 0.0)
        total_RK, count_RK = np.cumsum(added_RK, axis=-1), np.cumsum(counts_RK, axis=-1)
        with np.errstate(invalid="ignore"):
            mean_RK: Floats = (self._total + total_RK - added_RK) / (self._count + count_RK - counts_RK)
        if values_RK.shape[-1]:
            self._total = self._total + total_RK[:, -1:]
            self._count = self._count + count_RK[:, -1:]
        return mean_RK

    def keep(self, rows: Bools) -> None:
        self._total, self._count = self._total[rows], self._count[rows]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How sure a decision must be."""

    share: float
    """Probability that a key is the candidate's."""
    num_shares: int
    """How many shares are judged in the rollout; they split alpha."""
    alpha: float
    """Probability of a rollback when no guard is worse by more than its margin, and of moving on when one is."""
    margins: Mapping[str, float]
    """Largest difference of a guard's means that counts as not worse, by the guard's name; others are not judged."""


class Contest:
    """R rollouts at one share, judged after every key."""

    def __init__(self, rule: Rule, num_rollouts: int = 1) -> None:
        self.rule = rule
        self._bets = {
            name: Bets(GUARDS[name], share=rule.share, margin=margin, num_rollouts=num_rollouts)
            for name, margin in rule.margins.items()
        }
        self.shown = np.zeros((len(self._bets), num_rollouts))
        """The most that each guard's "not worse" has reached, (guards, R)."""
        self.worse = np.ones((len(self._bets), num_rollouts))
        """Each guard's "worse" after the last key, (guards, R)."""

    def add(self, figures: Mapping[str, Floats], is_candidate_RK: Bools) -> tuple[Bools, Bools]:
        """Whether to go back, and whether to move on, after each of K further keys: (R, K) each.

        ``figures`` holds (R, K) a column of `COLUMNS`.
        """
        worse, fine = zip(
            *(bets.bet(figures[GUARDS[name].column], is_candidate_RK) for name, bets in self._bets.items()),
            strict=True,
        )
        worse_GRK, fine_GRK = np.stack(worse), np.maximum.accumulate(np.stack(fine), axis=-1)
        fine_GRK = np.maximum(fine_GRK, self.shown[..., None])
        if is_candidate_RK.shape[-1]:
            self.worse, self.shown = worse_GRK[..., -1], fine_GRK[..., -1]
        is_worse_RK = worse_GRK.mean(axis=0) >= self.rule.num_shares / self.rule.alpha
        back_RK: Bools = np.logical_or.accumulate(is_worse_RK, axis=-1)
        on_RK: Bools = np.all(fine_GRK >= 1 / self.rule.alpha, axis=0)
        return back_RK, on_RK

    def keep(self, rows: Bools) -> None:
        """Keep only some of the rollouts."""
        for bets in self._bets.values():
            bets.keep(rows)
        self.shown, self.worse = self.shown[:, rows], self.worse[:, rows]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What the keys of one share say so far."""

    decision: Decision
    num_keys: tuple[int, int]
    """Of the incumbent, of the candidate."""
    means: Mapping[str, tuple[float | None, float | None]]
    """By column: the incumbent's mean and the candidate's; None: no key has a figure."""
    worse: Mapping[str, float]
    """By guard: the evidence that it is worse by more than the margin; 1 is none."""
    fine: Mapping[str, float]
    """By guard: the most evidence so far that it is not worse by the margin."""
    reason: str
    """One sentence for the channel's history."""


def judge(figures: Mapping[str, Floats], is_candidate: Bools, rule: Rule) -> Standing:
    """Judge the keys of one share, (K,) each, in the order of their arrival.

    The result is the first decision that the keys lead to, however often and whenever this is called.
    """
    contest = Contest(rule)
    back_RK, on_RK = contest.add({name: values[None] for name, values in figures.items()}, is_candidate[None])
    worse = dict(zip(rule.margins, contest.worse[:, 0].tolist(), strict=True))
    fine = dict(zip(rule.margins, contest.shown[:, 0].tolist(), strict=True))
    means = {name: (_mean(v[~is_candidate], name), _mean(v[is_candidate], name)) for name, v in figures.items()}
    num_keys = (int((~is_candidate).sum()), int(is_candidate.sum()))
    decision: Decision = "back" if back_RK.any() else "on" if on_RK.any() else "hold"
    about = f"{num_keys[1]} keys of the candidate, {num_keys[0]} of the incumbent"
    if decision == "back":
        named = max(worse, key=lambda name: worse[name])
        reason = f"{_told(named, means)}: worse than allowed, evidence {worse[named]:.3g} to 1; {about}"
    elif decision == "on":
        reason = f"not worse than allowed in {', '.join(rule.margins)}; {about}"
    else:
        open_guards = [name for name, shown in fine.items() if shown < 1 / rule.alpha]
        reason = f"not decided: {', '.join(open_guards) or 'nothing'} not shown yet; {about}"
    return Standing(decision=decision, num_keys=num_keys, means=means, worse=worse, fine=fine, reason=reason)


def _mean(values: Floats, column: str) -> float | None:
    known = values[~np.isnan(values)]
    if not len(known):
        return None
    return float(np.exp(np.log(known).mean()) if column in ("seconds", "tokens") else known.mean())


def _told(guard: str, means: Mapping[str, tuple[float | None, float | None]]) -> str:
    before, now = ("none" if mean is None else f"{mean:.3g}" for mean in means[GUARDS[guard].column])
    return f"{guard}: {GUARDS[guard].column} {now} against {before}"
