"""Make a project, and compare one with what this version of graftline would write.

What was written is recorded in ``.graftline/scaffold.json``: ``{"graftline": version, "project": name, "files": {path:
digest}}``. So a file that somebody has changed is told from one that a newer graftline writes otherwise.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from graftline import settings
from graftline.digest import Digest, atomic_write, of_bytes, write_json
from graftline.errors import ConfigError, GraftlineError
from graftline.extras import install_command
from graftline.scaffold.files import Names, contents
from graftline.settings.loader import check_folder_name
from graftline.workflow.environment import for_git
from graftline.workflow.git import git

RECORD = ".graftline/scaffold.json"

State = Literal["changed", "edited", "removed", "new", "taken", "gone"]
MEANINGS: dict[State, str] = {
    "changed": "written otherwise now; nobody has changed yours",
    "edited": "written otherwise now, and you have changed yours",
    "removed": "written otherwise now, and you have removed yours",
    "new": "new",
    "taken": "new, but there is a file of yours",
    "gone": "no longer written",
}
TAKEN_OVER: tuple[State, ...] = ("changed", "new")
"""What `update` writes."""
_LISTED = 10
"""So many files that are in the way are named."""


@dataclass(frozen=True)
class Difference:
    """A file that this version of graftline writes otherwise than the one that was used before."""

    path: str
    state: State


def make(folder: Path) -> int:
    """Make a project in a folder, which may be there already; the number of files.

    Nothing that exists is changed. git and DVC come first, so that nothing is written where one of them fails; inside
    a git repository the project becomes a part of that.

    Raises:
        ConfigError: files of these names exist, DVC is not installed, or the folder cannot be one.
        GraftlineError: git or DVC refused.
    """
    check_folder_name(folder.absolute())
    name = name_of(folder)
    if (folder / RECORD).exists():
        raise ConfigError(f"{folder} is a project already; `graftline init --check` there says what is new")
    files = contents(Names(name))
    if blocked := [path for path in (*files, RECORD) if _is_blocked(folder, path, files.get(path))]:
        more = [f"and {len(blocked) - _LISTED} more"] if len(blocked) > _LISTED else []
        listed = "\n  ".join([*blocked[:_LISTED], *more])
        raise ConfigError(
            f"{folder} holds what a project would have, and nothing of it is overwritten:\n  {listed}\n"
            "move it away, or give another folder: graftline init NAME"
        )
    if importlib.util.find_spec("dvc") is None:
        raise ConfigError(f"the package dvc is not installed; a project needs it: {install_command('all')}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {folder}: {error.strerror}; give another one") from error
    _start_git_and_dvc(folder)
    for path, content in files.items():
        _write(folder / path, content)
    _record(folder, name, {path: of_bytes(content) for path, content in files.items()})
    return len(files)


def name_of(folder: Path) -> str:
    """A project's name, as Python's packages are named: that of its folder, in small letters.

    Raises:
        ConfigError: the folder's name holds no letter or digit.
    """
    name = re.sub(r"[^a-z0-9]+", "-", folder.absolute().name.lower()).strip("-")
    if not name:
        raise ConfigError(f"{folder} gives a project no name; expected a folder whose name holds letters or digits")
    return name


def compare(root: Path) -> list[Difference]:
    """What this version of graftline would write otherwise than the one that the project was made with, by path.

    Raises:
        ConfigError: no project that `make` made, or its pipelines.yaml cannot be read.
    """
    record = _read_record(root)
    return _differences(root, record["files"], contents(_names(root, record)))


def _differences(root: Path, written: dict[str, str], now: dict[str, bytes]) -> list[Difference]:
    found = [Difference(path, "gone") for path in written if path not in now and (root / path).exists()]
    for path, content in now.items():
        state = _state(root / path, written.get(path), str(of_bytes(content)))
        found += [Difference(path, state)] if state else []
    return sorted(found, key=lambda difference: difference.path)


def update(root: Path) -> list[Difference]:
    """Write what is new and what nobody has changed; what is left for a person to look at, told this once.

    Raises:
        ConfigError: see `compare`.
    """
    record = _read_record(root)
    now = contents(_names(root, record))
    differences = _differences(root, record["files"], now)
    for difference in differences:
        if difference.state in TAKEN_OVER:
            _write(root / difference.path, now[difference.path])
    _record(root, record["project"], {path: of_bytes(content) for path, content in now.items()})
    return [difference for difference in differences if difference.state not in TAKEN_OVER]


def _state(file: Path, written: str | None, now: str) -> State | None:
    there = str(of_bytes(file.read_bytes())) if file.is_file() else None
    if now in (there, written):
        return None
    if written is None:
        return "new" if there is None and not os.path.lexists(file) else "taken"
    if there is None:
        return "removed"
    return "changed" if there == written else "edited"


def _names(root: Path, record: dict[str, Any]) -> Names:
    return Names(record["project"], pipelines=settings.load(root / settings.DEFAULT_FILE).names)


def _is_blocked(folder: Path, path: str, content: bytes | None) -> bool:
    """Whether something else is there: a file of other content, or something that is no folder above it."""
    place = folder / path
    above = [parent for parent in place.parents if parent.is_relative_to(folder)]
    if any(os.path.lexists(parent) and not parent.is_dir() for parent in above):
        return True
    if not os.path.lexists(place):
        return False
    return content is None or not place.is_file() or place.read_bytes() != content


def _start_git_and_dvc(folder: Path) -> None:
    try:
        top = Path(git(folder, "rev-parse", "--show-toplevel").rstrip("\n"))
    except GraftlineError:
        git(folder, "init", "--quiet", "--initial-branch", "main")
        top = folder
    if (folder / ".dvc").exists():
        return
    command = [sys.executable, "-m", "dvc", "init"]  # with --quiet it would not say why it failed either
    command += [] if top.resolve() == folder.resolve() else ["--subdir"]
    done = subprocess.run(
        command,
        cwd=folder,
        env=for_git() | {"DVC_NO_ANALYTICS": "1"},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        said = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        raise GraftlineError(f"dvc init failed in {folder}: {'; '.join(said) or ' '.join(done.stderr.split())}")


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as out:
        out.write(content)


def _record(root: Path, name: str, files: dict[str, Digest]) -> None:
    digests = {path: str(digest) for path, digest in sorted(files.items())}
    write_json(root / RECORD, {"graftline": version("graftline"), "project": name, "files": digests})


def _read_record(root: Path) -> dict[str, Any]:
    path = root / RECORD
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record["project"], str) or not all(isinstance(d, str) for d in record["files"].values()):
            raise TypeError("project and files are not text")
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} is missing; run in the folder of a project that `graftline init NAME` made"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; restore it from git") from error
    return record
