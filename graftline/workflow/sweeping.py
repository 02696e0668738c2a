"""Run a sweep's cells in threads of this process, or as tasks of a Dask or Ray cluster; and the sweep's options."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from graftline.errors import ConfigError, GraftlineError
from graftline.extras import install_command
from graftline.limits import usable_cores
from graftline.plain_text import count
from graftline.settings.tree import read_tree
from graftline.workflow import leases, process, stage_worker, stages, sweep_cells
from graftline.workflow.git import snapshot
from graftline.workflow.process import RETRIES, RETRY_DELAYS_SECONDS, may_pass
from graftline.workflow.searching import Search, Space, StoppedError, check_space, is_range
from graftline.workflow.stage_worker import StageWorkers
from graftline.workflow.sweep_cells import Overrides, SweepCell, SweepPlace, grid, write_summary

Runner = Literal["local", "dask", "ray"]


def task_runner(runner: Runner, *, workers: int, address: str | None = None) -> TaskRunner[Any]:
    """The runner of a sweep's cells; a Dask or Ray cluster is started on this machine if no address is given.

    Raises:
        GraftlineError: the cluster's package is not installed, or an address is given for threads.
    """
    if runner == "local":
        if address:
            raise GraftlineError(f"given address {address} with runner local; expected --runner dask or ray with it")
        return ThreadPoolTaskRunner(max_workers=workers)
    try:
        if runner == "dask":
            from prefect_dask.task_runners import DaskTaskRunner  # an extra

            own = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None}
            return DaskTaskRunner(address=address) if address else DaskTaskRunner(cluster_kwargs=own)
        from prefect_ray.task_runners import RayTaskRunner  # an extra

        return RayTaskRunner(address=address) if address else RayTaskRunner(init_kwargs={"num_cpus": workers})
    except ImportError as error:
        raise GraftlineError(f"runner {runner} needs {error.name}; run: {install_command('scale')}") from error


@contextmanager
def one_server(runner: Runner, address: str | None) -> Iterator[None]:
    """Start one Prefect server for the processes of a cluster on this machine.

    Otherwise each of them would start a server, all on the same SQLite file.
    """
    if runner == "local" or address or PREFECT_API_URL.value():
        yield
        return
    from prefect.server.api.server import SubprocessASGIServer  # seconds

    server = SubprocessASGIServer()
    server.start()  # ends with this process, after the last log was sent
    with temporary_settings({PREFECT_API_URL: server.api_url}):
        yield


@task(
    task_run_name="{cell.variant} seed {cell.seed}",
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAYS_SECONDS,
    retry_condition_fn=may_pass,
)
def run_cell(cell: SweepCell, where: SweepPlace, deadline: float) -> None:
    """Run one cell, with its output in this task run's log, unless ``deadline`` (seconds since 1970) has passed."""
    process.begin()  # on a cluster, this process is not the flow's
    if time.time() < deadline:
        with _environment(cell) as environment:
            sweep_cells.run_cell(cell, where, on_line=get_run_logger().info, environment=environment)


_workers: StageWorkers | None = None
"""Of the sweep in this process's threads; cells on a cluster load the base themselves."""


def _environment(cell: SweepCell) -> AbstractContextManager[dict[str, str]]:
    """Variables of the cell's stages; they lead to the process that keeps the base, if one is to run them."""
    return _workers.borrow() if _workers and cell.shares_base else nullcontext({})


@contextmanager
def _one_base(where: SweepPlace, num_cells: int) -> Iterator[None]:
    """Let the cells that run in this process's threads share one base for each that runs at a time."""
    global _workers
    flow = FlowRunContext.get()
    if num_cells < 2 or flow is None or not isinstance(flow.task_runner, ThreadPoolTaskRunner):
        yield
        return
    with stage_worker.workers(where.root, where.revision) as _workers:
        try:
            yield
        finally:
            _workers = None


@task(task_run_name="trainings side by side", cache_policy=NO_CACHE)
def train_side_by_side(cells: Sequence[SweepCell], where: SweepPlace, most: int, deadline: float) -> None:
    """Run the cells' trainings, up to ``most`` at a time; what fails here is left to the cell, which says why."""
    process.begin()
    log, places = get_run_logger(), list[Path]()
    for cell in cells:
        try:
            if time.time() < deadline:
                places.append(sweep_cells.prepare_cell(cell, where, on_line=log.info))
                log.info(f"{cell.variant}, seed {cell.seed}: its training is in {places[-1].name}")
        except GraftlineError as error:
            log.warning(f"{cell.variant}, seed {cell.seed}: {error}")
    if len(places) < 2:
        return
    module, pipeline = "graftline.workflow.side_by_side", cells[0].pipeline
    options = ("--most", str(most), "--until", str(deadline))
    command = [sys.executable, "-m", module, pipeline, *options, *map(str, places)]
    try:
        stages.run_command(command, stage="train", pipeline=pipeline, root=places[0], on_line=log.info)
    except GraftlineError as error:
        log.warning(f"{error}; each cell goes on alone")


def run_cells(
    cells: Sequence[SweepCell],
    out: Path,
    *,
    threads: int | None = None,
    minutes: float | None = None,
    side_by_side: int = 1,
) -> Path:
    """Run the unfinished cells, and write the summary of all.

    Args:
        cells: cells of the current folder's pipeline, as from `make_cells`.
        out: folder for one JSON file per cell, ``summary.json``, ``summary.txt`` and ``sweep.html``, which sweeps can
            share; it is also returned.
        threads: CPU threads for a pipeline that does not set them.
        minutes: start no cell later than this; running ones are finished.
        side_by_side: trainings that run in one process at a time, where they can.

    Raises:
        GraftlineError: a cell failed; the others are done.
    """
    root, log = Path.cwd(), get_run_logger()
    with leases.hold_folder(out):
        done = sweep_cells.read_results(out, cells)
        todo = [cell for cell in cells if cell.name not in done]
        log.info(f"{count(len(cells), 'cell')}, {len(done)} of them done before")
        where = SweepPlace(root, snapshot(root), out, threads)
        deadline = _deadline(minutes)
        if side_by_side > 1 and len(todo) > 1:
            train_side_by_side(todo, where, side_by_side, deadline)
        with _one_base(where, len(todo)):
            failures = _run(todo, where, deadline)
        write_summary(out, cells, failures)
    if failures:
        raise GraftlineError(
            f"{len(failures)} of {count(len(todo), 'cell')} failed; the others are in {out}\n"
            + "\n".join(f"{cell.variant}, seed {cell.seed}: {reason}" for cell, reason in failures)
        )
    return out


def _run(cells: Sequence[SweepCell], where: SweepPlace, deadline: float) -> list[tuple[SweepCell, str]]:
    """Run cells; returns those that failed, with the reason."""
    futures: list[PrefectFuture[None]] = [run_cell.submit(cell, where, deadline) for cell in cells]
    try:
        for future in futures:
            future.wait()
    except BaseException:
        stages.stop_running()
        raise
    failures = []
    for cell, future in zip(cells, futures, strict=True):
        if not future.state.is_completed():
            error = future.state.result(raise_on_failure=False)
            failures.append((cell, str(error) or type(error).__name__))
    return failures


@task(task_run_name="{cell.variant}", cache_policy=NO_CACHE, retries=RETRIES, retry_condition_fn=may_pass)
def run_trial(cell: SweepCell, where: SweepPlace, watch: Callable[[str], None]) -> StoppedError | None:
    """Run a search's cell, each of its lines also going to ``watch``; returns why it was stopped, if it was."""
    process.begin()
    log = get_run_logger()

    def on_line(line: str) -> None:
        log.info(line)
        watch(line)

    try:
        with _environment(cell) as environment:
            sweep_cells.run_cell(cell, where, on_line=on_line, environment=environment)
    except StoppedError as error:
        log.info(f"stopped: {error}")
        return error
    return None


def search(
    pipeline: str, space: Space, out: Path, *, seed: int, minutes: float | None, threads: int | None = None
) -> Path:
    """Search a pipeline's settings, or go on with the search in ``out``, which is also returned.

    Args:
        pipeline: a name from the current folder's pipelines.yaml.
        space: values by key; ``["1e-4..1e-2"]`` is a range.
        out: folder of the results, as of `run_cells`, with ``search.json`` (every cell tried) and ``search.txt``.
        seed: of the trainings and of what is proposed.
        minutes: start no cell later than this; the running one is finished.
        threads: CPU threads for a pipeline that does not set them.

    Raises:
        ConfigError: the pipeline holds no rows out, or the folder is another search's.
    """
    root = Path.cwd()
    with leases.hold_folder(out):
        where = SweepPlace(root, snapshot(root), out, threads)
        found = Search(where, pipeline, space, seed=seed)

        def run(cell: SweepCell, watch: Callable[[str], None]) -> None:
            future = run_trial.submit(cell, where, watch)
            try:
                future.wait()
            except BaseException:
                stages.stop_running()
                raise
            if stopped := future.result():
                raise stopped

        with _one_base(where, 2):
            found.run(run, deadline=_deadline(minutes))
        found.finish()
    return out


def _deadline(minutes: float | None) -> float:
    return time.time() + 60 * minutes if minutes is not None else float("inf")


def axis(text: str) -> tuple[str, list[Any]]:
    """The key and the values of a ``--set``."""
    key, equals, values = text.partition("=")
    if not equals or not key or not values:
        raise ConfigError(f"given --set {text}; expected KEY=VALUE[,VALUE…], such as adapter.rank=4,8")
    return key, read_tree(f"values: [{values}]".encode(), f"--set {key}").value["values"]


def variants_of(axes: Sequence[str], file: Path | None) -> Mapping[str, Overrides]:
    """Variants by name, from the grid of ``--set`` or from a file.

    Raises:
        ConfigError: both are given, or the file cannot be read as variants.
    """
    if file is None:
        found = dict(axis(text) for text in axes)
        if ranges := [key for key, values in found.items() if any(map(is_range, values))]:
            raise ConfigError(f"given a range for {ranges[0]}; expected values, or --search, which draws from ranges")
        return grid(found)
    if axes:
        raise ConfigError("given --set and --variants; expected one of them")
    try:
        variants = read_tree(file.read_bytes(), file.name).value
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}; expected a YAML file") from error
    if not isinstance(variants, dict) or not all(isinstance(one, dict) for one in variants.values()):
        raise ConfigError(f"{file}: expected variants by name, each a mapping of keys such as adapter.rank to values")
    return variants


def asked(given: argparse.Namespace) -> dict[str, Any]:
    """What a command line asks the flow for.

    Raises:
        ConfigError: the options contradict each other.
    """
    common = {"seeds": given.seeds, "out": given.out, "minutes": given.minutes}
    one_at_a_time = given.runner == "local" and given.workers == 1
    if given.side_by_side < 1 or (given.side_by_side > 1 and (given.search or not one_at_a_time)):
        raise ConfigError(
            f"given --side-by-side {given.side_by_side}; expected at least 1, and above it no --search, --runner or "
            "--workers: the trainings share one process here"
        )
    if not given.search:
        return common | {"variants": variants_of(given.set, given.variants), "side_by_side": given.side_by_side}
    if given.variants or not one_at_a_time or len(given.seeds) != 1:
        raise ConfigError(
            "given --search with --variants, --runner, --workers or several --seeds; expected ranges by --set and one "
            "seed: cells run one after another, here"
        )
    if given.minutes is None:
        raise ConfigError("given --search without --budget; expected --budget MINUTES")
    space = dict(axis(text) for text in given.set)
    check_space(space)
    return common | {"space": space}


def _seeds(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers, such as 0,1,2")
    return [int(part) for part in parts]


@contextmanager
def where(given: argparse.Namespace) -> Iterator[tuple[TaskRunner[Any], int | None]]:
    """The task runner for a command line, and the threads of a cell whose pipeline does not set them.

    Raises:
        GraftlineError: the options contradict each other, or the cluster's package is not installed.
    """
    if given.workers < 1:
        raise GraftlineError(f"given --workers {given.workers}; expected at least 1")
    runner = task_runner(given.runner, workers=given.workers, address=given.address)
    is_shared = given.workers > 1 and given.runner == "local"
    with one_server(given.runner, given.address):
        yield runner, max(1, usable_cores() // given.workers) if is_shared else None


_EXAMPLES = """\
examples:
  python -m flows.sweep wordnet-category --seeds 0,1,2,3,4
  python -m flows.sweep wordnet-category --set adapter.rank=4,8,16 --set train.learning_rate=2e-4,5e-4 --seeds 0,1,2
  python -m flows.sweep wordnet-category --variants study.yaml --seeds 0,1,2 --minutes 20 --out study
  python -m flows.sweep wordnet-category --set adapter.method=lora,dora --seeds 0,1 --runner dask --workers 2
  python -m flows.sweep wordnet-category --seeds 0,1 --runner ray --address ray://head:10001
  python -m flows.sweep wordnet-category --search --set train.learning_rate=1e-5..1e-2 --budget 90

study.yaml holds variants by name:
  lora: {adapter.method: lora, train.learning_rate: 0.0005}
  full: {adapter.method: full, train.learning_rate: 0.00005}
"""


def parser() -> argparse.ArgumentParser:
    """The command line of `flows.sweep`."""
    made = argparse.ArgumentParser(
        description="Run variants of a pipeline with several seeds, and compare them. What is done is not run again.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("pipeline", help="a name from pipelines.yaml")
    made.add_argument(
        "--set", action="append", default=[], metavar="KEY=V1,V2", help="values of a key; several make a grid"
    )
    made.add_argument(
        "--search",
        action="store_true",
        help="choose cells by the held-out losses so far, from values and ranges (--set KEY=LOW..HIGH), for --budget",
    )
    made.add_argument("--variants", type=Path, metavar="FILE", help="YAML file of named variants, instead of --set")
    made.add_argument("--seeds", type=_seeds, default=[0], metavar="S1,S2", help="values of train.seed (default 0)")
    made.add_argument("--out", type=Path, help="folder of the results (default runs/PIPELINE/sweep)")
    made.add_argument(
        "--minutes", "--budget", type=float, help="start no cell after so many minutes; run again to go on"
    )
    made.add_argument("--runner", choices=["local", "dask", "ray"], default="local", help="where cells run")
    made.add_argument("--workers", type=int, default=1, help="cells at a time on this machine (default 1)")
    made.add_argument(
        "--side-by-side",
        type=int,
        default=1,
        metavar="N",
        help="trainings that share a process, on a CPU with a quantized base: same results, sooner (default 1)",
    )
    made.add_argument("--address", help="of a running Dask or Ray cluster; its machines see this folder too")
    return made
