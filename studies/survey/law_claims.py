"""The claims about laws: MIUB against cross-entropy and perplexity (11), loss over adapter size and data (13)."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from studies.survey import laws
from studies.survey.arms import judged, read_cells
from studies.survey.claims import NOT_RUN, Claim
from studies.survey.grid import FEW_SEEDS, LAW_RANKS, LAW_ROWS, SIZES

QUANTITIES: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "MIUB": lambda cell: float(cell["miub"]),
    "cross-entropy": lambda cell: float(cell["after"]["test"]),
    "perplexity": lambda cell: math.exp(cell["after"]["test"]),
}
_GRID = (
    f"sizes {', '.join(SIZES)} × ranks {', '.join(map(str, LAW_RANKS))} × rows {', '.join(map(str, LAW_ROWS))}"
    f" × {len(FEW_SEEDS)} seeds, scale 2, each row seen once, a rate for each size and rank"
)


def miub(results: Path) -> Claim:
    """Claim 11."""
    title = "MIUB's law"
    says = "MIUB falls with model size, rank and data, and follows a law more closely than cross-entropy and perplexity"
    method = f"{_GRID}; MIUB as docs/gates.md defines it (our definition), on the prompts of 40 test rows"
    cells = _cells(results)
    if not cells:
        return Claim(11, title, says, method, NOT_RUN, ("the part `laws` is not complete; run `make evidence`",))
    data = {name: laws.points(cells, of) for name, of in QUANTITIES.items()}
    fits = {name: laws.fit_simple(found) for name, found in data.items()}
    errors = {name: laws.leave_one_size_out(found) for name, found in data.items()}
    relative = {name: _mean(errors[name]) / laws.spread(found) for name, found in data.items()}
    head = ("quantity", "exponent of N", "of r", "of D", "error on a size left out", "over its spread")
    table = [
        head,
        *((name, *map(_shown, fits[name]), f"{_mean(errors[name]):.1%}", f"{relative[name]:.2f}") for name in data),
    ]
    falls = [
        f"{found.factor}: fell in {found.fell} of {found.compared} comparisons of neighbours (Holm p {found.p:.2g})"
        for found in laws.directions(data["MIUB"])
    ]
    all_fall = all(exponent.low > 0 for exponent in fits["MIUB"])
    closest = min(relative, key=lambda name: relative[name])
    verdict = (
        f"{'supported' if all_fall else 'not supported'} that it falls with all three; "
        f"{'supported' if closest == 'MIUB' else 'not supported'} that its law is the closest"
    )
    findings = (
        "exponents above 0 mean that the quantity falls; intervals are 95 %, settings resampled",
        *falls,
        f"error on a left-out size over the quantity's own spread is least for {closest}",
    )
    return Claim(11, title, says, method, verdict, findings, tuple(table), "miub")


def loss_law(results: Path) -> Claim:
    """Claim 13."""
    title, says = "A law of the loss", "the loss follows a power law in adapter size and data"
    method = f"{_GRID}; L = E + A / (r^b D^d) for each size"
    cells = _cells(results)
    if not cells:
        return Claim(13, title, says, method, NOT_RUN, ("the part `laws` is not complete; run `make evidence`",))
    table: list[tuple[str, ...]] = [("size", "floor E", "exponent of r", "exponent of D", "error of the fit")]
    certain: dict[str, list[str]] = {"r": [], "D": []}
    without: list[str] = []
    for size in SIZES:
        found = laws.fit_floor(
            laws.points([cell for cell in cells if cell["size"] == size], QUANTITIES["cross-entropy"])
        )
        floor = "not identified" if found.floor is None else f"{found.floor:.3f}"
        without += [size] if found.floor is None else []
        table.append((size, floor, _shown(found.rank), _shown(found.rows), f"{found.error:.1%}"))
        for exponent in (found.rank, found.rows):
            certain[exponent.factor] += [size] if exponent.low > 0 else []
    whole = laws.fit_simple(laws.points(cells, QUANTITIES["cross-entropy"]))
    findings = (
        f"the loss falls significantly with rank at {', '.join(certain['r']) or 'no size'}, with rows at "
        f"{', '.join(certain['D']) or 'no size'}",
        f"sizes whose floor is not identified: {', '.join(without) or 'none'}; there it may as well be zero, and the "
        "exponents are those of the law without one",
        f"no floor, all sizes: exponents of N {_shown(whole[0])}, r {_shown(whole[1])}, D {_shown(whole[2])}",
    )
    verdict = ", ".join(
        f"{'supported' if len(certain[factor]) == len(SIZES) else 'not supported at every size'} for {name}"
        for factor, name in (("r", "adapter size"), ("D", "data"))
    )
    return Claim(13, title, says, method, verdict, findings, tuple(table), "loss_law")


def _cells(results: Path) -> list[Mapping[str, Any]]:
    """The part's cells, none unless every setting has at least one."""
    cells = judged(read_cells(results, "laws"))
    settings = {(cell["size"], cell["rank"], cell["rows"]) for cell in cells}
    return list(cells) if len(settings) == len(SIZES) * len(LAW_RANKS) * len(LAW_ROWS) else []


def _shown(exponent: laws.Exponent) -> str:
    return f"{exponent.value:+.3f} [{exponent.low:+.3f}, {exponent.high:+.3f}]"


def _mean(errors: Mapping[str, float]) -> float:
    return sum(errors.values()) / len(errors)
