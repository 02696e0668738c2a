"""Retrain a pipeline's adapter, gate it, package it and release it.

1. Resolve what moves: new rows, and what production holds now.
2. Reproduce fetch → validate → init → train → evaluate → merge → gate → package through DVC; what is done is skipped.
3. Release, if the gates' verdict is `pass`.
4. Where ``release.archive`` names a DVC remote: push the package there, and check what is there.

    python -m flows.retrain wordnet-category
"""

import argparse
import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefect import Task, flow, get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.events import emit_event
from prefect.runtime import flow_run

from graftline import settings
from graftline.digest import write_json
from graftline.errors import GraftlineError
from graftline.workflow import archive, checkout, inputs, leases, lock, moving, pages, published, shelf, stages
from graftline.workflow.command import explained_errors
from graftline.workflow.outcome import GATE_STOPPED, Outcome, outcome_key
from graftline.workflow.resolve import RESOLVED
from graftline.workflow.workspace import Workspace


class _WithoutTraceback(logging.Filter):
    """An error that its message explains needs no traceback in the run's log."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], GraftlineError):
            record.exc_info = None
        return True


for _logger in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_logger).addFilter(_WithoutTraceback())


def may_pass(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether another try may help: only where something did not answer. Any other error would come again."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, stages.StageFailedError) and error.temporary


RETRIES, RETRY_DELAYS_SECONDS = 2, [30.0, 300.0]
MAX_ATTEMPTS = 3
"""A run whose worker died is started again by an automation (graftline.workflow.automations), but not for ever."""


@task(
    task_run_name="{stage}",
    retries=RETRIES,
    retry_delay_seconds=RETRY_DELAYS_SECONDS,
    retry_condition_fn=may_pass,
    cache_policy=NO_CACHE,  # DVC decides what is up to date.
)
def reproduce(stage: str, pipeline: str, root: Path, on_line: stages.OnLine | None = None, force: bool = False) -> bool:
    """Bring one stage up to date, or run it in any case (``force``). Its output becomes this task run's log.

    Returns whether it ran.
    """
    log = get_run_logger()

    def pass_on(line: str) -> None:
        log.info(line, extra={"pipeline": pipeline, "stage": stage})
        if on_line:
            on_line(line)

    if not force and archive.fetch(stage, pipeline, root=root):
        log.info("an earlier run of this stage was found", extra={"pipeline": pipeline, "stage": stage})
    # A stage whose run is in the cache waits for a device too: DVC decides while it holds one.
    with leases.device() if stage in stages.ON_DEVICE else contextlib.nullcontext() as device:
        ran = stages.reproduce(stage, pipeline, root=root, on_line=pass_on, device=device, force=force)
    archive.push(stage, pipeline, root=root)
    return ran


@task(retries=RETRIES, retry_delay_seconds=RETRY_DELAYS_SECONDS, retry_condition_fn=may_pass, cache_policy=NO_CACHE)
def resolve(pipeline: str, root: Path) -> None:
    """Pin what moves for this run."""
    stages.resolve(pipeline, root=root, on_line=get_run_logger().info)


@task(retries=RETRIES, retry_delay_seconds=RETRY_DELAYS_SECONDS, retry_condition_fn=may_pass, cache_policy=NO_CACHE)
def push_package(pipeline: str, remote: str, root: Path) -> None:
    """Push the package to the archive; in a process of its own, as everything that asks DVC."""
    command = [sys.executable, "-m", "graftline.workflow.packages", pipeline, "--remote", remote]
    stages.run_command(command, stage="archive", pipeline=pipeline, root=root, on_line=get_run_logger().info)


@flow(name="retrain", flow_run_name="retrain-{pipeline}")
def retrain(pipeline: str, wait_seconds: float = 0.0) -> Outcome:
    """Bring the pipeline's whole line up to date.

    Args:
        pipeline: a name from pipelines.yaml.
        wait_seconds: how long to wait for another run that holds the pipeline on this machine.
    """
    _check_attempts()
    root = Path.cwd()
    checkout.narrow(root, pipeline)
    with leases.pipeline(pipeline), lock.hold(shelf.folder(root, pipeline), wait_seconds=wait_seconds):
        resolve(pipeline, root)
        code = inputs.of_code(root, [pipeline])[pipeline]
        has_champion_of_last_run = _keep_champion(root, pipeline, code)
        stages_run = tuple(_run_stages(pipeline, root, has_champion_of_last_run))
        outcome = _outcome(root, pipeline, stages_run)
        made_of = inputs.combine(code, _resolved(root, pipeline))
        shelf.save(root, pipeline, inputs=made_of, outcome=outcome.verdict, version=outcome.version)
    pages.show_outcome(root, pipeline, outcome.location)
    create_table_artifact([asdict(outcome)], key=outcome_key(pipeline), description="How the run ended")
    if outcome.verdict != "pass":
        _tell_that_a_gate_stopped(outcome)
    remote = settings.load(root / "pipelines.yaml").pipeline(pipeline).release.archive
    if outcome.version and remote:
        push_package(pipeline, remote, root)
    return outcome


def _check_attempts() -> None:
    attempts = flow_run.run_count
    if attempts > MAX_ATTEMPTS:
        raise GraftlineError(
            f"attempt {attempts} of this run: its worker died each time; look at the worker's machine (memory, disk), "
            "then start a new run"
        )


def _keep_champion(root: Path, pipeline: str, code: str) -> bool:
    """Take the last run's champion again if nothing at all has changed but that its release entered production.

    The champion is what production holds now, whatever it held when an earlier candidate was judged. Only a candidate
    that is that very release needs no new verdict: it would be compared with itself.
    """
    now = _resolved(root, pipeline)
    before, last = moving.as_last_run(root, pipeline, now), shelf.last(root, pipeline)
    if before is None or before == now:
        return False
    path = root / "runs" / pipeline / RESOLVED
    write_json(path, before)
    made_of = inputs.combine(code, before)
    if (last and made_of and made_of == last.inputs) or not stages.outdated(pipeline, root=root):
        return True
    write_json(path, now)
    return False


def _resolved(root: Path, pipeline: str) -> dict[str, Any]:
    resolved: dict[str, Any] = json.loads((root / "runs" / pipeline / RESOLVED).read_text(encoding="utf-8"))
    return resolved


def _run_stages(pipeline: str, root: Path, has_champion_of_last_run: bool) -> Iterator[str]:
    """Bring the line up to date, up to where it must stop; the stages that ran."""
    log = get_run_logger()
    todo = stages.outdated(pipeline, root=root)
    log.info(f"stages to look at: {', '.join(todo) or 'none, everything is up to date'}")
    progress = pages.Progress(pipeline, len(todo))
    for stage in todo:
        if stage == "release" and _verdict(root, pipeline)["outcome"] != "pass":
            log.warning("not released: the gates did not pass")
        elif reproduce(stage, pipeline, root, progress.read):
            yield stage
            if has_champion_of_last_run and stage != "release":
                log.info(f"{stage} was made anew: what follows is compared with what production holds now")
                resolve(pipeline, root)
                yield from _run_stages(pipeline, root, has_champion_of_last_run=False)
                return
        progress.end_stage()
    if _verdict(root, pipeline)["outcome"] == "pass":
        section = settings.load(root / settings.DEFAULT_FILE).pipeline(pipeline).release
        at, record = Workspace(root, pipeline), _released(root, pipeline)
        if published.is_in_store(section, record, at):
            published.keep(section, record, at)
        else:
            # To DVC the stage is up to date all the same.
            log.warning("the store no longer holds this release: it is published again")
            reproduce("release", pipeline, root, progress.read, force=True)
            yield "release"


def _tell_that_a_gate_stopped(outcome: Outcome) -> None:
    """An event that an automation can answer; the flow run itself ended well, so no failure says it."""
    emit_event(
        event=GATE_STOPPED,
        resource={"prefect.resource.id": f"graftline.pipeline.{outcome.pipeline}"},
        related=[{"prefect.resource.id": f"prefect.flow-run.{flow_run.id}", "prefect.resource.role": "flow-run"}],
        payload={"verdict": outcome.verdict, "summary": outcome.summary},
    )


def _verdict(root: Path, pipeline: str) -> dict[str, Any]:
    verdict: dict[str, Any] = json.loads(
        (root / "runs" / pipeline / "gate" / "verdict.json").read_text(encoding="utf-8")
    )
    return verdict


def _released(root: Path, pipeline: str) -> dict[str, Any]:
    released: dict[str, Any] = json.loads(
        (root / "runs" / pipeline / "release" / "release.json").read_text(encoding="utf-8")
    )
    return released


def _outcome(root: Path, pipeline: str, stages_run: tuple[str, ...]) -> Outcome:
    verdict = _verdict(root, pipeline)
    released = _released(root, pipeline) if verdict["outcome"] == "pass" else {}
    return Outcome(
        pipeline=pipeline,
        verdict=verdict["outcome"],
        summary=verdict["summary"],
        version=released.get("version"),
        location=released.get("location"),
        report=f"runs/{pipeline}/package/report.html",
        stages_run=stages_run,
    )


def _print(outcome: Outcome) -> None:
    ran = (
        f"{len(outcome.stages_run)} ({', '.join(outcome.stages_run)})" if outcome.stages_run else "none, all up to date"
    )
    rows = {
        "pipeline": outcome.pipeline,
        "stages run": ran,
        "verdict": f"{outcome.verdict}: {outcome.summary}",
        "release": f"{outcome.version}  in  {outcome.location}" if outcome.version else "none: the gates did not pass",
        "report": outcome.report,
    }
    print("\n" + "\n".join(f"{name + ':':<12} {value}" for name, value in rows.items()))


def main() -> None:
    """Command line: exit code 0 released, 1 stopped by a gate, 2 an error that its message explains."""
    parser = argparse.ArgumentParser(
        description=retrain.description, epilog="example: python -m flows.retrain wordnet-category"
    )
    parser.add_argument("pipeline", help="a name from pipelines.yaml")
    parser.add_argument(
        "--wait-seconds", type=float, default=0.0, help="wait for another run in this checkout (default 0)"
    )
    arguments = parser.parse_args()
    with explained_errors():
        outcome = retrain(arguments.pipeline, arguments.wait_seconds)
    _print(outcome)
    sys.exit(0 if outcome.version else 1)


if __name__ == "__main__":
    main()
