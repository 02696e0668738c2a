"""Make a fresh clone fit for one flow run: the machine's shared caches, and nothing else from outside it.

    python -m graftline.workflow.checkout          in the clone, before the flow starts (prefect.yaml, step `pull`)

Each run works in a clone of its own, so two of them never see each other's files, and what a run leaves goes with its
folder. What is shared lies in two folders of the machine, named by the environment:

    GRAFTLINE_DVC_CACHE   DVC's cache and run cache: what any run has made
    GRAFTLINE_CACHE       sources, converted bases, and each pipeline's shelf (graftline.workflow.shelf)
"""

import os
import shutil
from pathlib import Path

from graftline import settings
from graftline.digest import write_text
from graftline.errors import ConfigError
from graftline.workflow import owner, project, shelf
from graftline.workflow.command import explained_errors
from graftline.workflow.git import fetch, git
from graftline.workflow.worktree import write_cache_dir

VARIABLES = ("GRAFTLINE_CACHE", "GRAFTLINE_DVC_CACHE")
_MARK = "graftline.disposable"


def prepare(root: Path) -> None:
    """Connect a fresh clone with the shared folders, and mark it as one that goes away.

    Raises:
        GraftlineError: a variable is missing, or pipelines.yaml cannot be read.
    """
    cache, dvc_cache = (_folder_of(name) for name in VARIABLES)
    write_cache_dir(root, dvc_cache)
    document = settings.load(root / settings.DEFAULT_FILE).document
    shelves = cache / "shelves" / project.key(root)
    for pipeline, section in document.pipelines.items():
        _check_store(pipeline, section.release.store)
        shared, link = shelves / pipeline, shelf.folder(root, pipeline)
        shared.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(shared, target_is_directory=True)
    git(root, "config", "--local", _MARK, "true")
    _remove_abandoned(root)


def project_root() -> Path:
    """The current folder, or its repository's root: aliases and people start commands in folders of a project."""
    here = Path.cwd()
    return here if (here / settings.DEFAULT_FILE).is_file() else Path(git(here, "rev-parse", "--show-toplevel").strip())


def deepen(root: Path, *revisions: str) -> None:
    """Get what a disposable checkout lacks of some revisions: a worker clones one commit of one branch.

    Raises:
        GitError: the server does not have one of them.
    """
    if is_disposable(root):
        for revision in revisions:
            fetch(root, revision)


def is_disposable(root: Path) -> bool:
    """Whether `prepare` made this checkout what it is: nobody works in it, and it goes with its run."""
    git_config = root / ".git" / "config"
    return (
        git_config.is_file() and git(root, "config", "--local", "--get", "--default", "false", _MARK).strip() == "true"
    )


def narrow(root: Path, pipeline: str) -> None:
    """Leave one pipeline in the pipelines.yaml of a disposable checkout.

    DVC reads every stage of every pipeline before it looks at one: with a thousand pipelines that costs minutes a
    command. Values stay as they are, so DVC finds the same runs; git is told to see no change.
    """
    path = root / settings.DEFAULT_FILE
    if not is_disposable(root) or len(settings.load(path).names) == 1:
        return
    write_text(path, settings.narrowed(path.read_bytes(), [pipeline], path.name))
    git(root, "update-index", "--skip-worktree", settings.DEFAULT_FILE)


def _remove_abandoned(root: Path) -> None:
    """Say whose checkout this is, and remove those of runs that were killed: a worker that died removes nothing."""
    owner.record(root, os.getppid())  # The flow run: it carries out the deployment's steps.
    if not root.parent.name.endswith("prefect"):
        return  # Not where a process worker makes a folder for each run.
    for record in root.parent.parent.glob(f"*prefect/*/{owner.RECORD}"):
        if record.parents[1] != root and owner.is_abandoned(record.parents[1]):
            shutil.rmtree(record.parents[2], ignore_errors=True)


def _check_store(pipeline: str, store: str) -> None:
    if "://" not in store and not Path(store).is_absolute():
        raise ConfigError(
            f"pipelines.{pipeline}.release.store is {store!r}, a folder of the checkout, which goes with its run; "
            "expected s3://… or an absolute path"
        )


def _folder_of(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value or not Path(value).is_absolute():
        raise ConfigError(
            f"{variable} is {value!r}; expected an absolute path: set {' and '.join(VARIABLES)} where the worker starts"
        )
    return Path(value)


def main() -> None:
    """Command line: exit code 2 for an error that its message explains."""
    with explained_errors():
        prepare(Path.cwd())


if __name__ == "__main__":
    main()
