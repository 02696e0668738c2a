"""Run parts of the study; what has a result is not run again.

python -m studies.survey methods laws          # the text and the models are those of `dvc repro` here
python -m studies.survey methods --minutes 20        # start no cell after 20 minutes; call it again to go on
"""

import argparse
import functools
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock

from graftline.digest import write_json
from graftline.errors import TrainError
from studies.survey import cells, grid
from studies.survey.cells import Cell
from studies.survey.text import Text, load

HERE = Path(__file__).parent


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


def _runner(text: Text, family: Path) -> Callable[[Cell], dict[str, Any]]:
    def run(cell: Cell) -> dict[str, Any]:
        try:
            found = cells.run(cell, text, family)
        except TrainError as error:  # a rate that is too high is a result too
            found = {**asdict(cell), "failed": str(error).splitlines()[0]}
        shown = found.get("failed") or f"test {found['after']['test']:.4f}, {found['cpu_seconds']} s"
        print(
            f"{time.strftime('%H:%M:%S')} {cell.arm}, rate {cell.learning_rate:g}, seed {cell.seed}: {shown}",
            flush=True,
        )
        return found

    return run


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=grid.PARTS)
    parser.add_argument("--text", type=Path, default=HERE / "data" / "text")
    parser.add_argument("--family", type=Path, default=HERE / "data" / "family")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--minutes", type=float, help="start no cell after so many minutes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    deadline = time.time() + 60 * given.minutes if given.minutes is not None else float("inf")
    results = Results(given.out, _runner(load(given.text), given.family), deadline=deadline)
    try:
        for part in given.parts:
            grid.PARTS[part](results.of(part))
    except OutOfTimeError:
        print("the minutes are over; run it again to go on")


if __name__ == "__main__":
    main()
