"""Which cells each part of the study has. Learning rates are tuned first, on rows that no verdict is taken from.

A rate is tuned with one seed of its own: of a first grid the best one, and while that lies at an edge the grid grows by
one. Every rate that was tried is in the results.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from evidence.cells import Cell

RunCell = Callable[[Cell], dict[str, Any]]
TUNING_SEED = 100
SEEDS = (0, 1, 2, 3, 4)
FEW_SEEDS = (0, 1, 2)
MARKS = (5, 10, 15, 20, 30, 40, 60, 80, 100, 150)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)

_BASE = Cell(arm="", size="m", method="lora", learning_rate=0.0, seed=TUNING_SEED, marks=MARKS)
METHOD_ARMS: dict[str, tuple[Cell, Sequence[float]]] = {
    "full": (replace(_BASE, method="full"), (3e-4, 1e-3, 3e-3)),
    "lora": (_BASE, (1e-3, 3e-3, 1e-2)),
    "dora": (replace(_BASE, method="dora"), (1e-3, 3e-3, 1e-2)),
    "dora half rank": (replace(_BASE, method="dora", rank=4), (1e-3, 3e-3, 1e-2)),
    "pissa": (replace(_BASE, method="pissa", alpha=8.0), (1e-3, 3e-3, 1e-2)),
    "vera": (replace(_BASE, method="vera", rank=32), (1e-2, 3e-2, 1e-1)),
    "houlsby": (replace(_BASE, method="houlsby"), (1e-3, 3e-3, 1e-2)),
}
SIZES = ("xs", "s", "m", "l")
LAW_RANKS, LAW_ROWS = (2, 8, 32), (320, 1280, 5120)
RANKS = (4, 16, 64, 128)
BITS = (2, 2.25, 2.5, 3, 4)


def methods(run: RunCell) -> None:
    """Every method at its tuned rate, five seeds (claims 1, 3, 4, 5, 10)."""
    for arm, (cell, grid) in METHOD_ARMS.items():
        rate = tune(replace(cell, arm=arm), grid, run)
        _run_all(run, (replace(cell, arm=arm, learning_rate=rate, seed=seed) for seed in SEEDS))


def rates(run: RunCell) -> None:
    """LoRA's rate for each size."""
    for size in SIZES:
        lora_rate(size, run)


def lora_rate(size: str, run: RunCell) -> float:
    """The rate that the other parts use for a size: tuned at rank 8, scale 2, 1,280 rows."""
    cell = Cell(arm=f"lora {size}", size=size, method="lora", learning_rate=0.0, seed=TUNING_SEED, rows=1280, steps=80)
    return tune(cell, (3e-3, 1e-2), run)


def ranks(run: RunCell) -> None:
    """LoRA and rsLoRA at one rate and alpha over ranks (claim 2)."""
    base = Cell(arm="", size="l", method="lora", learning_rate=lora_rate("l", run), seed=0, steps=100)
    for method in ("lora", "rslora"):
        for rank in RANKS:
            cell = replace(base, arm=f"{method} r={rank}", method=method, rank=rank)
            _run_all(run, (cell.with_seed(seed) for seed in FEW_SEEDS))


def bits(run: RunCell) -> None:
    """16-bit, QLoRA and LoftQ by bits, at one rate (claims 6 and 7)."""
    base = Cell(
        arm="16 bits", size="l", method="lora", learning_rate=lora_rate("l", run), seed=0, rank=16, alpha=16, steps=100
    )
    cells = [base]
    for width in BITS:
        cells.append(replace(base, arm=f"qlora {width} bits", bits=width))
        cells.append(replace(base, arm=f"loftq {width} bits", bits=width, paired=True))
    for cell in cells:
        _run_all(run, (cell.with_seed(seed) for seed in FEW_SEEDS))


def laws(run: RunCell) -> None:
    """Size × rank × rows at constant scale, each row seen once (claims 11 and 13)."""
    for seed in FEW_SEEDS:
        for size in SIZES:
            rate = lora_rate(size, run)
            for rank in LAW_RANKS:
                for rows in LAW_ROWS:
                    run(
                        Cell(
                            arm=f"{size} r={rank} D={rows}",
                            size=size,
                            method="lora",
                            learning_rate=rate,
                            seed=seed,
                            rank=rank,
                            alpha=2.0 * rank,
                            rows=rows,
                            steps=rows // 16,
                            miub=True,
                        )
                    )


PARTS: dict[str, Callable[[RunCell], None]] = {
    "methods": methods,
    "rates": rates,
    "ranks": ranks,
    "bits": bits,
    "laws": laws,
}


def tune(cell: Cell, grid: Sequence[float], run: RunCell) -> float:
    """The rate with the lowest loss on the tuning rows; a grid whose best lies at its edge grows."""
    found = {rate: _tuning_loss(cell, rate, run) for rate in grid}
    while True:
        best = min(found, key=lambda rate: found[rate])
        at = RATES.index(best)
        beyond = [RATES[i] for i in (at - 1, at + 1) if 0 <= i < len(RATES) and RATES[i] not in found]
        if not beyond:
            return best
        found[beyond[0]] = _tuning_loss(cell, beyond[0], run)


def _tuning_loss(cell: Cell, rate: float, run: RunCell) -> float:
    try:
        return float(run(replace(cell, learning_rate=rate, marks=()))["after"]["tuning"])
    except KeyError:  # the training exploded: its cell holds the reason instead of results
        return float("inf")


def _run_all(run: RunCell, cells: Iterable[Cell]) -> None:
    for cell in cells:
        run(cell)
