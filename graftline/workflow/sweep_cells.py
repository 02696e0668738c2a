"""The cells of a sweep: a pipeline with some keys changed and a seed, each run in its own checkout.

A cell's result is a JSON file named by the digest of its pipeline's settings, so that other grids can reuse it. A cell
that was stopped keeps its checkout with the training's checkpoints.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

from filelock import FileLock

from graftline import settings
from graftline.digest import of_json, write_json, write_text
from graftline.errors import ConfigError, GraftlineError
from graftline.evaluate.statistics.intervals import SeedEstimate, difference_over_seeds, mean_over_seeds
from graftline.plain_text import count
from graftline.release.pages.registry_page import Estimate, SweepView, VariantView, few_seeds, write_sweep
from graftline.settings.gate_metrics import METRICS, OF_ENGINES
from graftline.settings.tree import read_tree
from graftline.workflow import stages, worktree

Overrides = Mapping[str, Any]
"""New values of a pipeline's keys, such as ``adapter.rank``."""
SEED_KEY = "train.seed"
LAST_STAGE = "evaluate"
"""The gates would need the merge, which costs more than it shows."""
SIDE_BY_SIDE = ".work/side-by-side.json"
"""About a training that ran beside others (`graftline.workflow.side_by_side`): how many, seconds and memory of all."""


@dataclass(frozen=True)
class SweepCell:
    """One training of a sweep."""

    pipeline: str
    variant: str
    """Name of its overrides, for people."""
    overrides: dict[str, Any]
    seed: int
    settings: dict[str, Any]
    """The pipeline's sections as in pipelines.yaml, changed."""
    channels: dict[str, Any]

    @property
    def shares_base(self) -> bool:
        """Whether one process trains it, which can then have the base in memory already."""
        train = settings.parse_config(self.document(threads=None).encode(), Path("cell")).pipeline(self.pipeline).train
        return train.processes == 1 and train.engine != "ray"

    @property
    def name(self) -> str:
        """Short digest of the settings: equal settings are the same cell."""
        return of_json({"pipeline": self.pipeline, "settings": self.settings}).short

    def document(self, *, threads: int | None) -> str:
        """The cell's pipelines.yaml, with ``threads`` if the pipeline does not set them."""
        train = {"threads": threads} | self.settings["train"] if threads else self.settings["train"]
        pipelines = {self.pipeline: self.settings | {"train": train}}
        return json.dumps({"pipelines": pipelines, "channels": self.channels}, indent=1)


def grid(axes: Mapping[str, Sequence[Any]]) -> dict[str, Overrides]:
    """Every combination of the axes' values, by a descriptive name."""
    combined = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    return {", ".join(f"{key}={_short(value)}" for key, value in one.items()) or "as it is": one for one in combined}


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def make_cells(root: Path, pipeline: str, variants: Mapping[str, Overrides], seeds: Sequence[int]) -> list[SweepCell]:
    """The cells of ``variants`` x ``seeds``, each checked like pipelines.yaml.

    Raises:
        ConfigError: pipelines.yaml, a key or a value is wrong; two variants are the same.
    """
    path = root / settings.DEFAULT_FILE
    settings.load(path).pipeline(pipeline)
    document = read_tree(path.read_bytes(), path.name).value
    cells = []
    for variant, overrides in variants.items():
        if SEED_KEY in overrides:
            raise ConfigError(f"{variant}: {SEED_KEY} is what the seeds set; give it with --seeds")
        if engine := [key for key in overrides if key.split(".")[:2] == ["evaluate", "engine"]]:
            raise ConfigError(
                f"{variant}: {engine[0]}: no server has the candidates of a sweep, whose cells are scored "
                "by graftline's own code; leave it out"
            )
        for seed in seeds:
            section = _without_engine(_changed(document["pipelines"][pipeline], {**overrides, SEED_KEY: seed}))
            cell = SweepCell(pipeline, variant, dict(overrides), seed, section, document["channels"])
            _check(cell)
            cells.append(cell)
    _refuse_twins(cells)
    return cells


def _changed(given: dict[str, Any], overrides: Overrides) -> dict[str, Any]:
    changed: dict[str, Any] = json.loads(json.dumps(given))
    for key, value in overrides.items():
        *sections, last = key.split(".")
        place = changed
        for section in sections:
            if not isinstance(place.setdefault(section, {}), dict):
                raise ConfigError(f"{key}: {section} is not a section of a pipeline; write keys such as adapter.rank")
            place = place[section]
        place[last] = value
    return changed


def _without_engine(section: dict[str, Any]) -> dict[str, Any]:
    """The pipeline scored by our own code: no server has a sweep's candidates, or one of them under a fixed name."""
    if (section.get("evaluate") or {}).get("engine") is None:
        return section
    evaluate = {key: value for key, value in section["evaluate"].items() if key != "engine"}
    gates = {name: gate for name, gate in (section.get("gates") or {}).items() if gate.get("metric") not in OF_ENGINES}
    return section | {"evaluate": evaluate, "gates": gates}


def _check(cell: SweepCell) -> None:
    try:
        settings.parse_config(cell.document(threads=None).encode(), Path("pipelines.yaml"))
    except ConfigError as error:
        raise ConfigError(f"{cell.variant}, seed {cell.seed}: {error}") from error


def _refuse_twins(cells: Sequence[SweepCell]) -> None:
    seen: dict[str, SweepCell] = {}
    for cell in cells:
        twin = seen.setdefault(cell.name, cell)
        if twin is not cell:
            raise ConfigError(
                f"{cell.variant!r} with seed {cell.seed} is the same pipeline as {twin.variant!r} with seed "
                f"{twin.seed}; leave one of them out"
            )


def result_path(out: Path, cell: SweepCell) -> Path:
    """The file of a cell's result."""
    return out / "cells" / f"{cell.name}.json"


def read_results(out: Path, cells: Sequence[SweepCell]) -> dict[str, dict[str, Any]]:
    """Results of the finished cells, by the cell's name; GraftlineError if a file is not JSON."""
    found = {}
    for cell in cells:
        path = result_path(out, cell)
        if path.is_file():
            try:
                found[cell.name] = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise GraftlineError(f"{path} is not JSON ({error}); delete it, and the cell runs again") from error
    return found


@dataclass(frozen=True)
class SweepPlace:
    """Where the cells of a sweep run; the paths are the same for every worker."""

    root: Path
    revision: str
    """Commit that every cell checks out."""
    out: Path
    threads: int | None
    """CPU threads for a pipeline that does not set them."""

    def folder_of(self, cell: SweepCell) -> Path:
        """The cell's checkout."""
        return self.root / ".cache" / "sweep" / cell.name


def run_cell(
    cell: SweepCell,
    where: SweepPlace,
    *,
    on_line: Callable[[str], None],
    environment: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Run the cell's pipeline up to its evaluation in its own checkout, and write its result. Raises StageFailedError.

    Its stages get the variables in ``environment``. What it shares with other cells (rows, quantized base) comes from
    DVC's run cache.
    """
    started = time.monotonic()
    place = _open(cell, where, on_line)
    ran = stages.reproduce_until(LAST_STAGE, cell.pipeline, root=place, on_line=on_line, environment=environment)
    result = {
        "format": 1,
        "pipeline": cell.pipeline,
        "variant": cell.variant,
        "overrides": cell.overrides,
        "seed": cell.seed,
        "settings": settings.load(place / settings.DEFAULT_FILE).pipeline(cell.pipeline).model_dump(mode="json"),
        "revision": where.revision,
        "stages_run": ran,
        "seconds": round(time.monotonic() - started, 1),
        "results": _collect(place / "runs" / cell.pipeline),
    }
    write_json(result_path(where.out, cell), result)
    with _git_lock(where):
        worktree.close(where.root, place)


def prepare_cell(cell: SweepCell, where: SweepPlace, *, on_line: Callable[[str], None]) -> Path:
    """Run what comes before the cell's training; returns its checkout. `run_cell` goes on. Raises StageFailedError."""
    place = _open(cell, where, on_line)
    stages.reproduce_before_training(cell.pipeline, root=place, on_line=on_line)
    return place


def _open(cell: SweepCell, where: SweepPlace, on_line: Callable[[str], None]) -> Path:
    """The cell's checkout, made or taken up, with its inputs pinned."""
    place = where.folder_of(cell)
    with _git_lock(where):
        worktree.open_at(where.root, place, where.revision)
    write_text(place / settings.DEFAULT_FILE, cell.document(threads=where.threads))
    worktree.link_local(place)
    stages.resolve(cell.pipeline, root=place, on_line=on_line)
    return place


def _git_lock(where: SweepPlace) -> FileLock:
    return FileLock(where.root / ".cache" / "sweep.lock")


def _collect(runs: Path) -> dict[str, Any]:
    files = {
        "train": "train/metrics.json",
        "history": "train/history.json",
        "train_cost": "train/stage.json",
        "evaluate": "evaluate/metrics.json",
    }
    if (runs / SIDE_BY_SIDE).is_file():
        files["side_by_side"] = SIDE_BY_SIDE
    return {name: json.loads((runs / file).read_text(encoding="utf-8")) for name, file in files.items()}


_COLUMNS = ("nll", "forgetting_nll", "loss_last", "train_seconds", "trained_parameters")
"""Columns of the page's table after the pipeline's metric; ``summary.json`` has every number."""


def write_summary(out: Path, cells: Sequence[SweepCell], failures: Sequence[tuple[SweepCell, str]] = ()) -> None:
    """Write ``summary.json``, ``summary.txt`` and ``sweep.html`` for the finished cells."""
    view = summarize(cells, read_results(out, cells), failures)
    write_json(out / "summary.json", {"format": 1} | asdict(view))
    write_text(out / "summary.txt", _as_text(view, out))
    write_sweep(out / "sweep.html", view)


def summarize(
    cells: Sequence[SweepCell], results: dict[str, dict[str, Any]], failures: Sequence[tuple[SweepCell, str]] = ()
) -> SweepView:
    """Means over the seeds of every variant, in the cells' order; the first variant is the reference for the others."""
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
    name: str, cells: Sequence[SweepCell], results: dict[str, dict[str, Any]], *, metric: str, first: dict[int, float]
) -> VariantView:
    mine = [cell for cell in cells if cell.variant == name]
    done = [results[cell.name] for cell in mine if cell.name in results]
    numbers = [_numbers(result) for result in done]
    values = _values(cells, results, name, metric)
    compared = difference_over_seeds(values, first, bounds=_bounds(metric)) if name != cells[0].variant else None
    return VariantView(
        name=name,
        values=tuple(sorted(values.items())),
        metrics={
            key: _estimate(mean_over_seeds([one[key] for one in numbers if key in one], bounds=_bounds(key)))
            for key in dict.fromkeys(key for one in numbers for key in one)
        },
        difference=_estimate(compared) if compared else None,
        missing=len(mine) - len(done),
    )


_OTHER_BOUNDS = {
    "calibration_error": (0.0, 1.0),
    "perplexity": (1.0, math.inf),
    "forgetting_perplexity": (1.0, math.inf),
}
"""Of numbers that no gate asks for; the others of them, losses, times and counts, are not below 0."""


def _bounds(name: str) -> tuple[float, float]:
    """Between which values a number lies by its definition."""
    if metric := METRICS.get(name):
        return metric.least, metric.most
    return _OTHER_BOUNDS.get(name, (0.0, math.inf))


def _values(
    cells: Sequence[SweepCell], results: dict[str, dict[str, Any]], variant: str, metric: str
) -> dict[int, float]:
    done = (cell for cell in cells if cell.variant == variant and cell.name in results)
    return {cell.seed: _numbers(results[cell.name])[metric] for cell in done}


def _numbers(result: dict[str, Any]) -> dict[str, float]:
    found = result["results"]
    seconds = found["train_cost"]["seconds"]
    if shared := found.get("side_by_side"):
        seconds += shared["seconds"] / shared["cells"]
    cost = {"train_seconds": seconds, "trained_parameters": found["train"]["trained_parameters"]}
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
    if few := few_seeds(view):
        lines.append(few)
    todo = sum(variant.missing for variant in view.variants)
    if todo:
        lines.append(f"not done: {count(todo, 'cell')}; run again to go on")
    return "\n".join([*lines, f"page: {out / 'sweep.html'}", ""])
