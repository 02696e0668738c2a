"""Sweeps: what does one base in memory save a cell, and does a search find better settings than a grid in equal time?

shared_base   a cell's training (few steps) and evaluation with the demo's shape: a random base as large as SmolLM2-135M
              in NF4, LoRA of rank 8. In turns, each stage in a process of its own, and both in one that
              keeps the base. Seconds, by the clock and of the processor; whether the adapters are the same to the byte
search        learning rate and rank of a LoRA for a tiny base with some wrong beliefs (`studies.trials`): a grid of 12
              cells against `graftline.workflow.searching` with as many training steps in all. What counts is the
              setting with the lowest loss on held-out rows, on rows that neither side saw. Every seed has another base
"""

import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any

import psutil

from graftline import settings
from graftline.adapters.attach import attach
from graftline.data.template import encode
from graftline.digest import write_json
from graftline.errors import TrainError
from graftline.train.best import held_out_loss
from graftline.train.results import StepMetrics
from graftline.train.trainer import train
from graftline.workflow import resolve
from graftline.workflow.searching import Search
from graftline.workflow.stage_worker import StageWorkers
from graftline.workflow.sweep_cells import SweepCell, SweepPlace, grid, make_cells, read_results, result_path
from graftline.workflow.workspace import Workspace
from studies.harness import Json, Setting, ratio
from studies.models import make_random, make_tiny_llama, make_tokenizer
from studies.project import ROOT, write_yaml
from studies.trials import World, load_base, make_world

PIPELINE = "sorted"
LABELS = ("animal", "plant", "person")
DEMO_SHAPE = {"hidden": 576, "intermediate": 1536, "vocabulary": 49152, "blocks": 30}
STEPS, ROUNDS, NUM_ROWS = 2, 4, 240


def shared_base(setting: Setting) -> Json:
    """Seconds of a cell's two stages, alone and with the base in memory."""
    project = _prepared(setting)
    (setting.work / "s").mkdir()
    workers = StageWorkers(project, setting.work / "s")
    taken: dict[str, list[tuple[float, float]]] = {"alone": [], "shared": []}
    for number in range(setting.size(setting.turns(ROUNDS) + 1, 1)):
        for place, side in enumerate(sorted(taken, reverse=bool(number % 2))):
            # Another seed on each side: a training that is done is not done again.
            found = _measure(project, workers, side, seed=2 * number + place)
            if number or setting.quick:  # the first time the process that keeps the base has none
                taken[side].append(found)
    adapters = [_adapter(project)]
    rmtree(project / "runs" / PIPELINE / ".work")
    _measure(project, workers, "alone" if side == "shared" else "shared", seed=2 * number + place)
    adapters.append(_adapter(project))
    workers.close()
    clock, cpu = ({side: [one[kind] for one in found] for side, found in taken.items()} for kind in (0, 1))
    return {
        "steps": STEPS,
        "seconds": {side: round(statistics.median(values), 1) for side, values in clock.items()},
        "cpu_seconds": {side: round(statistics.median(values), 1) for side, values in cpu.items()},
        "shared_over_alone": ratio(clock["shared"], clock["alone"]),
        "shared_over_alone_cpu": ratio(cpu["shared"], cpu["alone"]),
        "same_bytes": adapters[0] == adapters[1],
    }


def _measure(project: Path, workers: StageWorkers, side: str, *, seed: int) -> tuple[float, float]:
    """Train and evaluate as DVC would start it; returns seconds by the clock, and of the processor."""
    _change_seed(project, seed)
    with workers.borrow() as worker:
        while not Path(*worker.values()).exists():
            time.sleep(0.1)
        started, used = time.monotonic(), _cpu_seconds()
        for stage in ("train", "evaluate"):
            subprocess.run(
                [sys.executable, "-m", f"tasks.{stage}", PIPELINE],
                cwd=project,
                env=os.environ | {"PYTHONPATH": str(ROOT)} | (worker if side == "shared" else {}),
                check=True,
                capture_output=True,
            )
        return time.monotonic() - started, _cpu_seconds() - used


def _cpu_seconds() -> float:
    """Of all processes that this one started."""
    ended = os.times()
    live = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    return ended.children_user + ended.children_system + sum(times.user + times.system for times in live)


def _adapter(project: Path) -> bytes:
    return (project / "runs" / PIPELINE / "train" / "adapter" / "adapter_model.safetensors").read_bytes()


def _prepared(setting: Setting) -> Path:
    """A project whose rows and quantized base are made."""
    from tasks import fetch, init, validate

    folder = setting.work / "project"
    base = folder / "base"
    if setting.quick:
        make_tiny_llama(base)
    else:
        make_random(base, **DEMO_SHAPE)
        make_tokenizer(base)
    rows = (json.dumps(row) + "\n" for row in _rows())
    (folder / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    (folder / "keys.yaml").write_text("keys: []\nunsigned: true\n", encoding="utf-8")
    (folder / "tasks").symlink_to(ROOT / "tasks")
    _change_seed(folder, 0)
    opened = settings.load(folder / settings.DEFAULT_FILE).pipeline(PIPELINE), Workspace(folder, PIPELINE)
    for stage in (resolve, fetch, validate, init):
        stage.run(*opened)
    return folder


def _change_seed(project: Path, seed: int) -> None:
    _write_pipeline(
        project,
        {"steps": STEPS, "batch_size": 4, "learning_rate": 5e-4, "threads": 1, "seed": seed},
        double_quant=True,
    )


def _write_pipeline(project: Path, train_section: Mapping[str, Any], **quantize: Any) -> None:
    gate = {"metric": "accuracy", "direction": "higher", "test": "superiority", "margin": 0.0, "against": "base"}
    pipeline: dict[str, Any] = {
        "base": {"source": "path:base", "dtype": "bfloat16", "template": "none"},
        "data": {"source": "path:rows.jsonl", "evaluation_rows": 100, "max_tokens": 128, "labels": list(LABELS)},
        "quantize": {"method": "nf4", **quantize},
        "adapter": {"method": "lora", "rank": 8, "alpha": 16},
        "train": dict(train_section),
        "evaluate": {"metric": "accuracy"},
        "gates": {"better": gate},
        "package": {"merged": True},
        "release": {"store": "store", "channel": "production"},
    }
    write_yaml(project, {"pipelines": {PIPELINE: pipeline}, "channels": {"production": {}}})


def _rows() -> list[dict[str, str]]:
    """Rows of which no two are alike."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=4)) for _ in range(2000)]
    labels = [LABELS[number % len(LABELS)] for number in range(NUM_ROWS)]
    return [{"prompt": f"{' '.join(draw.sample(words, 4))}:", "completion": f" {label}"} for label in labels]


GRID: Mapping[str, list[float]] = {"train.learning_rate": [1e-4, 1e-3, 1e-2, 1e-1], "adapter.rank": [2, 8, 32]}
SPACE = {"train.learning_rate": ["1e-4..1e-1"], "adapter.rank": ["2..32"]}
STEPS_OF_A_CELL = 48
SEARCHED = {
    "evaluate_every": 6,
    "held_out_rows": 100,
    "batch_size": 16,
    "learning_rate": 1e-3,
    "threads": 1,
}


class SpentError(Exception):
    """The budget of training steps is used up."""


@dataclass
class Trainings:
    """Real trainings of cells, in this process; no cell begins after ``budget`` steps."""

    world: World
    budget: int
    losses: dict[str, float] = field(default_factory=dict)
    """By the cell's name, on rows that no side saw: of every training that came to its end."""
    steps: int = 0

    def __call__(self, cell: SweepCell, watch: Callable[[str], None], out: Path) -> None:
        """Train a cell, and write its result."""
        if self.steps >= self.budget:
            raise SpentError
        pipeline = settings.parse_config(cell.document(threads=None).encode(), Path("cell")).pipeline(PIPELINE)
        rows = [encode(row, self.world.tokenizer, template=self.world.template) for row in self.world.training]
        held_out, training = rows[: pipeline.train.held_out_rows], rows[pipeline.train.held_out_rows :]
        model = load_base(self.world)
        attach(model, pipeline.adapter, seed=pipeline.train.seed)
        history: list[Json] = []

        def on_step(metrics: StepMetrics) -> None:
            self.steps += 1
            history.append({"step": metrics.step, "loss": metrics.loss})
            if metrics.score is not None:
                history[-1]["held_out_loss"] = metrics.score
                watch(f"after step {metrics.step} of {metrics.total_steps} the held-out loss is {metrics.score:.6g}")

        result = train(
            model,
            training,
            settings=pipeline.train,
            work=out / "work" / cell.name,
            on_step=on_step,
            evaluate=held_out_loss(held_out, pipeline.train),
        )
        seen = [encode(row, self.world.tokenizer, template=self.world.template) for row in self.world.evaluation]
        self.losses[cell.name] = held_out_loss(seen, pipeline.train)(model)
        figures: Json = {
            "train": {"loss_last": result.losses[-1], "trained_parameters": 0},
            "train_cost": {"seconds": 0.0},
        }
        figures |= {"history": history, "evaluate": {"candidate": {"accuracy": 0.0}}}
        write_json(result_path(out, cell), {"revision": "none", "results": figures})


def search(setting: Setting) -> Json:
    """The loss of what a grid and a search choose, seed by seed."""
    found = [_compare(setting, seed) for seed in range(setting.turns(6))]
    differences = [one["search"]["loss"] - one["grid"]["loss"] for one in found]
    return {
        "grid": GRID,
        "space": SPACE,
        "seeds": found,
        "search_minus_grid_nats": {
            "mean": round(statistics.mean(differences), 4),
            "deviation": round(statistics.stdev(differences), 4),
            "search_is_lower_in": sum(difference < 0 for difference in differences),
            "of": len(differences),
        },
    }


def _compare(setting: Setting, seed: int) -> Json:
    folder = setting.work / f"seed-{seed}"
    world = make_world(folder / "world", seed=seed, steps=setting.size(400, 20))
    steps = setting.size(STEPS_OF_A_CELL, 12)
    train_section: Json = {"steps": steps, **SEARCHED}
    _write_pipeline(folder, train_section)
    cells = make_cells(folder, PIPELINE, grid(GRID), [seed])[: setting.size(None, 3)]
    budget = len(cells) * steps
    on_grid = Trainings(world, budget)
    for cell in cells:
        with suppress(TrainError):
            on_grid(cell, lambda _: None, folder / "grid")
    place = SweepPlace(folder, "none", folder / "search", None)
    found, trainings = Search(place, PIPELINE, SPACE, seed=seed), Trainings(world, budget)
    with suppress(SpentError):
        found.run(lambda cell, watch: trainings(cell, watch, place.out), deadline=math.inf)
    best = found.ranked()[0]
    (chosen,) = make_cells(folder, PIPELINE, {"chosen": best.overrides}, [seed])
    results = read_results(folder / "grid", cells)
    best_cell = min(results, key=lambda name: _lowest(results[name]))
    states = [trial.state for trial in found.trials]
    return {
        "grid": {
            "loss": round(on_grid.losses[best_cell], 4),
            "chosen": next(cell.overrides for cell in cells if cell.name == best_cell),
            "steps": on_grid.steps,
        },
        "search": {
            "loss": round(trainings.losses[chosen.name], 4),
            "chosen": best.overrides,
            "steps": trainings.steps,
            "cells": {state: states.count(state) for state in sorted(set(states))},
        },
    }


def _lowest(result: Json) -> float:
    return min(step["held_out_loss"] for step in result["results"]["history"] if "held_out_loss" in step)


PARTS = {"shared_base": shared_base, "search": search}
