"""A pipeline's inputs as one digest, and what changed since its last run; if nothing did, there is nothing to run.

Code and settings come from DVC's graph of the commit (`graftline.workflow.changes`), moving inputs (new rows, the
release in production) from `graftline.workflow.resolve`. Nothing is written into ``runs/``, where a run may be active.
"""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftline import settings
from graftline.digest import of_json
from graftline.errors import GraftlineError
from graftline.settings import DEFAULT_FILE, narrowed, parse_config
from graftline.workflow import outcome, resolve, shelf
from graftline.workflow.changes import read_graph
from graftline.workflow.git import git
from graftline.workflow.published import is_in_store
from graftline.workflow.workspace import Workspace


def combine(code: str, resolved: Mapping[str, Any]) -> str:
    """Digest of what a pipeline depends on: of its code and settings (`of_code`), and of what moves.

    Empty where the former is: no commit holds them, and DVC has to decide.
    """
    return str(of_json({"code": code, "resolved": resolve.what_counts(resolved)})) if code else ""


def of_code(root: Path, pipelines: list[str]) -> dict[str, str]:
    """Digest of each pipeline's code and settings; empty if they are not committed.

    Raises:
        GraftlineError: dvc.yaml or pipelines.yaml cannot be read.
    """
    if not _is_committed(root):
        return dict.fromkeys(pipelines, "")
    graph = read_graph(root, _narrowed(root, git(root, "rev-parse", "HEAD").strip(), pipelines))
    digests = {}
    for pipeline in pipelines:
        stages = {name: [stage.inputs, sorted(stage.needs)] for name, stage in graph[pipeline].items()}
        digests[pipeline] = str(of_json(stages))
    return digests


def _is_committed(root: Path) -> bool:
    try:
        return not git(root, "status", "--porcelain", "--untracked-files=no").strip()
    except (GraftlineError, FileNotFoundError):
        return False  # no repository, or git is missing


def _narrowed(root: Path, commit: str, pipelines: list[str]) -> str:
    """A copy of a commit with only these pipelines in pipelines.yaml, on no branch, so that git collects it in time.

    DVC would read the stages of every pipeline, which takes minutes with a thousand of them.
    """
    data = git(root, "show", f"{commit}:{DEFAULT_FILE}").encode()
    if set(parse_config(data, Path(DEFAULT_FILE)).names) == set(pipelines):
        return commit
    blob = git(root, "hash-object", "-w", "--stdin", stdin=narrowed(data, pipelines, DEFAULT_FILE)).strip()
    entries = git(root, "ls-tree", commit).splitlines()
    tree = [f"100644 blob {blob}\t{DEFAULT_FILE}" if line.endswith(f"\t{DEFAULT_FILE}") else line for line in entries]
    made = git(root, "mktree", stdin="\n".join(tree) + "\n").strip()
    author = ["-c", "user.name=graftline", "-c", "user.email=graftline@invalid"]
    return git(root, *author, "commit-tree", made, "-m", "narrowed").strip()


logger = logging.getLogger("graftline.moving")

_AT_ONCE = 8  # resolving mostly waits for servers


@dataclass(frozen=True)
class MovingInputs:
    """The current state of a pipeline's sources and channel, or the problem with them."""

    resolved: dict[str, Any] = field(default_factory=dict)
    """As from `graftline.workflow.resolve.look_up`; empty if there is a problem."""
    problem: str = ""
    """First line of the error."""
    is_released: bool = True
    """False if the store lacks the last run's release, so that the next run must publish it again."""


def sort_by_news(root: Path, pipelines: Sequence[str]) -> tuple[list[str], list[str], dict[str, str]]:
    """Sort pipelines by whether their inputs changed since their last complete run.

    Returns:
        The changed and the unchanged ones, in the given order, and problems by pipeline that cannot be resolved.
    """
    found = look_up_all(root, pipelines)
    broken = {name: now.problem for name, now in found.items() if now.problem}
    whole = [name for name in pipelines if name not in broken]
    code = _code(root, whole) if whole else {}
    unchanged = [
        name for name in whole if found[name].is_released and _is_unchanged(root, name, code[name], found[name])
    ]
    return [name for name in whole if name not in unchanged], unchanged, broken


def with_new_data(root: Path, pipelines: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Pipelines with other source content than in their last complete run.

    Returns:
        Digest of the sources by pipeline with new data, and problems by pipeline that cannot be resolved.
    """
    found = look_up_all(root, pipelines)
    now = {name: each.resolved["sources"] for name, each in found.items() if not each.problem}
    before = {name: shelf.last_resolved(root, name).get("sources") for name in now}
    new = {name: str(of_json(sources)) for name, sources in now.items() if sources != before[name]}
    return new, {name: each.problem for name, each in found.items() if each.problem}


def look_up_all(root: Path, pipelines: Sequence[str]) -> dict[str, MovingInputs]:
    """The current state of each pipeline's sources and channel, looked up in threads."""
    try:
        config, executed = settings.load(root / settings.DEFAULT_FILE), resolve.code_record(root)
    except (Exception, SystemExit) as error:  # noqa: BLE001  # any error is every pipeline's problem
        return dict.fromkeys(pipelines, MovingInputs(problem=outcome.error_in_one_line(error)))

    def one(name: str) -> MovingInputs:
        try:
            pipeline, at = config.pipeline(name), Workspace(root, name)
            found = resolve.look_up(pipeline, at, executed, anchored=config.is_anchored(name))
            return MovingInputs(found, is_released=is_released(pipeline.release, at))
        except (Exception, SystemExit) as error:  # noqa: BLE001  # any error is only this pipeline's problem
            return MovingInputs(problem=outcome.error_in_one_line(error))

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip(pipelines, pool.map(one, pipelines), strict=True))


def is_released(section: settings.Release, at: Workspace) -> bool:
    """Whether the store holds the release of the last complete run, if it made one."""
    last, record = shelf.last_run(at.root, at.name), shelf.last_released(at.root, at.name)
    return last is None or last.version != record.get("version") or is_in_store(section, record, at)


def as_last_run(root: Path, pipeline: str, now: dict[str, Any]) -> dict[str, Any] | None:
    """What the last complete run resolved, if since then only its own release has entered production.

    Otherwise the candidate would be compared with itself, and every night after a promotion would release the same
    adapter again. Callers check that code and settings are unchanged too (`graftline.workflow.line`).
    """
    last, before = shelf.last_run(root, pipeline), shelf.last_resolved(root, pipeline)
    champion = (now.get("champion") or {}).get("version")
    if last is None or champion is None or champion != last.version:
        return None
    counted = resolve.what_counts(resolve.with_champion_of(now, before))
    return before if resolve.what_counts(before) == counted else None


def _is_unchanged(root: Path, pipeline: str, code: str, found: MovingInputs) -> bool:
    last = shelf.last_run(root, pipeline)
    same = as_last_run(root, pipeline, found.resolved) or found.resolved
    return last is not None and bool(code) and combine(code, same) == last.inputs


def _code(root: Path, pipelines: list[str]) -> dict[str, str]:
    """`of_code`, or empty digests, so that DVC decides, if the graph cannot be read."""
    try:
        return of_code(root, pipelines)
    except Exception as error:  # noqa: BLE001  # each pipeline's run will report its own error
        logger.warning("all pipelines are run, because their inputs are unknown: %s", outcome.error_in_one_line(error))
        return dict.fromkeys(pipelines, "")
