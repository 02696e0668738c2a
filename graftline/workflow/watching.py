"""Find pipelines whose sources changed, or whose users ask other things, and retrain each once per change."""

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
from graftline.workflow import checkout, drifting, inputs, outcome, pinned_sources, shelf
from graftline.workflow.dispatch import Retrain, run_all, start


def find_new() -> tuple[dict[str, str], dict[str, str]]:
    """Pipelines of the current folder with new data.

    Returns:
        Digest of the sources by pipeline, and problems by pipeline that cannot be resolved.
    """
    root = Path.cwd()
    watched = _watched(root)
    new, broken = sort_out(root, watched)
    for name, problem in look_for_drift(root, new).items():
        broken.setdefault(name, problem)
    get_run_logger().info(
        f"sources that may move: those of {count(len(watched), 'pipeline')}; new data: {', '.join(new) or 'none'}"
    )
    return new, broken


def run_new(new: dict[str, str], broken: dict[str, str], *, retrain: Retrain, wait_seconds: float) -> list[str]:
    """Retrain pipelines with new data: one after another here, or, from a deployment, each on some worker.

    Args:
        new: digest of the sources by pipeline.
        broken: problems of other pipelines.
        retrain: the flow `retrain`, which is called here if there is no deployment.
        wait_seconds: how long each retraining waits for another run that holds its pipeline.

    Raises:
        GraftlineError: there are problems or failures; the other pipelines were retrained.
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


def look_for_drift(root: Path, new: dict[str, str]) -> dict[str, str]:
    """Look for drift where pipelines.yaml says so; adds what is to be retrained to ``new``, and returns problems."""
    config, broken = settings.load(root / settings.DEFAULT_FILE), dict[str, str]()
    for name in config.names:
        try:
            found = drifting.look(config, name)
        except Exception as error:  # noqa: BLE001  # any error is only this pipeline's problem
            broken[name] = f"drift: {outcome.error_in_one_line(error)}"
            continue
        if found is not None:
            log = get_run_logger()
            (log.warning if found.has_drifted else log.info)(f"{name}: {found.told}")
            if found.retrain:
                new.setdefault(name, str(of_json(["drift", found.version])))
    return broken


def _watched(root: Path) -> list[str]:
    pipelines = settings.load(root / settings.DEFAULT_FILE).document.pipelines
    return [name for name, pipeline in pipelines.items() if pinned_sources.may_move(pipeline.data)]


def sort_out(root: Path, pipelines: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """`inputs.with_new_data`; if that fails, for each pipeline separately, so that one error does not hide others."""
    try:
        return inputs.with_new_data(root, pipelines)
    except Exception as error:  # noqa: BLE001
        if len(pipelines) == 1:
            return {}, {pipelines[0]: outcome.error_in_one_line(error)}
    new: dict[str, str] = {}
    broken: dict[str, str] = {}
    for name in pipelines:
        found, problems = sort_out(root, [name])
        new, broken = new | found, broken | problems
    return new, broken


def _ask_all(root: Path, new: dict[str, str], wait_seconds: float) -> dict[str, str]:
    """Start a run of each pipeline; returns the problems of those that could not be started."""
    broken = {}
    for name, sources in new.items():
        try:
            ask(root, name, sources, wait_seconds=wait_seconds)
        except Exception as error:  # noqa: BLE001  # any error is only this pipeline's problem
            broken[name] = outcome.error_in_one_line(error)
    return broken


def ask(root: Path, pipeline: str, sources: str, *, wait_seconds: float) -> UUID:
    """The pipeline's run on this content, which is started unless the newest run from here was for the same occasion.

    An occasion is a content together with the last complete run. So rows that return after other rows were run, or
    requested, are a new occasion; the same occasion is never run twice.
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
        root=root,
    )


def _last_run(root: Path, pipeline: str) -> str:
    """Digest of the last complete run's record; empty if there was none."""
    record = shelf.shelf_folder(root, pipeline) / "last.json"
    return str(of_file(record)) if record.is_file() else ""
