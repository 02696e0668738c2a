"""Pipelines whose source has other content than in their last run, and their runs: one for each time that it is new."""

from pathlib import Path
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.sorting import FlowRunSort
from prefect.runtime import deployment

from graftline import settings
from graftline.digest import of_file, of_json
from graftline.errors import GraftlineError
from graftline.plain_text import count
from graftline.workflow import checkout, inputs, outcome, pinned_sources
from graftline.workflow.dispatch import Retrain, run_all, start


def find_new() -> tuple[dict[str, str], dict[str, str]]:
    """Pipelines of the current folder that have new data.

    Returns:
        Digest of the sources by pipeline; what is wrong with those that cannot be looked at.
    """
    root = Path.cwd()
    watched = _watched(root)
    new, broken = look(root, watched)
    get_run_logger().info(
        f"sources that may move: those of {count(len(watched), 'pipeline')}; new data: {', '.join(new) or 'none'}"
    )
    return new, broken


def run_new(new: dict[str, str], broken: dict[str, str], *, retrain: Retrain, wait_seconds: float) -> list[str]:
    """Retrain pipelines with new data: here one after another, or, from a deployment, each on some worker.

    Args:
        new: digest of the sources by pipeline.
        broken: what is wrong with others.
        retrain: the flow `retrain`, for where it is run here.
        wait_seconds: how long each retraining waits for another run that holds its pipeline.

    Raises:
        GraftlineError: something is wrong with one of them; the others have had their turn.
    """
    root = Path.cwd()
    if deployment.id is None:
        lines = run_all(list(new), retrain=retrain, wait_seconds=wait_seconds, at_once=1)
        broken |= {line.pipeline: line.problem for line in lines if line.problem}
    else:
        broken |= _ask_all(root, new, wait_seconds)
    if broken:
        reasons = "\n".join(f"{name}: {problem}" for name, problem in broken.items())
        watched = count(len(_watched(root)), "watched pipeline")
        raise GraftlineError(f"{len(broken)} of {watched} failed\n{reasons}")
    return list(new)


def _watched(root: Path) -> list[str]:
    pipelines = settings.load(root / settings.DEFAULT_FILE).document.pipelines
    return [name for name, pipeline in pipelines.items() if pinned_sources.may_move(pipeline.data)]


def look(root: Path, pipelines: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """`inputs.with_new_data`; if that fails as a whole, for each by itself, so that one's error is its own."""
    try:
        return inputs.with_new_data(root, pipelines)
    except Exception as error:  # noqa: BLE001
        if len(pipelines) == 1:
            return {}, {pipelines[0]: outcome.error_in_one_line(error)}
    new: dict[str, str] = {}
    broken: dict[str, str] = {}
    for name in pipelines:
        found, problems = look(root, [name])
        new, broken = new | found, broken | problems
    return new, broken


def _ask_all(root: Path, new: dict[str, str], wait_seconds: float) -> dict[str, str]:
    """Ask for a run of each pipeline; what is wrong with those that cannot be asked for."""
    broken = {}
    for name, sources in new.items():
        try:
            ask(root, name, sources, wait_seconds=wait_seconds)
        except Exception as error:  # noqa: BLE001  # Of whatever kind: it is this pipeline's.
            broken[name] = outcome.error_in_one_line(error)
    return broken


def ask(root: Path, pipeline: str, sources: str, *, wait_seconds: float) -> UUID:
    """The pipeline's run on this content; started unless the newest that was asked for is that one.

    An occasion is a content that is new since a certain whole run: rows that come back after others have been asked
    for, or after a run on others, are another occasion. Asked again on the same one, it is the same run, ended or not.
    """
    line = f"{checkout.project_key(root)}-{pipeline}"
    occasion = f"graftline-rows-{of_json([sources, _last_run(root, pipeline)]).short}"
    asked = FlowRunFilter(tags=FlowRunFilterTags(all_=[f"graftline-watch-{line}"]))
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(flow_run_filter=asked, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=50)
    newest = max(runs, key=lambda run: str(run.created), default=None)
    if newest and occasion in newest.tags:
        return newest.id
    return start(
        pipeline,
        wait_seconds=wait_seconds,
        key=f"{line}-{occasion}-after-{newest.id if newest else 'none'}",
        tags=[f"graftline-watch-{line}", occasion],
    )


def _last_run(root: Path, pipeline: str) -> str:
    """Which whole run was the last one here; empty if there was none."""
    record = checkout.shelf_folder(root, pipeline) / "last.json"
    return str(of_file(record)) if record.is_file() else ""
