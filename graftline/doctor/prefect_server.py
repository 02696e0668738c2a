"""Which Prefect server runs report to, who says so, and whether it answers.

Prefect takes its address from ``PREFECT_API_URL``, else from the user's active profile. The profile is read here
without Prefect, which takes seconds to import.
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
from graftline.doctor.finding import Finding
from graftline.extras import install_command

_TIMEOUT_SECONDS = 5.0
_URL = "PREFECT_API_URL"


class Server(NamedTuple):
    """A server's address, and who names it."""

    url: str
    source: str
    remedy: str
    """What to do for a server of each run's own."""


def configured() -> Server | None:
    """The server that Prefect is told to use; None: each run brings one of its own."""
    if url := os.environ.get(_URL):
        return Server(url, _URL, f"unset {_URL}")
    path = _profiles()
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        name = os.environ.get("PREFECT_PROFILE") or document["active"]
        url = document["profiles"][name][_URL]
    except (OSError, ValueError, KeyError, TypeError):  # no file, none that Prefect could read, or it names no server
        return None
    return Server(str(url), f"profile {name!r} in {path}", "prefect profile use ephemeral") if url else None


def _profiles() -> Path:
    home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect")
    path = Path(os.environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml")
    try:
        return path.expanduser()
    except RuntimeError:  # a user without a home folder
        return path


def home_in_project(root: Path) -> dict[str, str]:
    """Where Prefect keeps its database if the user's home folder cannot be written: in the project's cache.

    In containers with a user of any number ``HOME`` is often missing or ``/``. A server would try for minutes, in vain;
    and Prefect cannot be imported at all where no home folder is known.

    Returns:
        Variables to set before Prefect is imported; none where it can write, or was told where to.
    """
    home = Path(os.path.expanduser("~/.prefect"))
    if os.environ.get("PREFECT_HOME") and home.is_absolute():
        return {}
    existing = next((folder for folder in (home, *home.parents) if folder.exists()), None)
    if home.is_absolute() and existing is not None and existing.is_dir() and os.access(existing, os.W_OK):
        return {}
    folder = default_cache(root).parent / "prefect"
    folder.mkdir(parents=True, exist_ok=True)
    found = {"PREFECT_HOME": str(folder.absolute())}
    return found if home.is_absolute() else found | {"HOME": str(folder.parent.absolute())}


def no_answer(reason: str) -> str:
    """What to tell somebody whose run could not talk to its server."""
    server = configured()
    if server is None:
        return f"the Prefect server of this run did not answer: {reason}; look at `graftline doctor`, then try again"
    return (
        f"the Prefect server {mask_secrets(server.url)}, which {server.source} names, did not answer: {reason}; "
        f"start it (prefect server start), or let each run bring its own: {server.remedy}"
    )


def look() -> Finding:
    """The server that runs report to, and whether it is of the installed version."""
    try:
        installed = importlib.metadata.version("prefect")
    except importlib.metadata.PackageNotFoundError:
        return Finding("prefect", "missing", "not installed", install_command("flow"))
    server = configured()
    if server is None:
        return Finding("prefect", "ok", f"{installed}; {_URL} is not set: each run brings a server of its own")
    url = mask_secrets(server.url)
    try:
        with urllib.request.urlopen(f"{server.url.rstrip('/')}/admin/version", timeout=_TIMEOUT_SECONDS) as answer:
            there = json.loads(answer.read())
    except (OSError, ValueError) as error:
        found = f"{installed}; {url} ({server.source}) does not answer: {mask_secrets(str(error))}"
        return Finding("prefect", "missing", found, f"start it: prefect server start; or {server.remedy}")
    if there != installed:
        advice = "install the same version on the server and its workers"
        return Finding("prefect", "note", f"{installed} here, {there} at {url}", advice)
    return Finding("prefect", "ok", f"{installed}, {url} ({server.source}) answers")
