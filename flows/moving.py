"""What has moved since a pipeline's last run: new rows at its source, another release in production, other code."""

import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flows import inputs, shelf, trouble
from graftline.digest import of_json
from tasks import resolve
from tasks.stage import load_context

logger = logging.getLogger("graftline.moving")

_AT_ONCE = 8  # Resolving waits for answers, mostly.


def sort(root: Path, pipelines: Sequence[str]) -> tuple[list[str], list[str], dict[str, str]]:
    """Pin what moves for every pipeline.

    Returns:
        Pipelines that changed since their last whole run, in the given order; those that did not; and what is wrong
        with those that cannot be resolved, by name.
    """
    found = dict(resolve_all(root, pipelines))
    broken = {name: problem for name, problem in found.items() if problem}
    whole = [name for name in pipelines if name not in broken]
    now = _inputs(root, whole) if whole else {}
    unchanged = [name for name in whole if now[name] and now[name] == _last_inputs(root, name)]
    return [name for name in whole if name not in unchanged], unchanged, broken


def with_new_data(root: Path, pipelines: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Pipelines with a source whose content is another than in their last whole run.

    Returns:
        Digest of the sources by pipeline, for those with new data; what is wrong with those that cannot be resolved.
    """
    before = {name: _sources(shelf.folder(root, name) / resolve.RESOLVED) for name in pipelines}
    found = dict(resolve_all(root, pipelines))
    now = {name: _sources(root / "runs" / name / resolve.RESOLVED) for name, problem in found.items() if not problem}
    new = {name: str(of_json(sources)) for name, sources in now.items() if sources != before[name]}
    return new, {name: problem for name, problem in found.items() if problem}


def resolve_all(root: Path, pipelines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each pipeline with the first line of its problem, empty if there is none; in this process, many at once."""

    def one(name: str) -> tuple[str, str]:
        try:
            shelf.restore(root, name)
            resolve.run(load_context(name, root))
        except (Exception, SystemExit) as error:  # noqa: BLE001  # Of whatever kind: it is this pipeline's.
            return name, trouble.in_one_line(error)
        return name, ""

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        yield from pool.map(one, pipelines)


def _inputs(root: Path, pipelines: list[str]) -> dict[str, str]:
    """What each is made of now; empty, so that DVC decides, where that cannot be told."""
    try:
        return inputs.of_pipelines(root, pipelines)
    except Exception as error:  # noqa: BLE001  # Each has its turn, and what is wrong is its own there.
        logger.warning("every pipeline has its turn: what they are made of is unknown: %s", trouble.in_one_line(error))
        return dict.fromkeys(pipelines, "")


def _last_inputs(root: Path, pipeline: str) -> str | None:
    last = shelf.last(root, pipeline)
    return last.inputs if last else None


def _sources(path: Path) -> Any:
    """Sources of a record; None if there is none, or none that can be read: such a pipeline has new data."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["sources"] if path.is_file() else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        logger.warning("%s cannot be read: %s", path, error)
        return None
