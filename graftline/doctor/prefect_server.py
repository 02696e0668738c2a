"""Which Prefect server runs report to, where that is configured, and whether it answers.

Prefect takes its address from ``PREFECT_API_URL``, or from the user's active profile, which is read here without
Prefect, because that takes seconds to import.
"""

import importlib.metadata
import json
import os
import tomllib
import urllib.request
from pathlib import Path
from typing import NamedTuple

from graftline.address import mask_secrets
from graftline.data.sources import default_cache
from graftline.doctor.machine import Finding, existing_above
from graftline.extras import install_command
from graftline.program import user_name

_TIMEOUT_SECONDS = 5.0
_URL = "PREFECT_API_URL"


class Server(NamedTuple):
    """A server's address, and where it is configured."""

    url: str
    source: str
    remedy: str
    """How to let each run start its own server instead."""


def configured() -> Server | None:
    """The server that Prefect is configured to use; None: each run starts its own."""
    if url := os.environ.get(_URL):
        return Server(url, _URL, f"unset {_URL}")
    path = _profiles()
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        name = os.environ.get("PREFECT_PROFILE") or document["active"]
        url = document["profiles"][name][_URL]
    except (OSError, ValueError, KeyError, TypeError):  # no file, an unreadable one, or no server in it
        return None
    return Server(str(url), f"profile {name!r} in {path}", "prefect profile use ephemeral") if url else None


def _profiles() -> Path:
    home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect")
    path = Path(os.environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml")
    try:
        return path.expanduser()
    except RuntimeError:  # a user without a home folder
        return path


def _problem_of_profiles() -> str | None:
    path = _profiles()
    try:
        tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return f"{path} is not valid TOML: {error}"
    except OSError:  # Prefect then has no profiles either
        return None
    return None


def stand_ins(root: Path) -> dict[str, str]:
    """Variables to set before Prefect is imported, for users without a name or a home, as in many containers.

    If the home folder is read-only, Prefect's database goes into the project's cache, because a server would try for
    minutes, in vain. Without a home folder Prefect cannot be imported, and without a user's name DVC cannot be used.
    """
    found: dict[str, str] = {}
    if user_name() is None:
        found["LOGNAME"] = f"uid-{os.getuid()}"
    home, folder = Path(os.path.expanduser("~/.prefect")), default_cache(root).parent / "prefect"
    if not home.is_absolute():
        found["HOME"] = str(folder.parent.absolute())
    existing = existing_above(home)
    is_usable = home.is_absolute() and existing.is_dir() and os.access(existing, os.W_OK)
    if not is_usable and not os.environ.get("PREFECT_HOME"):
        folder.mkdir(parents=True, exist_ok=True)
        found["PREFECT_HOME"] = str(folder.absolute())
    return found


def no_answer(reason: str) -> str:
    """The error message for a run that could not reach its server."""
    server = configured()
    if server is None:
        return f"the Prefect server of this run did not answer: {reason}; look at `graftline doctor`, then try again"
    return (
        f"the Prefect server {mask_secrets(server.url)}, which {server.source} names, did not answer: {reason}; "
        f"start it (prefect server start), or let each run bring its own: {server.remedy}"
    )


def look() -> Finding:
    """The server that runs report to, and whether its version is the installed one."""
    try:
        installed = importlib.metadata.version("prefect")
    except importlib.metadata.PackageNotFoundError:
        return Finding("prefect", "missing", "not installed", install_command("flow"))
    if problem := _problem_of_profiles():
        return Finding("prefect", "missing", problem, "correct the file, or delete it")
    server = configured()
    if server is None:
        return Finding("prefect", "ok", f"{installed}; {_URL} is not set: each run starts its own server")
    url = mask_secrets(server.url)
    try:
        # The user's own setting of Prefect.
        with urllib.request.urlopen(f"{server.url.rstrip('/')}/admin/version", timeout=_TIMEOUT_SECONDS) as answer:  # noqa: S310
            there = json.loads(answer.read())
    except (OSError, ValueError) as error:
        found = f"{installed}; {url} ({server.source}) does not answer: {mask_secrets(str(error))}"
        return Finding("prefect", "missing", found, f"start it: prefect server start; or {server.remedy}")
    if there != installed:
        advice = "install the same version on the server and its workers"
        return Finding("prefect", "note", f"{installed} here, {there} at {url}", advice)
    return Finding("prefect", "ok", f"{installed}, {url} ({server.source}) answers")
