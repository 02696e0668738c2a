"""One run of a pipeline's line: it holds the pipeline, reproduces stages through DVC, and shows how it ended."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefect import get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.events import emit_event
from prefect.runtime import flow_run

from graftline import settings
from graftline.digest import write_json
from graftline.errors import GraftlineError
from graftline.workflow import checkout, inputs, leases, pages, process, published, shelf, stages
from graftline.workflow.outcome import GATE_STOPPED, Outcome, outcome_key
from graftline.workflow.resolve import RESOLVED
from graftline.workflow.workspace import Workspace

MAX_ATTEMPTS = 3
"""An automation (graftline.workflow.automations) restarts a run whose worker died, up to this number of attempts."""
RELEASE = "release"


@contextlib.contextmanager
def held(pipeline: str, *, wait_seconds: float = 0.0) -> Iterator["Run"]:
    """Hold a pipeline of the current folder for one run, with its moving inputs pinned.

    At the end the outcome is kept for the next run, and shown on the run's page. Waits ``wait_seconds`` for another
    run that holds the pipeline on this machine; LockedError if it still does.
    """
    _check_attempts()
    at = Workspace(Path.cwd(), pipeline)
    checkout.narrow(at.root, pipeline)
    with (
        leases.pipeline(pipeline),
        leases.hold_folder(shelf.shelf_folder(at.root, pipeline), wait_seconds=wait_seconds),
    ):
        process.resolve(pipeline, at.root)
        run = Run(at, inputs.of_code(at.root, [pipeline])[pipeline])
        yield run
        run.keep()
    run.show()


class Run:
    """A run while it holds its pipeline; made by `held`."""

    def __init__(self, at: Workspace, code: str) -> None:
        self._at, self._code = at, code
        self._release = settings.load(at.root / settings.DEFAULT_FILE).pipeline(at.name).release
        self._has_champion_of_last_run = _keep_champion(at, code)
        self._is_released = False
        self._ran: list[str] = []
        self._todo: list[str] = []
        self._progress: pages.Progress | None = None

    @property
    def verdict(self) -> str:
        """The gates' verdict: pass, fail or inconclusive."""
        return str(self._read("gate/verdict.json")["outcome"])

    @property
    def outcome(self) -> Outcome:
        """How the run ended."""
        verdict = self._read("gate/verdict.json")
        released = self._read("release/release.json") if self._is_released else {}
        return Outcome(
            pipeline=self._at.name,
            verdict=verdict["outcome"],
            summary=verdict["summary"],
            version=released.get("version"),
            location=released.get("location"),
            report=f"runs/{self._at.name}/package/report.html",
            stages_run=tuple(self._ran),
        )

    def reproduce(self, *names: str) -> None:
        """Bring stages up to date in this order; DVC skips those that are."""
        log = get_run_logger()
        self._todo = stages.outdated(self._at.name, root=self._at.root, among=(*names, RELEASE))
        log.info(f"stages to run or check: {', '.join(self._todo) or 'none, everything is up to date'}")
        self._progress = pages.Progress(self._at.name, len(self._todo))
        for stage in self._todo:
            if stage == RELEASE:  # only if the gates say so
                break
            if self._bring(stage) and self._has_champion_of_last_run:
                log.info(f"{stage} ran again: later stages compare with what production holds now")
                self._has_champion_of_last_run = False
                process.resolve(self._at.name, self._at.root)
                self.reproduce(*names)
                return

    def release(self) -> None:
        """Publish the package, again if the store has lost the release."""
        if RELEASE in self._todo:
            self._bring(RELEASE)
        self._is_released = True
        record = self._read("release/release.json")
        if published.is_in_store(self._release, record, self._at):
            published.keep(self._release, record, self._at)
            return
        # For DVC the stage is up to date nevertheless.
        get_run_logger().warning("the store no longer holds this release: it is published again")
        self._bring(RELEASE, force=True)

    def archive(self) -> None:
        """Push a released package to the DVC remote that ``release.archive`` names, and check it there."""
        if self.outcome.version and self._release.archive:
            process.push_package(self._at.name, self._release.archive, self._at.root)

    def keep(self) -> None:
        """Keep what the pipeline's next run needs to know about this one."""
        outcome = self.outcome
        made_of = inputs.combine(self._code, self._read(RESOLVED))
        shelf.keep_run(self._at.root, self._at.name, inputs=made_of, outcome=outcome.verdict, version=outcome.version)

    def show(self) -> None:
        """Show the outcome on the run's page. A gate that stopped it emits an event, because the run did not fail."""
        outcome = self.outcome
        pages.show_outcome(self._at.root, outcome.pipeline, outcome.location)
        create_table_artifact([asdict(outcome)], key=outcome_key(outcome.pipeline), description="How the run ended")
        if outcome.verdict == "pass":
            return
        get_run_logger().warning("not released: the gates did not pass")
        emit_event(
            event=GATE_STOPPED,
            resource={"prefect.resource.id": f"graftline.pipeline.{outcome.pipeline}"},
            related=[{"prefect.resource.id": f"prefect.flow-run.{flow_run.id}", "prefect.resource.role": "flow-run"}],
            payload={"verdict": outcome.verdict, "summary": outcome.summary},
        )

    def _bring(self, stage: str, *, force: bool = False) -> bool:
        progress = self._progress
        ran = process.reproduce(stage, self._at.name, self._at.root, progress.read if progress else None, force=force)
        if ran:
            self._ran.append(stage)
        if progress:
            progress.end_stage()
        return ran

    def _read(self, path: str) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self._at.runs / path).read_text(encoding="utf-8"))
        return record


def _check_attempts() -> None:
    attempts = flow_run.run_count
    if attempts > MAX_ATTEMPTS:
        raise GraftlineError(
            f"attempt {attempts} of this run: its worker died each time; check the worker's machine (memory, disk), "
            "then start a new run"
        )


def _keep_champion(at: Workspace, code: str) -> bool:
    """Keep the last run's champion if nothing has changed except that its own release entered production.

    The champion is normally what production holds now. Only a candidate that is this release needs no new verdict: it
    would be compared with itself.
    """
    path = at.runs / RESOLVED
    now: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    before, last = inputs.as_last_run(at.root, at.name, now), shelf.last_run(at.root, at.name)
    if before is None or before == now:
        return False
    write_json(path, before)
    made_of = inputs.combine(code, before)
    if (last and made_of and made_of == last.inputs) or not stages.outdated(at.name, root=at.root):
        return True
    write_json(path, now)
    return False
