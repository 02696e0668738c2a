"""Run variants of a pipeline with several seeds, and compare them.

Each cell (a variant with a seed) runs in its own checkout up to the evaluation: in threads of this process, or as
a task of a Dask or Ray cluster whose machines see the checkout at the same path. What is done is not run again.

    python -m flows.sweep wordnet-category --set adapter.rank=4,8,16 --seeds 0,1,2
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from prefect import flow

from graftline.workflow import sweeping
from graftline.workflow.process import begin, flow_command
from graftline.workflow.sweep_cells import Overrides, make_cells


@flow(name="sweep", flow_run_name="sweep-{pipeline}")
def sweep(
    pipeline: str,
    variants: Mapping[str, Overrides],
    seeds: Sequence[int],
    *,
    out: Path | None = None,
    threads: int | None = None,
    minutes: float | None = None,
) -> Path:
    """Run what is not done of ``variants`` x ``seeds``; returns the folder of the results.

    Args:
        pipeline: a name from pipelines.yaml.
        variants: keys of the pipeline with their values, by a name for people; `grid` makes them from axes.
        seeds: values of ``train.seed``.
        out: folder for the results; ``runs/<pipeline>/sweep`` when left out. Sweeps can share one.
        threads: CPU threads of a pipeline that names none.
        minutes: start no cell later than this; those that run are finished.
    """
    begin()
    cells = make_cells(Path.cwd(), pipeline, variants, seeds)
    out = Path.cwd() / (out or Path("runs") / pipeline / "sweep")
    return sweeping.run_cells(cells, out, threads=threads, minutes=minutes)


def main() -> None:
    """Command line: exit code 0, or 2 with an error that its message explains."""
    given = sweeping.parser().parse_args()
    with flow_command(), sweeping.where(given) as (runner, threads):
        variants = sweeping.variants_of(given.set, given.variants)
        run = sweep.with_options(task_runner=runner)
        out = run(given.pipeline, variants, given.seeds, out=given.out, threads=threads, minutes=given.minutes)
    print((out / "summary.txt").read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    main()
