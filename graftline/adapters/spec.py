"""What an adapter is to be: method, size, where it goes. Checked when made, and against the model when attached."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from graftline.errors import AdapterError

Number = TypeVar("Number", int, float)

ALL_LINEAR = "all-linear"
"""Every linear layer except the output head, as PEFT means it."""


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """One adapter.

    Raises:
        AdapterError: a value is out of its range, or a pattern is no regular expression.
    """

    method: str
    """A name from `graftline.adapters.methods.METHODS`."""
    rank: int = 8
    """R of the update, or a bottleneck's width; 1 … min(input features, output features) of each layer."""
    alpha: float = 16.0
    """Sets the scale: alpha / rank, for rsLoRA alpha / √rank. VeRA and bottlenecks have no scale and ignore it."""
    dropout: float = 0.0
    """Probability with which an input of the update is zeroed in training; 0 ≤ p < 1."""
    targets: str | tuple[str, ...] = ALL_LINEAR
    """``all-linear``, a regular expression for the whole path, or suffixes of paths such as ``q_proj``."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Another rank for layers whose path ends in the key (a regular expression); the first match counts."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Another alpha, likewise."""
    bias: Literal["none", "all", "adapter_only"] = "none"
    """Which biases of the base are trained too: none, all, or those of the adapted layers."""
    modules_to_save: tuple[str, ...] = ()
    """Suffixes of modules that are trained whole and stored whole, for example ``lm_head``."""
    svd: Literal["exact", "fast"] = "fast"
    """PiSSA's decomposition: LAPACK's, or a randomized one that is 18 to 65 times faster and within 0.5 %."""
    projection_seed: int = 0
    """VeRA's seed of the projections that all layers share."""

    def __post_init__(self) -> None:
        _check_rank(self.rank, "rank")
        _check_alpha(self.alpha, "alpha")
        if not 0.0 <= self.dropout < 1.0:
            raise AdapterError(f"dropout {self.dropout} is outside 0 ≤ p < 1; 0 switches it off")
        if self.bias not in ("none", "all", "adapter_only"):
            raise AdapterError(f"bias is {self.bias!r}; expected none, all or adapter_only")
        if not self.targets or (not isinstance(self.targets, str) and not all(self.targets)):
            raise AdapterError("targets is empty; write all-linear, a list of layer names, or a regular expression")
        if isinstance(self.targets, str) and self.targets != ALL_LINEAR:
            _check_pattern(self.targets, "targets")
        for pattern, rank in self.rank_pattern.items():
            _check_pattern(pattern, "rank_pattern")
            _check_rank(rank, f"rank_pattern[{pattern!r}]")
        for pattern, alpha in self.alpha_pattern.items():
            _check_pattern(pattern, "alpha_pattern")
            _check_alpha(alpha, f"alpha_pattern[{pattern!r}]")

    def rank_of(self, name: str) -> int:
        """The rank of the layer at path ``name``."""
        return _first_match(self.rank_pattern, name, self.rank)

    def alpha_of(self, name: str) -> float:
        """The alpha of the layer at path ``name``."""
        return _first_match(self.alpha_pattern, name, self.alpha)


def _first_match(patterns: Mapping[str, Number], name: str, default: Number) -> Number:
    # PEFT's rule (utils/other.py, get_pattern_key), so that a file means the same there.
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _check_rank(rank: int, name: str) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise AdapterError(f"{name} is {rank!r}; expected a whole number of at least 1 (8 is usual)")


def _check_alpha(alpha: float, name: str) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha <= 0:
        raise AdapterError(f"{name} is {alpha!r}; expected a finite number above 0 (16, or twice the rank, is usual)")


def _check_pattern(pattern: str, name: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise AdapterError(f"{name}: {pattern!r} is no regular expression: {error}") from error
