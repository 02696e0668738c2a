"""What the cells of a sweep show together: a table as JSON and text, and a page."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from graftline.digest import write_json, write_text
from graftline.evaluate.statistics.seeds import SeedEstimate, difference_over_seeds, mean_over_seeds
from graftline.release.pages.sweep_page import Estimate, SweepView, VariantView, write_sweep
from graftline.words import count
from graftline.workflow.sweep_cells import Cell, read_results

_COLUMNS = ("nll", "forgetting_nll", "loss_last", "train_seconds", "trained_parameters")
"""What the page's table shows beside the pipeline's metric; ``summary.json`` has every number."""


def write_summary(out: Path, cells: Sequence[Cell], failures: Sequence[tuple[Cell, str]] = ()) -> None:
    """Write ``summary.json``, ``summary.txt`` and ``sweep.html`` of the cells that are done."""
    view = summarize(cells, read_results(out, cells), failures)
    write_json(out / "summary.json", {"format": 1} | asdict(view))
    write_text(out / "summary.txt", _as_text(view, out))
    write_sweep(out / "sweep.html", view)


def summarize(
    cells: Sequence[Cell], results: dict[str, dict[str, Any]], failures: Sequence[tuple[Cell, str]] = ()
) -> SweepView:
    """Means over the seeds of every variant, in the cells' order; the first one is what others are compared with."""
    metric = cells[0].settings["evaluate"]["metric"]
    first = _values(cells, results, cells[0].variant, metric)
    names = list(dict.fromkeys(cell.variant for cell in cells))
    variants = tuple(_variant(name, cells, results, metric=metric, first=first) for name in names)
    return SweepView(
        pipeline=cells[0].pipeline,
        metric=metric,
        columns=(metric, *(name for name in _COLUMNS if any(name in variant.metrics for variant in variants))),
        seeds=tuple(dict.fromkeys(cell.seed for cell in cells)),
        variants=variants,
        revisions=tuple(dict.fromkeys(result["revision"] for result in results.values())),
        failures=tuple((f"{cell.variant}, seed {cell.seed}", reason) for cell, reason in failures),
    )


def _variant(
    name: str, cells: Sequence[Cell], results: dict[str, dict[str, Any]], *, metric: str, first: dict[int, float]
) -> VariantView:
    mine = [cell for cell in cells if cell.variant == name]
    done = [results[cell.name] for cell in mine if cell.name in results]
    numbers = [_numbers(result) for result in done]
    values = _values(cells, results, name, metric)
    compared = difference_over_seeds(values, first) if name != cells[0].variant else None
    return VariantView(
        name=name,
        values=tuple(sorted(values.items())),
        metrics={
            key: _estimate(mean_over_seeds([one[key] for one in numbers if key in one]))
            for key in dict.fromkeys(key for one in numbers for key in one)
        },
        difference=_estimate(compared) if compared else None,
        missing=len(mine) - len(done),
    )


def _values(cells: Sequence[Cell], results: dict[str, dict[str, Any]], variant: str, metric: str) -> dict[int, float]:
    done = (cell for cell in cells if cell.variant == variant and cell.name in results)
    return {cell.seed: _numbers(results[cell.name])[metric] for cell in done}


def _numbers(result: dict[str, Any]) -> dict[str, float]:
    found = result["results"]
    cost = {"train_seconds": found["train_cost"]["seconds"], "trained_parameters": found["train"]["trained_parameters"]}
    evaluated = {
        name: value for name, value in found["evaluate"]["candidate"].items() if isinstance(value, int | float)
    }
    return {**evaluated, "loss_last": found["train"]["loss_last"], **cost}


def _estimate(found: SeedEstimate) -> Estimate:
    return Estimate(mean=found.mean, low=found.low, high=found.high)


def _as_text(view: SweepView, out: Path) -> str:
    width = max(len(variant.name) for variant in view.variants)
    lines = [f"{'variant':<{width}}  {'seeds':>5}  {view.metric} (95 % interval over seeds)"]
    for variant in view.variants:
        estimate = variant.metrics.get(view.metric)
        interval = f" [{estimate.low:.4g}, {estimate.high:.4g}]" if estimate and estimate.low is not None else ""
        shown = f"{estimate.mean:.4g}{interval}" if estimate else "not run"
        lines.append(f"{variant.name:<{width}}  {len(variant.values):>5}  {shown}")
    todo = sum(variant.missing for variant in view.variants)
    if todo:
        lines.append(f"not done: {count(todo, 'cell')}; run again to go on")
    return "\n".join([*lines, f"page: {out / 'sweep.html'}", ""])
