"""The frame around every stage: command line, measurements, and exit codes of errors.

    python -m tasks.<stage> PIPELINE

A stage module has ``run(pipeline, at)``, which does the work, and ``main()``, which DVC calls.
"""

import argparse
import contextlib
import logging
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynvml

from graftline import extras, logs, settings, tracing
from graftline.digest import sync_tree, write_json
from graftline.errors import GraftlineError, PreemptedError, SourceUnavailableError, StoreUnavailableError
from graftline.plan import resources
from graftline.program import EXIT_ERROR, guarded
from graftline.workflow.workspace import Workspace

POWERCAP = Path("/sys/class/powercap")
WATTS_A_CORE = 12.0
"""Green Algorithms' figure for a core of an unknown processor in full use."""
WATTS_A_GB = 0.3725
_JOULES_A_WATT_HOUR = 3600.0
_LOOK_SECONDS = 60.0
"""RAPL's counters wrap around after 262 kJ on many processors, which is 20 minutes at 200 W."""


@dataclass(frozen=True)
class Energy:
    """An amount of energy and its source."""

    watt_hours: float
    source: str
    """For people: what was measured, and what was estimated and how."""


class EnergyMeter:
    """Measures energy from its construction to `read`, or estimates what has no counter.

    Counters are RAPL's of the processors (Linux, ``/sys/class/powercap``, often readable only by root) and NVML's of
    NVIDIA GPUs. They count the whole machine, whoever uses it. Most virtual machines have none; then processor and
    memory are estimated as in Green Algorithms (Lannelongue et al. 2021, doi:10.1002/advs.202100707) without its factor
    for the building: E = t_core · 12 W + t · m · 0.3725 W, with core seconds t_core, seconds t and memory m in GB of
    10^9 bytes.
    """

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self._started, self._core_seconds = time.monotonic(), _core_seconds()
        self._processors = [_Rapl(folder) for folder in sorted(powercap.glob("intel-rapl:*")) if _is_package(folder)]
        self._gpu_start = _gpu_joules()
        self._stopped = threading.Event()
        if self._processors:
            threading.Thread(target=self._keep_looking, daemon=True).start()

    def read(self, peak_rss_bytes: float) -> Energy:
        """The energy used, by this process and its children if it is estimated; to be called once, at the end."""
        self._stopped.set()
        sources, joules = [], 0.0
        if self._processors:
            joules += sum(counter.look() for counter in self._processors)
            sources.append("processors measured (RAPL, all of this machine)")
        else:
            joules += estimate(_core_seconds() - self._core_seconds, time.monotonic() - self._started, peak_rss_bytes)
            watts = f"{WATTS_A_CORE:.0f} W a busy core and {WATTS_A_GB:.2f} W a GB"
            sources.append(f"processors and memory estimated ({watts}, Green Algorithms; no counter can be read here)")
        if self._gpu_start is not None:
            joules += (_gpu_joules() or self._gpu_start) - self._gpu_start
            sources.append("GPUs measured (NVML, all of this machine)")
        return Energy(joules / _JOULES_A_WATT_HOUR, "; ".join(sources))

    def _keep_looking(self) -> None:
        while not self._stopped.wait(_LOOK_SECONDS):
            for counter in self._processors:
                counter.look()


def estimate(core_seconds: float, seconds: float, memory_bytes: float) -> float:
    """Joules of a processor and its memory, as in Green Algorithms (`EnergyMeter`)."""
    return core_seconds * WATTS_A_CORE + seconds * memory_bytes / 1e9 * WATTS_A_GB


class _Rapl:
    """One processor's counter, in microjoules; it wraps around at ``max_energy_range_uj``."""

    def __init__(self, folder: Path) -> None:
        self._read: Callable[[], int] = lambda: int((folder / "energy_uj").read_text(encoding="utf-8"))
        self._range = int((folder / "max_energy_range_uj").read_text(encoding="utf-8"))
        self._last, self._microjoules, self._lock = self._read(), 0, threading.Lock()

    def look(self) -> float:
        """Joules since the construction."""
        with self._lock:
            now = self._read()
            self._microjoules += now - self._last + (self._range if now < self._last else 0)
            self._last = now
            return self._microjoules / 1e6


def _is_package(folder: Path) -> bool:
    """Whether the zone is a whole processor (not a part, nor the platform, which would count twice) and readable."""
    try:
        return (folder / "name").read_text(encoding="utf-8").startswith("package") and bool(
            (folder / "energy_uj").read_text(encoding="utf-8")
        )
    except OSError:
        return False


def _gpu_joules() -> float | None:
    """Sum of all GPUs' counters; None without a driver or a GPU, or if one has no counter."""
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        millijoules = [pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles]
    except pynvml.NVMLError:
        return None
    return sum(millijoules) / 1e3 if millijoules else None


def _core_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


logger = logging.getLogger("graftline")


Run = Callable[[settings.Pipeline, Workspace], None]
"""A stage's work, given the pipeline's settings and the places of its files."""
EXIT_PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h: another try continues the work."""
TEMPORARY = "error (may pass): "
"""Starts the message of an error that may not occur in a later try."""


def main(stage: str, run: Run, *, measure: bool = True, package: str = "tasks") -> None:
    """Run one stage as a command: exit code 2 with a message for errors a user can act on, no traceback.

    Args:
        stage: its name.
        run: its work.
        measure: whether to write seconds, peak memory and energy into the stage's ``stage.json``, for the run's report.
        package: the module's package, for ``--help``.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {package}.{stage}", description=run.__doc__)
    parser.add_argument("pipeline", help="a name from pipelines.yaml")
    run_guarded(stage, parser.parse_args().pipeline, run, measure=measure)


def check_code() -> None:
    """Refuse to run another checkout's code, because a release names the commit of the folder of its stages."""
    own = Path("graftline", "workflow", "stage.py")
    if own.is_file() and not own.samefile(__file__):
        raise GraftlineError(
            f"this runs the code of {Path(__file__).resolve().parents[2]}, not that of {Path.cwd()}, where it was "
            "started; unset PYTHONSAFEPATH and PYTHONPATH"
        )


def run_guarded(stage: str, name: str, run: Run, *, measure: bool, is_own_process: bool = True) -> None:
    """`main` without the command line, for commands with other arguments.

    A process that runs several stages (``is_own_process`` False) has checked its code when it started.
    """
    with guarded():
        try:
            if is_own_process:
                check_code()
            else:
                _reset_peak_rss()
            _run_measured(stage, name, run, measure=measure)
        except (StoreUnavailableError, SourceUnavailableError) as error:
            print(f"{TEMPORARY}{error}", file=sys.stderr)
            sys.exit(EXIT_ERROR)
        except PreemptedError as error:
            print(f"{TEMPORARY}{error}", file=sys.stderr)
            sys.exit(EXIT_PREEMPTED)
        except FileNotFoundError as error:
            earlier = _stage_of(error, name)
            if earlier in (None, stage):
                raise
            raise GraftlineError(f"{error.filename} is missing: run `graftline {earlier} {name}` first") from error


def _run_measured(stage: str, name: str, run: Run, *, measure: bool) -> None:
    started, meter = time.monotonic(), EnergyMeter()
    extras.refuse_other_versions()
    logs.configure(stage, about={"pipeline": name, "stage": stage})
    # Only for our logger: Great Expectations alone logs forty lines per run at this level.
    logger.setLevel(logging.INFO)
    tracing.start("graftline-stages")
    about: dict[str, Any] = {"graftline.pipeline": name, "graftline.stage": stage}
    with tracing.span(f"stage {stage}", carrier=tracing.from_parent(), **about) as measured:
        at = Workspace(Path.cwd(), name)
        pipeline = settings.load(at.root / settings.DEFAULT_FILE).pipeline(name)
        run(pipeline, at)
        if os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0":
            return  # torchrun's first process may still be writing: the stage's folder belongs to it
        if at.folder(stage).is_dir():
            sync_tree(at.folder(stage))  # what DVC records, and the next stage reads, outlives a power loss
        cost = _cost(started, meter) | _gpus(stage, pipeline)
        measured |= {f"graftline.{key}": value for key, value in cost.items()}
    if measure:
        write_json(at.folder(stage) / "stage.json", cost)


def _stage_of(error: FileNotFoundError, name: str) -> str | None:
    """The stage of this pipeline that makes the missing file; None if none does."""
    runs = Path.cwd() / "runs" / name
    path = Path(str(error.filename)).absolute()
    return path.relative_to(runs).parts[0] if path.is_relative_to(runs) and path != runs else None


def _cost(started: float, meter: EnergyMeter) -> dict[str, float | str]:
    peak_mb = peak_rss_mb()
    energy = meter.read(peak_mb * 1e6)
    return {
        "seconds": round(time.monotonic() - started, 2),
        "peak_rss_mb": peak_mb,
        "energy_watt_hours": round(energy.watt_hours, 4),
        "energy_source": energy.source,
    }


def _gpus(stage: str, pipeline: settings.Pipeline) -> dict[str, int]:
    """The GPUs that a stage has for itself, by which its cost is counted; empty on a machine without any."""
    needs = resources.needs(pipeline, resources.this_machine())
    gpus = sum(each.gpus for each in needs if each.stage == stage)  # 0 for what is not a stage, such as `resolve`
    return {"gpus": gpus} if gpus else {}


def _reset_peak_rss() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # see proc(5)


def peak_rss_mb() -> int:
    """Peak resident memory of this process or its largest child, in MB of 10^6 bytes."""
    kibibytes = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return round(kibibytes * 1024 / 1e6)
