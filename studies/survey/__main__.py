"""The survey's claims tried: `python -m studies survey PART …` runs what has no result yet.

text, family                 what models learn and are adapted to; small Llamas trained on it (dvc.yaml runs these)
methods, ranks, bits, laws   trainings of the family by the hundred, each an entry of results/PART.json
real                         trainings of SmolLM2-135M through the demo's pipeline by `flows.sweep`
codes, gradients             what needs no training, on SmolLM2-135M
page                         docs/evidence.md and its figures, from the results
defaults                     what `graftline recommend` and `graftline init` choose from, from the results

With --minutes 20 nothing is started after 20 minutes; the same call goes on.
"""

import argparse
import functools
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock

from graftline.digest import write_json
from graftline.errors import TrainError
from graftline.plan.evidence import EVIDENCE
from graftline.workflow.outcome import explained_errors
from studies.survey import cells, defaults, family, grid, page, probes, text
from studies.survey.cells import Cell

HERE = Path(__file__).parent
TEXT, FAMILY, RESULTS = HERE / "data" / "text", HERE / "data" / "family", HERE / "results"
PARTS = ("text", "family", *grid.PARTS, "real", *probes.PROBES, "page", "defaults")


class OutOfTimeError(Exception):
    """The minutes are over; what is done is kept."""


class Results:
    """Cells that are done, one file for each part."""

    def __init__(self, out: Path, run: Callable[[Cell], dict[str, Any]], *, deadline: float) -> None:
        self._out, self._run, self._deadline = out, run, deadline

    def of(self, part: str) -> Callable[[Cell], dict[str, Any]]:
        """What runs a cell of ``part``, or reads its result."""
        return functools.partial(self._one, self._out / f"{part}.json")

    def _one(self, path: Path, cell: Cell) -> dict[str, Any]:
        found: dict[str, Any] | None = read(path).get("cells", {}).get(cell.name)
        if found is None:
            if time.time() > self._deadline:
                raise OutOfTimeError
            found = self._run(cell)
            with FileLock(path.with_suffix(".lock")):
                document = read(path) or {"format": 1, "part": path.stem, "made_with": versions(), "cells": {}}
                document["cells"][cell.name] = found
                write_json(path, document)
        return found


def read(path: Path) -> dict[str, Any]:
    """A part's file, empty where there is none."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def versions() -> dict[str, str]:
    """What decides a result beside its settings."""
    return {
        "graftline": metadata.version("graftline"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, 1 thread of 2 cores",
    }


def _runner(loaded: text.Text, family: Path) -> Callable[[Cell], dict[str, Any]]:
    def run(cell: Cell) -> dict[str, Any]:
        try:
            found = cells.run(cell, loaded, family)
        except TrainError as error:  # a rate that is too high is a result too
            found = {**asdict(cell), "failed": str(error).splitlines()[0]}
        shown = found.get("failed") or f"test {found['after']['test']:.4f}, {found['cpu_seconds']} s"
        print(
            f"{time.strftime('%H:%M:%S')} {cell.arm}, rate {cell.learning_rate:g}, seed {cell.seed}: {shown}",
            flush=True,
        )
        return found

    return run


def run(part: str, *, sizes: Sequence[str], deadline: float) -> None:
    """One part; see the module's docstring."""
    if part == "text":
        text.make(TEXT)
    elif part == "family":
        for size in sizes:
            family.make(size, TEXT, FAMILY / size)
    elif part in grid.PARTS:
        grid.PARTS[part](Results(RESULTS, _runner(text.load(TEXT), FAMILY), deadline=deadline).of(part))
    elif part == "real":
        from studies.survey import real  # starts Prefect

        with explained_errors():
            real.run(RESULTS / "real.json", deadline)
    elif part in probes.PROBES:
        out = RESULTS / f"{part}.json"
        if not out.exists():
            document = {"format": 1, "part": part, "made_with": versions()}
            write_json(out, document | probes.PROBES[part](TEXT))
    elif part == "page":
        page.write(RESULTS, HERE.parents[1] / "docs")
    else:
        write_json(EVIDENCE, {"format": 1, "page": "docs/evidence.md", "arms": defaults.arms(RESULTS)})


def main(argv: Sequence[str]) -> int:
    """Command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m studies survey", description=__doc__, formatter_class=formatter)
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--sizes", nargs="+", choices=family.SIZES, default=list(family.SIZES), help="of the family")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no training after so many minutes")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    deadline = time.time() + 60 * given.minutes
    for part in given.parts:
        try:
            run(part, sizes=given.sizes, deadline=deadline)
        except OutOfTimeError:
            print(f"{part}: the minutes are over; run it again to go on")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
