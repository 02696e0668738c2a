"""What all studies share: the command line, alternating turns, ratios with intervals, processes, results as JSON.

A study is a module with a docstring (its first line is shown by ``python -m studies``) and ``PARTS``: functions from a
`Setting` to what was found. Each part is written to the study's file when it is done, with the machine and the command
beside it; parts that are not run keep what the file has. The machine is shared, so only ratios within one run count.
"""

import argparse
import importlib
import json
import math
import os
import pkgutil
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil

from graftline import settings
from graftline.digest import write_json

RESULTS = Path(__file__).parent / "results"
DEMO = Path("runs/wordnet-category")
SURVEY = "survey"
"""A package with a command line of its own."""
_NOT_STUDIES = {"__main__", "harness", "models", "trials", "project", "memory_programs", "memory_published"}
_NOT_STUDIES |= {"gpu_jobs", "gpu_side", "gpu_targets", "gpu_serving", "soak_channels"}
_RESAMPLES = 2000
Json = dict[str, Any]
Found = TypeVar("Found")
Size = TypeVar("Size")


def _forget(_: Json) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a part is told. ``rounds`` 0 stands for the part's own number."""

    work: Path
    keep: Callable[[Json], None] = _forget
    """Write what a part has found so far, said to be partial: a long part that is killed leaves it behind."""
    ends: float = math.inf
    """`time.monotonic` after which a part begins nothing more (--minutes)."""
    quick: bool = False
    model: Path | None = None
    rows: Path | None = None
    rounds: int = 0
    seed: int = 0
    threads: int = 1

    def size(self, full: Size, quick: Size) -> Size:
        """How much: ``quick`` with --quick, else ``full``."""
        return quick if self.quick else full

    def turns(self, full: int) -> int:
        """Number of rounds: --rounds, else 2 with --quick, else ``full``."""
        return self.rounds or self.size(full, 2)

    def folder(self, name: str) -> Path:
        """A folder for intermediate files; with --work it outlives the run."""
        (self.work / name).mkdir(parents=True, exist_ok=True)
        return self.work / name

    def apart(
        self, function: Callable[..., Found], *args: object, environment: Mapping[str, str] | None = None
    ) -> Found:
        """`own_process`; with --quick in this process, since starting one takes longer than the work."""
        if self.quick:
            return function(*args)
        # What keeps a part's result belongs to this process.
        sent = [replace(each, keep=_forget) if isinstance(each, Setting) else each for each in args]
        return own_process(function, *sent, environment=environment)

    def base(self) -> Path:
        """The model folder: --model, a tiny one with --quick, else the demo's dense base, fetched if it is missing."""
        if self.model:
            return self.model
        if not self.quick:
            return demo_base()
        from studies.models import make_tiny_llama

        folder = self.work / "tiny"
        return folder if folder.exists() else make_tiny_llama(folder)

    def row_file(self) -> Path:
        """Rows with prompt and completion: --rows, some of a small grammar with --quick, else the demo's."""
        if self.rows:
            return self.rows
        if self.quick:
            from studies.trials import write_rows

            return write_rows(self.work / "rows.jsonl", 400)
        return needed(DEMO / "fetch" / "train.jsonl")


Part = Callable[[Setting], Json]


def needed(path: Path) -> Path:
    """``path``, or an exit that says where it comes from."""
    if not path.exists():
        raise SystemExit(f"{path} is missing: run `make demo` first, or give --model and --rows")
    return path


def demo_base() -> Path:
    """The demo's base as a model folder, fetched and converted by its pipeline if it is not in the cache."""
    from graftline.workflow import resolve
    from graftline.workflow.pinned_base import base_folder
    from graftline.workflow.workspace import Workspace

    at = Workspace(Path.cwd(), "wordnet-category")
    pipeline = settings.load().pipeline(at.name)
    resolve.run(pipeline, at)
    return base_folder(pipeline.base, resolve.load(at)["sources"]["base"]["sha256"], at)


# --- measuring ---------------------------------------------------------------------------------------------------


def turns(sides: Mapping[str, Callable[[], float]], num_rounds: int, *, seed: int = 0) -> dict[str, list[float]]:
    """Seconds of every side in every round, after one warm-up each; the order within a round is random.

    Each side returns the seconds that it took itself, so that it can leave its preparation out.
    """
    for side in sides.values():
        side()
    rng = np.random.default_rng(seed)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(num_rounds):
        for name in rng.permutation(list(sides)):
            seconds[str(name)].append(sides[str(name)]())
    return seconds


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process for ``work``: what else the machine does counts less."""
    started = time.process_time()
    work()
    return time.process_time() - started


def wall_seconds(work: Callable[[], object]) -> float:
    """Seconds of the clock for ``work``."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Median of the rounds' ratios, and its 95 % bootstrap interval (percentile)."""
    ratios = np.asarray(numerator) / np.asarray(denominator)
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (_RESAMPLES, len(ratios))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    found = {"median": float(np.median(ratios)), "low": float(low), "high": float(high)}
    return {name: float(f"{value:.4g}") for name, value in found.items()} | {"rounds": len(ratios)}


def rate(count: float, seconds: Sequence[float]) -> float:
    """Things a second, at the median."""
    return round(count / statistics.median(seconds), 1)


def own_process(function: Callable[..., Found], *args: object, environment: Mapping[str, str] | None = None) -> Found:
    """Call a module's function in a fresh process, so that its memory and its environment are its own."""
    before = {name: os.environ.get(name) for name in environment or {}}
    os.environ.update(environment or {})
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *args).result()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def peak_megabytes() -> int:
    """Most memory that this process has held since it began; what its parent held before is left out."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) // 1024


# --- the command line --------------------------------------------------------------------------------------------


def names() -> list[str]:
    """All studies."""
    modules = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    return [name for name in modules if name not in _NOT_STUDIES]


def load(name: str) -> tuple[str, Mapping[str, Part]]:
    """A study's docstring and parts."""
    module = importlib.import_module(f"studies.{name}")
    parts: Mapping[str, Part] = module.PARTS
    return module.__doc__ or "", parts


def main(argv: Sequence[str]) -> int:
    """List the studies, or run one."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m studies NAME [--help]\n")
        for name in names():
            module = importlib.import_module(f"studies.{name}")
            print(f"  {name:<16}{(module.__doc__ or '').splitlines()[0]}")
        return 0
    if argv[0] not in names():
        print(f"there is no study {argv[0]!r}; there are {', '.join(names())}", file=sys.stderr)
        return 2
    if argv[0] == SURVEY:
        from studies.survey import __main__ as survey

        return survey.main(argv[1:])
    return _run_study(argv[0], argv[1:])


def _run_study(name: str, argv: Sequence[str]) -> int:
    about, parts = load(name)
    given = _parser(name, about, list(parts)).parse_args(argv)
    out = given.out or (None if given.quick else RESULTS / f"{name}.json")
    with tempfile.TemporaryDirectory() as temporary:
        setting = Setting(
            work=(given.work or Path(temporary)).absolute(),
            quick=given.quick,
            model=given.model and given.model.absolute(),
            rows=given.rows and given.rows.absolute(),
            rounds=given.rounds,
            seed=given.seed,
            threads=given.threads,
            ends=time.monotonic() + 60 * given.minutes,
        )
        run_parts({part: parts[part] for part in given.parts}, setting, out, command=f"python -m studies {name}")
    return 0


def run_parts(parts: Mapping[str, Part], setting: Setting, out: Path | None, *, command: str) -> Json:
    """Run parts one after another, each in a work folder of its own; write and print each when it is done."""
    import torch

    torch.set_num_threads(setting.threads)
    found: Json = {}
    for name, part in parts.items():
        started = time.monotonic()

        def finish(result: Json, name: str = name, started: float = started) -> None:
            about = _about(setting, f"{command} --parts {name}", time.monotonic() - started)
            found[name] = result | {"measured": about}
            if out:
                _write(out, {name: found[name]})

        def keep(result: Json, finish: Callable[[Json], None] = finish) -> None:
            finish(result | {"partial": True})

        finish(part(replace(setting, work=setting.folder(name), keep=keep)))
        print(json.dumps({name: found[name]}, indent=2), flush=True)
    return found


def _write(out: Path, found: Json) -> None:
    before = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, before | found)


def _parser(name: str, about: str, parts: Iterable[str]) -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"python -m studies {name}", description=about, formatter_class=formatter)
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, metavar="PART", help=", ".join(parts))
    parser.add_argument("--quick", action="store_true", help="tiny inputs, seconds: shows that it runs, not a figure")
    parser.add_argument("--model", type=Path, help="folder of the base (default: the demo's dense base)")
    parser.add_argument("--rows", type=Path, help="JSON lines (default: the demo's rows, made by `make demo`)")
    parser.add_argument("--rounds", type=int, default=0, help="of every comparison (default: each part's own number)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf, help="of long parts: begin nothing more after them")
    parser.add_argument("--work", type=Path, help="keep what is made on the way here (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help=f"(default: results/{name}.json; none with --quick)")
    return parser


def _numbers(setting: Setting) -> str:
    """The options that differ from their defaults, as they are given."""
    given = {"rounds": (setting.rounds, 0), "seed": (setting.seed, 0), "threads": (setting.threads, 1)}
    return "".join(f" --{name} {value}" for name, (value, default) in given.items() if value != default)


def _about(setting: Setting, command: str, seconds: float) -> Json:
    """When, how and on what a part was measured."""
    return {
        "command": command + (" --quick" if setting.quick else "") + _numbers(setting),
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "seconds": round(seconds, 1),
        "seed": setting.seed,
        "threads": setting.threads,
        "model": setting.model.name if setting.model else None,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
            "load": round(os.getloadavg()[0], 1),
            "python": platform.python_version(),
            "torch": version("torch"),
            "transformers": version("transformers"),
            "peft": version("peft"),
        },
    }
