"""Share stage runs between workers: DVC's run cache and outputs, through the project's default remote.

`dvc push --run-cache` and `dvc repro --pull` copy the run cache of every stage that was ever run, so their cost grows
with history. Here only one stage's entries and outputs are copied (studies/results/scale.json compares them), in DVC's
format, which its commands understand. Without a remote nothing happens.
"""

import configparser
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

from graftline.digest import write_text
from graftline.workflow.environment import for_child

logger = logging.getLogger("graftline.archive")

# DVC keeps the run cache with its oldest object format, whatever the format of the objects.
_RUN_CACHE_FORMAT = "md5-dos2unix"
_NOTHING = 3  # Python exits with 1 after an error, 2 after a wrong argument


def fetch(stage: str, pipeline: str, *, root: Path) -> bool:
    """Download an earlier run of a stage into the local cache, where ``dvc repro`` finds it.

    The stage's dependencies must be in ``root``. Returns whether the run is in the cache now; if the remote fails,
    the stage simply runs.
    """
    return has_remote(root) and _in_a_process("fetch", stage, pipeline, root)


def push(stage: str, pipeline: str, *, root: Path) -> bool:
    """Upload a stage's run and its outputs; returns whether they are on the remote now. A failure is only logged."""
    return has_remote(root) and _in_a_process("push", stage, pipeline, root)


def has_remote(root: Path) -> bool:
    """Whether the project has a default remote."""
    settings = configparser.ConfigParser(interpolation=None)
    settings.read([root / ".dvc" / "config", root / ".dvc" / "config.local"], encoding="utf-8")
    return settings.has_option("core", "remote")


def _in_a_process(verb: str, stage: str, pipeline: str, root: Path) -> bool:
    # DVC resolves paths against the working directory, which all threads of a process share.
    command = [sys.executable, "-m", "graftline.workflow.archive", verb, stage, pipeline]
    done = subprocess.run(
        command, cwd=root, env=for_child(root), capture_output=True, encoding="utf-8", errors="replace"
    )
    if done.returncode not in (0, _NOTHING):
        logger.warning("the archive did not answer: %s", (done.stderr.strip().splitlines() or ["no reason given"])[-1])
    return done.returncode == 0


def _fetch(repo: Any, remote: Any, address: str) -> bool:
    stage, key = _key(repo, address)
    if key is None:
        return False
    here = _cached_run(repo, stage)
    if here is not None and here.outs_cached():
        return True
    if not _copy(key, remote, repo.cache.legacy):
        return False
    run = _cached_run(repo, stage)
    if run is None:
        return False
    for objects in run.get_used_objs().values():
        repo.cloud.pull(objects)
    return True


def _push(repo: Any, remote: Any, address: str) -> bool:
    stage, key = _key(repo, address)
    run = _cached_run(repo, stage) if key else None
    if key is None or run is None:
        return False
    for objects in run.get_used_objs().values():
        repo.cloud.push(objects)
    # The entry last, so that everything it names is there already.
    return _copy(key, repo.cache.legacy, remote)


def _key(repo: Any, address: str) -> tuple[Any, str | None]:
    """The stage and the digest of its command, dependencies and output names; None if DVC cannot reuse its runs."""
    from dvc.stage.cache import _get_stage_hash

    stage = repo.stage.load_one("dvc.yaml", address)
    stage.save_deps(allow_missing=True)
    return stage, _get_stage_hash(stage)


def _cached_run(repo: Any, stage: Any) -> Any | None:
    """The newest run of the stage in the local run cache, with all its outputs, metrics included."""
    entry = repo.stage_cache._load(stage)
    return entry and repo.stage_cache._create_stage(entry, wdir=stage.wdir)


def _copy(key: str, source: Any, target: Any) -> bool:
    """Copy the entries of a run-cache key that the target lacks; returns False if the source has none."""
    from dvc.fs import LocalFileSystem

    folder = source.fs.join(source.path, "runs", key[:2], key)
    if not source.fs.exists(folder):
        return False
    for path in source.fs.find(folder):
        to = target.fs.join(target.path, "runs", key[:2], key, source.fs.name(path))
        if not target.fs.exists(to):
            content = source.fs.cat_file(path)
            if isinstance(target.fs, LocalFileSystem):
                write_text(Path(to), content.decode())
            else:
                target.fs.pipe_file(to, content)
    return True


def main() -> None:
    """``python -m graftline.workflow.archive fetch|push STAGE PIPELINE``: exit code 0 done, 3 nothing found."""
    from dvc.repo import Repo  # takes a second to import

    verb, stage, pipeline = sys.argv[1:]
    work = {"fetch": _fetch, "push": _push}[verb]
    with Repo() as repo, repo.lock:
        remote = repo.cloud.get_remote_odb(None, "run-cache", hash_name=_RUN_CACHE_FORMAT)
        sys.exit(0 if work(repo, remote, f"{stage}@{pipeline}") else _NOTHING)


if __name__ == "__main__":
    main()
