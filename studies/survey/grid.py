"""Which cells each part of the study has. Learning rates are tuned first, on rows that no verdict is taken from.

A rate is tuned with one seed of its own: of a first grid the best one, and while that lies at an edge the grid grows by
one. Every rate that was tried is in the results.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from studies.survey.cells import Cell

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

REAL_ADAPTERS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "rank": 8, "alpha": 16, "targets": "all-linear"},
}
REAL_RATES = {"full": (2e-5, 5e-5), "lora": (5e-4, 1e-3)}
"""Of SmolLM2-135M (studies/survey/real.py)."""


def methods(run: RunCell) -> None:
    """Every method at its tuned rate, five seeds (claims 1, 3, 4, 5, 10)."""
    for arm, (cell, grid) in METHOD_ARMS.items():
        rate = tune(replace(cell, arm=arm), grid, run)
        _run_all(run, (replace(cell, arm=arm, learning_rate=rate, seed=seed) for seed in SEEDS))


def ranks(run: RunCell) -> None:
    """LoRA and rsLoRA over ranks at one alpha, each at its rate for rank 16 (claim 2)."""
    base = Cell(arm="", size="l", method="lora", learning_rate=0.0, seed=TUNING_SEED, steps=100)
    for method in ("lora", "rslora"):
        tuned = replace(base, arm=method, method=method, rank=16)
        rate = tune(tuned, (3e-3, 1e-2), run)
        for rank in RANKS:
            cell = replace(tuned, arm=f"{method} r={rank}", rank=rank, learning_rate=rate)
            _run_all(run, (replace(cell, seed=seed) for seed in FEW_SEEDS))


def bits(run: RunCell) -> None:
    """16 bits, QLoRA and LoftQ by bits; the two initializations each at its rate for 3 bits (claims 6 and 7)."""
    base = Cell(arm="", size="l", method="lora", learning_rate=0.0, seed=TUNING_SEED, rank=16, alpha=16, steps=100)
    rates = {}
    for paired in (False, True):
        tuned = replace(base, arm="loftq" if paired else "qlora", bits=3, paired=paired)
        rates[paired] = tune(tuned, (3e-3, 1e-2), run)
    cells = [replace(base, arm="16 bits", learning_rate=rates[False])]
    for width in BITS:
        for paired, name in ((False, "qlora"), (True, "loftq")):
            arm = f"{name} {width} bits"
            cells.append(replace(base, arm=arm, bits=width, paired=paired, learning_rate=rates[paired]))
    for cell in cells:
        _run_all(run, (replace(cell, seed=seed) for seed in FEW_SEEDS))


def laws(run: RunCell) -> None:
    """Size × rank × rows at constant scale, each row seen once, a rate for each size and rank (claims 11 and 13)."""
    base = Cell(arm="", size="", method="lora", learning_rate=0.0, seed=TUNING_SEED)
    for size in SIZES:
        for rank in LAW_RANKS:
            adapter = replace(base, size=size, rank=rank, alpha=2.0 * rank)
            rate = tune(replace(adapter, arm=f"{size} r={rank}", rows=1280, steps=80), (3e-3, 1e-2), run)
            for rows in LAW_ROWS:
                arm = f"{size} r={rank} D={rows}"
                cell = replace(adapter, arm=arm, learning_rate=rate, rows=rows, steps=rows // 16, measures_miub=True)
                _run_all(run, (replace(cell, seed=seed) for seed in FEW_SEEDS))


PARTS: dict[str, Callable[[RunCell], None]] = {
    "methods": methods,
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
