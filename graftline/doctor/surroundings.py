"""Checks of a run's environment: locale, user, folders, Python's options, git's and DVC's settings.

Only what may surprise is reported.
"""

import configparser
import locale
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from graftline.doctor.machine import Finding
from graftline.program import user_name

_WANTED_TEMPORARY_BYTES = 1 << 30
_UTF_8 = ("utf-8", "utf8")
_GIT_SETTINGS = {
    "core.autocrlf": "checkouts have other bytes than commits, and other digests: git config core.autocrlf false",
    "core.eol": "checkouts may have other bytes than commits, and other digests: git config --unset core.eol",
}
_DVC_SETTINGS = ("core.remote", "core.autostage", "core.no_scm", "cache.dir", "cache.type")
"""Settings that change where a run's files are, or what a run leaves in git."""


def look(root: Path) -> Iterator[Finding]:
    """What in the environment breaks something, or makes it differ from other machines."""
    yield from _locale()
    yield from _optimize()
    yield from _user()
    yield from _home()
    yield from _temporary()
    yield from _git(root)
    yield from _dvc()


def _locale() -> Iterator[Finding]:
    encoding = locale.getencoding()
    if encoding.lower() not in _UTF_8:
        found = f"the locale's encoding is {encoding}; files are read and written as UTF-8 regardless"
        yield Finding("locale", "note", found, "what a terminal lacks is printed as an escape: export LC_ALL=C.UTF-8")


def _optimize() -> Iterator[Finding]:
    if (given := os.environ.get("PYTHONOPTIMIZE")) and sys.flags.optimize:
        found = f"PYTHONOPTIMIZE={given}: our programs keep docstrings, which packages need; others may fail"
        yield Finding("python -O", "note", found, "unset PYTHONOPTIMIZE")


def _user() -> Iterator[Finding]:
    if user_name() is None:
        found = f"user {os.getuid()} has no name here"
        yield Finding("user", "note", found, "export LOGNAME=NAME, or say who does it with --as NAME")


def _home() -> Iterator[Finding]:
    home = Path(os.path.expanduser("~"))
    if not home.is_absolute() or not os.access(home, os.W_OK):
        found = f"{home} cannot be written; Prefect, DVC and the Hugging Face hub keep settings and caches there"
        yield Finding("home", "note", found, "export HOME=FOLDER, or PREFECT_HOME, DVC_SITE_CACHE_DIR and HF_HOME")


def _temporary() -> Iterator[Finding]:
    advice = "export TMPDIR=FOLDER on a disk with room"
    try:
        folder = tempfile.gettempdir()
        with tempfile.TemporaryFile():
            free = shutil.disk_usage(folder).free
    except OSError as error:
        yield Finding("temporary files", "missing", str(error), advice)
        return
    if free < _WANTED_TEMPORARY_BYTES:
        yield Finding("temporary files", "note", f"{free / 1e6:.0f} MB free in {folder}", advice)


def _git(root: Path) -> Iterator[Finding]:
    if not shutil.which("git") or not (root / ".git").exists():
        return
    done = _run_git(root, "rev-parse", "--git-dir")
    if done.returncode:
        words = " ".join(done.stderr.split())
        yield Finding("git repository", "missing", words, f"git config --global --add safe.directory {root.resolve()}")
        return
    for key, advice in _GIT_SETTINGS.items():
        value = _run_git(root, "config", "--get", key).stdout.strip()
        if value not in ("", "false", "lf", "input"):
            yield Finding(f"git {key}", "note", value, advice)


def _run_git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["git", *arguments], cwd=root, capture_output=True, encoding="utf-8", errors="replace", timeout=30, check=False
    )


def _dvc() -> Iterator[Finding]:
    """The user's DVC settings, which apply to every project."""
    folder = os.environ.get("DVC_GLOBAL_CONFIG_DIR")
    home = Path(os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"))
    path = Path(folder) / "config" if folder else home / "dvc" / "config"
    settings = configparser.ConfigParser(interpolation=None)
    try:
        settings.read(path, encoding="utf-8")
    except (configparser.Error, OSError, UnicodeDecodeError) as error:
        yield Finding(
            "dvc configuration", "missing", " ".join(f"{path}: {error}".split()), "correct or remove the file"
        )
        return
    found = [name for name in _DVC_SETTINGS if settings.has_option(*name.split("."))]
    if found:
        advice = "a project's own .dvc/config comes before it; others who run this project lack it"
        yield Finding("dvc configuration", "note", f"{path} sets {', '.join(found)}", advice)
