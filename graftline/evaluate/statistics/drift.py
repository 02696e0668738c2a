"""Do new prompts come from where the training prompts came from? An always-valid two-sample test on ranks.

Some training prompts describe what is usual (`Usual`); the others and the new prompts are compared by five numbers:
length, how unusual the tokens are, and three directions in which the training prompts differ most. If training and new
prompts are exchangeable, the rank of each new number among all before it is uniform and independent of the earlier
ranks, whatever the distribution (conformal p-values; Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random
World"). Gamblers bet that ranks are too high, too low, too far out or too central, and change between these bets at
times (the Simple Jumper; Vovk et al., 2102.10439). Their mean wealth W is a nonnegative martingale, so
P(W ever reaches 5 / alpha) <= alpha / 5 for each number (Ville), and alpha for all: looking often costs nothing.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

NUMBERS = ("length", "unusual tokens", "direction 1", "direction 2", "direction 3")
_NUM_DIRECTIONS = 3
_NUM_COMMON = 300
"""Tokens that span the directions."""
_SLOPES = np.array([0.0, 0.9, -0.9, 0.4, -0.4, 0.0, 0.0])
_CURVES = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.8, -0.8])
_JUMPS = np.array([0.001, 0.02])
"""Probability of another bet at each prompt; small ones win more where nothing changes."""
_MOST_WEALTH = 1e100
"""An alarm long ago; more would become infinite."""


@dataclass(frozen=True)
class Prompt:
    """What counts of a prompt: its number of tokens, and which tokens it has (hashed, distinct)."""

    length: int
    tokens: tuple[int, ...]


class Usual:
    """What training prompts are like: turns a prompt into `NUMBERS`.

    Args:
        prompts: at least one.
        directions: `directions` of an earlier look, (C, D); computed when left out. Another machine or library finds
            them with other signs or in another order.

    Raises:
        ValueError: ``directions`` are of other prompts.
    """

    def __init__(self, prompts: Sequence[Prompt], directions: Sequence[Sequence[float]] | None = None) -> None:
        counts: dict[int, int] = {}
        for prompt in prompts:
            for token in prompt.tokens:
                counts[token] = counts.get(token, 0) + 1
        self._counts, self._num_prompts = counts, len(prompts)
        common = sorted(counts, key=lambda token: (-counts[token], token))[:_NUM_COMMON]
        self._column = {token: number for number, token in enumerate(common)}
        rows_NC = np.stack([self._row(prompt) for prompt in prompts])
        self._mean_C = rows_NC.mean(axis=0)
        centred_NC = rows_NC - self._mean_C
        if directions is None:
            _, vectors_CC = np.linalg.eigh(centred_NC.T @ centred_NC)
            self._directions_CD = vectors_CC[:, ::-1][:, :_NUM_DIRECTIONS]
        else:
            self._directions_CD = np.array(directions, dtype=np.float64).reshape(
                len(common), min(len(common), _NUM_DIRECTIONS)
            )

    @property
    def directions(self) -> list[list[float]]:
        """The directions in which the prompts differ most, (C, D)."""
        found: list[list[float]] = self._directions_CD.tolist()
        return found

    def numbers(self, prompt: Prompt) -> list[float]:
        """`NUMBERS` of a prompt, (5,); equal prompts have equal numbers."""
        seldom = [-np.log((self._counts.get(token, 0) + 0.5) / (self._num_prompts + 1)) for token in prompt.tokens]
        along = (self._row(prompt) - self._mean_C) @ self._directions_CD
        # Rounded, so that prompts that differ in the last digit of a sum alone are equal.
        found = [float(prompt.length), float(np.mean(seldom)) if seldom else 0.0, *along.tolist()]
        found += [0.0] * (len(NUMBERS) - len(found))
        return [round(number, 9) for number in found]

    def _row(self, prompt: Prompt) -> Floats:
        row_C = np.zeros(len(self._column))
        columns = [self._column[token] for token in prompt.tokens if token in self._column]
        row_C[columns] = 1 / np.sqrt(max(len(columns), 1))
        return row_C


class Ranks:
    """Conformal p-values of one number: each new value's rank among the reference and all values before it."""

    def __init__(self, reference: Sequence[float]) -> None:
        self._sorted = sorted(reference)

    def add(self, value: float, draw: float) -> float:
        """The rank of a value in (0, 1); ``draw``, uniform in (0, 1), decides between equal ones."""
        below, to = bisect_left(self._sorted, value), bisect_right(self._sorted, value)
        insort(self._sorted, value)
        return (below + draw * (to - below + 1)) / len(self._sorted)


class Bets:
    """The gamblers of R sequences of ranks side by side."""

    def __init__(self, num_sequences: int = 1) -> None:
        self.wealth_JBR = np.full((len(_JUMPS), len(_SLOPES), num_sequences), 1 / (len(_JUMPS) * len(_SLOPES)))

    def add(self, ranks_R: Floats) -> Floats:
        """Wealth after one more rank of each sequence, (R,)."""
        held_JBR, jumps_J11 = self.wealth_JBR, _JUMPS[:, None, None]
        held_JBR = (1 - jumps_J11) * held_JBR + jumps_J11 * held_JBR.mean(axis=1, keepdims=True)
        # Legendre's polynomials on [0, 1]: their means are 0, so no bet gains where ranks are uniform.
        first_R, second_R = 2 * ranks_R - 1, 6 * ranks_R * (ranks_R - 1) + 1
        held_JBR = held_JBR * (1 + _SLOPES[:, None] * first_R + _CURVES[:, None] * second_R)
        self.wealth_JBR = np.minimum(held_JBR, _MOST_WEALTH)
        total_R: Floats = self.wealth_JBR.sum(axis=(0, 1))
        return total_R


@dataclass
class DriftTest:
    """The test of one release's prompts; deterministic in the order in which prompts come.

    Args:
        training: training prompts in random order, at least two: one half says what is usual, the other is compared.
        alpha: largest probability of an alarm, ever, if nothing has changed.
        directions: of an earlier look at the same training prompts, so that its numbers mean the same (`Usual`).
    """

    training: Sequence[Prompt]
    alpha: float
    directions: list[list[float]] | None = None
    num_prompts: int = 0
    highest: list[float] = field(default_factory=lambda: [1.0] * len(NUMBERS))
    """The most evidence so far, by number; 1 is none."""
    mean_ranks: list[float] = field(default_factory=lambda: [0.5] * len(NUMBERS))
    """Of the new prompts' numbers; 0.5 is usual."""

    def __post_init__(self) -> None:
        half = len(self.training) // 2
        self._usual = Usual(self.training[:half], self.directions)
        self.directions = self._usual.directions
        reference = [self._usual.numbers(prompt) for prompt in self.training[half:]]
        self._ranks = [Ranks(column) for column in zip(*reference, strict=True)]
        self._bets = Bets(len(NUMBERS))

    def numbers(self, prompt: Prompt) -> list[float]:
        """`NUMBERS` of a prompt, for `add_numbers`."""
        return self._usual.numbers(prompt)

    def add_numbers(self, numbers: Sequence[float], draw: float) -> None:
        """Count a new prompt by its numbers; ``draw`` is uniform in (0, 1) and independent of it."""
        ranks = [one.add(number, draw) for one, number in zip(self._ranks, numbers, strict=True)]
        wealth = self._bets.add(np.array(ranks)).tolist()
        self.num_prompts += 1
        self.highest = [max(pair) for pair in zip(self.highest, wealth, strict=True)]
        self.mean_ranks = [m + (r - m) / self.num_prompts for m, r in zip(self.mean_ranks, ranks, strict=True)]

    @property
    def found(self) -> tuple[str, ...]:
        """The numbers that have drifted."""
        enough = len(NUMBERS) / self.alpha
        return tuple(name for name, wealth in zip(NUMBERS, self.highest, strict=True) if wealth >= enough)
