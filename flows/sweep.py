"""Run variants of a pipeline with several seeds, and compare them.

Each cell (a variant with a seed) runs in its own checkout, here or on a cluster. What is done is not run again.

    python -m flows.sweep wordnet-category --set adapter.rank=4,8,16 --seeds 0,1,2
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from prefect import flow

from graftline.workflow import sweeping
from graftline.workflow.process import begin, flow_command
from graftline.workflow.searching import Space
from graftline.workflow.sweep_cells import Overrides, grid, make_cells


@flow(name="sweep", flow_run_name="sweep-{pipeline}")
def sweep(  # noqa: PLR0913  # what it is told from outside
    pipeline: str,
    variants: Mapping[str, Overrides] | None = None,
    seeds: Sequence[int] = (0,),
    *,
    space: Space | None = None,
    out: Path | None = None,
    threads: int | None = None,
    minutes: float | None = None,
    side_by_side: int = 1,
) -> Path:
    """Run what is not done of ``variants`` x ``seeds`` of a pipeline; returns the folder of the results.

    Args:
        pipeline: its name.
        variants: keys with their values, by a name for people; `grid` makes them from axes.
        seeds: values of ``train.seed``; a search takes the first.
        space: values or a range (``1e-4..1e-2``) by key, to search instead of running variants.
        out: folder for the results; ``runs/<pipeline>/sweep`` when left out. Sweeps can share one.
        threads: CPU threads of a pipeline that names none.
        minutes: start no cell later than this; those that run are finished.
        side_by_side: trainings that share one process, where they can.
    """
    begin()
    out = Path.cwd() / (out or f"runs/{pipeline}/{'search' if space else 'sweep'}")
    if space:
        return sweeping.search(pipeline, space, out, seed=seeds[0], threads=threads, minutes=minutes)
    cells = make_cells(Path.cwd(), pipeline, variants or grid({}), seeds)
    return sweeping.run_cells(cells, out, threads=threads, minutes=minutes, side_by_side=side_by_side)


def main() -> None:
    """Command line: exit code 0, or 2 with an error that its message explains."""
    given = sweeping.parser().parse_args()
    with flow_command(), sweeping.where(given) as (runner, threads):
        out = sweep.with_options(task_runner=runner)(given.pipeline, threads=threads, **sweeping.asked(given))
    print((out / ("search.txt" if given.search else "summary.txt")).read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    main()
