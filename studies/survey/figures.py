"""The page's figures, from the raw results: docs/evidence/*.svg."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from studies.survey import laws, probe_claims
from studies.survey.arms import arm, estimate, judged, read_cells, test_loss, values
from studies.survey.grid import BITS, LAW_RANKS, LAW_ROWS, METHOD_ARMS, RANKS, SIZES
from studies.survey.law_claims import QUANTITIES

_STYLE: Any = {
    "figure.figsize": (7.2, 3.6),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 9,
    "legend.frameon": False,
    "svg.hashsalt": "graftline",  # the same file from the same results
}


def draw_all(results: Path, out: Path) -> list[str]:
    """Draw each figure whose results are there; returns their names."""
    out.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, draw in FIGURES.items():
        with plt.rc_context(_STYLE):
            if draw(results):
                plt.tight_layout()
                plt.savefig(out / f"{name}.svg", metadata={"Date": None})
                drawn.append(name)
            plt.close("all")
    return drawn


def methods(results: Path) -> bool:
    """Test loss of every arm and seed, and the learning rates that were tried."""
    cells = read_cells(results, "methods")
    if not cells:
        return False
    _, (left, right) = plt.subplots(1, 2)
    names = [name for name in METHOD_ARMS if arm(cells, name)]
    for at, name in enumerate(names):
        losses = list(values(arm(cells, name), test_loss).values())
        left.plot(losses, [at] * len(losses), "o", alpha=0.5, color=f"C{at}")
        found = estimate(losses)
        left.plot([found.low, found.high], [at, at], "-", lw=2, color=f"C{at}")
        tried = sorted(
            (cell["learning_rate"], cell["after"]["tuning"])
            for cell in cells
            if cell["arm"] == name and not cell["marks"]
        )
        right.plot(*zip(*tried, strict=True), "o-", color=f"C{at}", label=name)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel("test loss, nats a token (five seeds, 95 %)")
    right.set_xscale("log")
    right.set_xlabel("learning rate")
    right.set_ylabel("tuning loss")
    right.legend(fontsize=7)
    return True


def convergence(results: Path) -> bool:
    """Tuning loss over steps, mean of the seeds."""
    return _curves(results, ("full", "lora", "dora", "pissa", "vera", "houlsby"), "step", "task", "tuning loss", "step")


def forgetting(results: Path) -> bool:
    """General loss over task loss: to the left is learned, upwards is forgotten."""
    names = ("full", "lora", "dora", "pissa", "vera", "houlsby")
    drawn = _curves(
        results, names, "task", "general", "general text, nats a token", "task, nats a token (falls in training)"
    )
    if drawn:
        plt.gca().invert_xaxis()
    return drawn


def _curves(results: Path, names: tuple[str, ...], x: str, y: str, y_label: str, x_label: str) -> bool:
    cells = read_cells(results, "methods")
    if not cells:
        return False
    axes = plt.subplots()[1]
    for name in names:
        curves = [cell["curve"] for cell in arm(cells, name).values()]
        if curves:
            mean = [
                [float(np.mean([look[key] for look in looks])) for looks in zip(*curves, strict=True)] for key in (x, y)
            ]
            axes.plot(*mean, "o-", ms=3, label=name)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.legend(fontsize=7)
    return True


def ranks(results: Path) -> bool:
    """Test loss over rank, and the gradient of B at step 0."""
    cells = read_cells(results, "ranks")
    if not cells:
        return False
    _, (left, right) = plt.subplots(1, 2)
    for at, method in enumerate(("lora", "rslora")):
        for rank in RANKS:
            losses = list(values(arm(cells, f"{method} r={rank}"), test_loss).values())
            left.plot(
                [rank] * len(losses), losses, "o", color=f"C{at}", alpha=0.5, label=method if rank == RANKS[0] else None
            )
        norms = probe_claims.gradient_norms(results).get(method, {})
        right.plot(
            [int(rank) for rank in norms], [float(np.mean(found)) for found in norms.values()], "o-", color=f"C{at}"
        )
    _log2(left, "rank (size l)", RANKS)
    left.set_ylabel("test loss, nats a token")
    left.legend()
    _log2(right, "rank (SmolLM2-135M)", (4, 16, 64, 256))
    right.set_yscale("log")
    right.set_ylabel("gradient of B at step 0")
    return True


def _log2(axes: Axes, label: str, ticks: tuple[int, ...]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel(label)


def bits(results: Path) -> bool:
    """Test loss over bits, QLoRA and LoftQ, beside 16 bits."""
    cells = read_cells(results, "bits")
    if not cells:
        return False
    axes = plt.subplots()[1]
    for at, method in enumerate(("qlora", "loftq")):
        found = {b: list(values(arm(cells, f"{method} {b} bits"), test_loss).values()) for b in BITS}
        axes.plot(list(found), [float(np.mean(losses)) for losses in found.values()], "-", color=f"C{at}", label=method)
        for width, losses in found.items():
            axes.plot([width] * len(losses), losses, "o", color=f"C{at}", alpha=0.5)
    dense = list(values(arm(cells, "16 bits"), test_loss).values())
    axes.axhline(float(np.mean(dense)), color="gray", ls="--", label="16 bits")
    axes.set_xlabel("bits of a code, mean over blocks")
    axes.set_ylabel("test loss, nats a token")
    axes.legend()
    return True


def codes(results: Path) -> bool:
    """Perplexity of general text by code."""
    _, ordered, table = probe_claims.perplexities(results)
    if ordered is None:
        return False
    axes = plt.subplots(figsize=(7.2, 2.6))[1]
    names, found = [row[0] for row in table[1:]], [float(row[2]) for row in table[1:]]
    axes.barh(names, found, color="C0")
    axes.invert_yaxis()
    for at, value in enumerate(found):
        axes.text(value, at, f" {value:.2f}", va="center")
    axes.set_xlim(right=max(found) * 1.1)
    axes.set_xlabel("perplexity of general text, SmolLM2-135M")
    return True


def miub(results: Path) -> bool:
    """MIUB over size, one line a rank and one panel a number of rows."""
    return _by_size(results, QUANTITIES["MIUB"], "MIUB, nats")


def loss_law(results: Path) -> bool:
    """Test loss over size likewise."""
    return _by_size(results, QUANTITIES["cross-entropy"], "test loss, nats a token")


def _by_size(results: Path, of: Callable[[Any], float], label: str) -> bool:
    cells = judged(read_cells(results, "laws"))
    if not cells:
        return False
    panels = plt.subplots(1, len(LAW_ROWS), sharey=True)[1]
    for panel, rows in zip(panels, LAW_ROWS, strict=True):
        for at, rank in enumerate(LAW_RANKS):
            chosen = [cell for cell in cells if cell["rows"] == rows and cell["rank"] == rank]
            by_size = [[of(cell) for cell in chosen if cell["size"] == size] for size in SIZES]
            sizes = [laws.weights_of(size) for size in SIZES]
            means = [float(np.mean(found)) if found else math.nan for found in by_size]
            panel.plot(sizes, means, "-", color=f"C{at}", label=f"rank {rank}")
            for size, found in zip(sizes, by_size, strict=True):
                panel.plot([size] * len(found), found, "o", ms=3, alpha=0.5, color=f"C{at}")
        panel.set_xscale("log")
        panel.set_title(f"{rows:,} rows", fontsize=9)
        panel.set_xlabel("weights in the blocks")
    panels[0].set_ylabel(label)
    panels[0].legend(fontsize=7)
    return True


FIGURES: dict[str, Callable[[Path], bool]] = {
    draw.__name__: draw for draw in (methods, convergence, forgetting, ranks, bits, codes, miub, loss_law)
}
