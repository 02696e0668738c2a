"""Rows that outgrow a machine: a pipeline's duplicates, split and encoding as a Ray Data job over parquet files.

    python -m graftline.workflow.many_rows PIPELINE SOURCE OUT

SOURCE and OUT are folders or s3://bucket/prefix that all nodes see. All nodes must also see the project's folder, which
has the base's tokenizer.
"""

import argparse
import contextlib
import importlib
import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from graftline import limits, settings
from graftline.data.parts import Place
from graftline.data.ray_rows import checked, prepare
from graftline.data.ray_steps import Job
from graftline.errors import ClusterError, ConfigError, GraftlineError, LockedError
from graftline.program import guarded
from graftline.ray_cluster import connected
from graftline.weights.model_folder import load_tokenizer
from graftline.workflow.pinned_base import original_base
from graftline.workflow.workspace import Workspace


def prepare_many(
    pipeline: settings.Pipeline, at: Workspace, *, source: str, out: str, address: str | None, processes: int
) -> dict[str, int]:
    """Find duplicates among the rows of ``source``, split and encode them into ``out`` (`graftline.data.ray_rows`).

    Args:
        pipeline: its ``data`` and ``base``.
        at: the pipeline's places; its fetch stage has run.
        source: a folder or s3://bucket/prefix of parquet files.
        out: where to.
        address: the Ray cluster's address; None: see `graftline.ray_cluster.connected`.
        processes: how many run at once in a cluster that is started here.

    Raises:
        ConfigError: the fetch stage has not run, or ``data`` asks for something that works only on one machine.
        DataError: rows cannot be read, split or encoded.
        LockedError: another job of the cluster writes to ``out``.
        ClusterError: the cluster cannot be used.
    """
    try:
        base = original_base(pipeline.base, at).absolute()
    except FileNotFoundError as error:
        raise ConfigError(f"{error.filename} is missing: run `graftline fetch {at.name}` first") from error
    job = Job(
        source=Place.of(source),
        out=Place.of(out),
        data=pipeline.data,
        template=pipeline.base.template,
        load_tokenizer=partial(load_tokenizer, base),
    )
    job = checked(job)
    with connected(address, processes=processes) as ray:
        importlib.import_module("ray.data")  # a part of Ray that nothing else needs
        holder = _hold(ray, job.out)
        try:
            return prepare(ray, job)
        except ray.exceptions.RayError as error:
            if explained := _explained(error):
                raise explained from error
            raise ClusterError(f"Ray ended the job: {' '.join(str(error).split())}") from error
        finally:
            del holder


class _Holder:
    """Reserves the result's name in the cluster: an actor, which ends with the process that made it."""


def _hold(ray: ModuleType, out: Place) -> Any:
    try:
        return ray.remote(num_cpus=0)(_Holder).options(name=f"encode-rows {out.address}").remote()
    except ValueError as error:  # the name is taken
        raise LockedError(
            f"another job in this Ray cluster writes to {out.address}; wait for it, or name another place"
        ) from error


def _explained(error: BaseException | None) -> GraftlineError | None:
    """The error that a worker raised, if it explains itself."""
    while error is not None and not isinstance(error, GraftlineError):
        cause: Any = getattr(error, "cause", None)
        error = cause if isinstance(cause, BaseException) else error.__cause__
    return error


def main() -> None:
    """Command line; prints counts of rows by what became of them."""
    parser = argparse.ArgumentParser(prog="python -m graftline.workflow.many_rows", description=main.__doc__)
    parser.add_argument("pipeline", help="a name from pipelines.yaml")
    parser.add_argument("source", help="folder or s3://bucket/prefix of parquet files")
    parser.add_argument("out", help="folder or s3://bucket/prefix")
    parser.add_argument("--address", help="of a Ray cluster; by default RAY_ADDRESS, or one is started here")
    given = parser.parse_args()
    with guarded():
        pipeline = settings.load(Path(settings.DEFAULT_FILE)).pipeline(given.pipeline)
        with contextlib.redirect_stdout(sys.stderr):  # Ray reports lost workers on standard output
            summary = prepare_many(
                pipeline,
                Workspace(Path.cwd(), given.pipeline),
                source=given.source,
                out=given.out,
                address=given.address,
                processes=limits.usable_cores(),
            )
        json.dump(summary, sys.stdout, indent=2)
        print()


if __name__ == "__main__":
    main()
