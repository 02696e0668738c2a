"""Prepare a fresh clone for one flow run: connect it with the machine's shared caches.

    python -m graftline.workflow.checkout          in the clone, before the flow starts (prefect.yaml, step `pull`)

Each run works in its own clone, so that runs never see each other's files. What they share is in two folders of the
machine, which the environment names:

    GRAFTLINE_DVC_CACHE   DVC's cache and run cache
    GRAFTLINE_CACHE       sources, converted bases, and each pipeline's shelf (`graftline.workflow.shelf`)
"""

import os
import re
import shutil
from pathlib import Path

from graftline import settings
from graftline.digest import of_bytes, write_text
from graftline.errors import ConfigError, GraftlineError
from graftline.workflow import owner
from graftline.workflow.git import fetch, git
from graftline.workflow.outcome import explained_errors
from graftline.workflow.shelf import shelf_folder
from graftline.workflow.worktree import write_cache_dir

_MAX_HOPS = 5  # clones of clones; the limit ends a cycle


def project_key(root: Path) -> str:
    """Eight hexadecimal digits, the same in every clone and worktree of a project, on every machine.

    Pipelines of two projects may have the same name and share a machine and a server. The key is derived from the
    address of ``origin`` without scheme, user and password, followed through local clones; without an origin, from the
    repository's folder. Projects in one repository differ by their folders in it.
    """
    known = f"{_origin(root.resolve(), _MAX_HOPS)}\n{_prefix(root)}"
    return of_bytes(known.encode("utf-8", "surrogateescape")).hex[:8]


def _prefix(root: Path) -> str:
    try:
        return git(root, "rev-parse", "--show-prefix").strip()
    except GraftlineError:
        return ""


def _origin(folder: Path, hops: int) -> str:
    try:
        address = git(folder, "config", "--get", "--default", "", "remote.origin.url").strip()
    except GraftlineError:
        return str(folder)  # no repository, or git is missing
    if not address:
        return str(_repository(folder))
    # git resolves ../server.git from the repository's folder.
    local = _repository(folder) / address.removeprefix("file://")
    if local.is_dir() and hops:
        return _origin(local.resolve(), hops - 1)
    without_scheme = re.sub(r"^[a-z+]+://", "", address)
    host, _, path = re.sub(r"^[^/]*@", "", without_scheme).replace(":", "/", 1).partition("/")
    return f"{host.lower()}/{path.strip('/').removesuffix('.git')}"


def _repository(folder: Path) -> Path:
    """The folder of the repository, which all its worktrees share."""
    common = git(folder, "rev-parse", "--path-format=absolute", "--git-common-dir").strip()
    return Path(common).parent if Path(common).name == ".git" else Path(common)


VARIABLES = ("GRAFTLINE_CACHE", "GRAFTLINE_DVC_CACHE")
_MARK = "graftline.disposable"


def prepare(root: Path) -> None:
    """Connect a fresh clone with the shared folders, and mark it as disposable.

    Raises:
        GraftlineError: a variable is missing, or pipelines.yaml cannot be read.
    """
    cache, dvc_cache = (_folder_of(name) for name in VARIABLES)
    write_cache_dir(root, dvc_cache)
    document = settings.load(root / settings.DEFAULT_FILE).document
    shelves = cache / "shelves" / project_key(root)
    for pipeline, section in document.pipelines.items():
        _check_store(pipeline, section.release.store)
        shared, link = shelves / pipeline, shelf_folder(root, pipeline)
        shared.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(shared, target_is_directory=True)
    git(root, "config", "--local", _MARK, "true")
    _remove_abandoned(root)


def project_root() -> Path:
    """The current folder if it has a pipelines.yaml, else its repository's root."""
    here = Path.cwd()
    return here if (here / settings.DEFAULT_FILE).is_file() else Path(git(here, "rev-parse", "--show-toplevel").strip())


def deepen(root: Path, *revisions: str) -> None:
    """Fetch revisions into a disposable checkout, because a worker clones only one commit of one branch.

    Raises:
        GitError: the server does not have one of them.
    """
    if is_disposable(root):
        for revision in revisions:
            fetch(root, revision)


def is_disposable(root: Path) -> bool:
    """Whether `prepare` marked this checkout: it is removed after its run."""
    git_config = root / ".git" / "config"
    return (
        git_config.is_file() and git(root, "config", "--local", "--get", "--default", "false", _MARK).strip() == "true"
    )


def narrow(root: Path, pipeline: str) -> None:
    """Remove all other pipelines from the pipelines.yaml of a disposable checkout.

    DVC reads every stage of every pipeline first, which takes minutes per command with a thousand pipelines. Values
    stay the same, so that DVC finds the same runs; git ignores the change.
    """
    path = root / settings.DEFAULT_FILE
    if not is_disposable(root) or len(settings.load(path).names) == 1:
        return
    write_text(path, settings.narrowed(path.read_bytes(), [pipeline], path.name))
    git(root, "update-index", "--skip-worktree", settings.DEFAULT_FILE)


def _remove_abandoned(root: Path) -> None:
    """Record the owner of this checkout, and remove the checkouts of killed runs."""
    owner.record(root, os.getppid())  # the flow run, which executes the deployment's steps
    if not root.parent.name.endswith("prefect"):
        return  # not a folder that a process worker made for a run
    for record in root.parent.parent.glob(f"*prefect/*/{owner.RECORD}"):
        if record.parents[1] != root and owner.is_abandoned(record.parents[1]):
            shutil.rmtree(record.parents[2], ignore_errors=True)


def _check_store(pipeline: str, store: str) -> None:
    if "://" not in store and not Path(store).is_absolute():
        raise ConfigError(
            f"pipelines.{pipeline}.release.store is {store!r}, a folder of the checkout, which is removed after "
            "its run; expected s3://… or an absolute path"
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
