"""Published packages, through pip and npm as they are configured on this machine: no registry's address stands here."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from graftline.address import Source, mask_secrets
from graftline.data.sources.arrival import Arrived
from graftline.digest import of_file
from graftline.errors import SourceError, SourceUnavailableError
from graftline.progress import OnProgress

TIMEOUT_SECONDS = 3600

_FULL = re.compile(r"ENOSPC|No space left")
_UNREACHABLE = re.compile(
    r"ECONN|ENOTFOUND|ETIMEDOUT|EAI_AGAIN|ERR_SOCKET|E50[0-9]|E429|Retrying \(|ReadTimeout|ConnectionError|ProxyError"
)
"""What npm and pip print when nobody answers; pip then says that it found no version, which is not the reason."""


def download_pypi(source: Source, folder: Path, on_progress: OnProgress) -> Arrived:
    """Download a wheel. Source distributions are refused: building one would run its code.

    Raises:
        SourceError: pip ended with an error (its last lines are shown), or left no file.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), f"{source.name}=={source.version}"]
    return _run(source, command, folder, on_progress)


def download_npm(source: Source, folder: Path, on_progress: OnProgress) -> Arrived:
    """Download a package's tarball; none of its scripts runs.

    Raises:
        SourceError: npm is missing or ended with an error (its last lines are shown), or left no file.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise SourceError(f"{source} needs npm, which is not on the PATH; install Node.js, or use another source")
    command = [npm, "pack", "--ignore-scripts", "--loglevel=error", "--pack-destination", str(folder)]
    return _run(source, [*command, f"{source.name}@{source.version}"], folder, on_progress)


def _run(source: Source, command: Sequence[str], folder: Path, on_progress: OnProgress) -> Arrived:
    environment = os.environ | {"PIP_NO_INPUT": "1", "NO_COLOR": "1", "NO_UPDATE_NOTIFIER": "1"}
    tool = "npm" if source.kind == "npm" else "pip"
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise SourceUnavailableError(
            f"{source}: {tool} was not done after {TIMEOUT_SECONDS} s; check the network"
        ) from error
    files = sorted(folder.iterdir())
    if done.returncode != 0 or len(files) != 1:
        raise _failure(source, tool, done.stderr + done.stdout)
    size = files[0].stat().st_size
    on_progress(size, size)
    return Arrived(files[0], of_file(files[0]))


def _failure(source: Source, tool: str, output: str) -> SourceError:
    reason = _reason(output)
    if _FULL.search(output):
        return SourceError(f"{source}: {tool} failed: {reason}; the disk is full: free some, or set GRAFTLINE_CACHE")
    if _UNREACHABLE.search(output):
        return SourceUnavailableError(f"{source}: {tool} failed: {reason}; check the network, then run again")
    return SourceError(f"{source}: {tool} failed: {reason}; check name and version")


def _reason(text: str) -> str:
    """The first lines that pip or npm mark as errors, or the last ones of all."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and "complete log" not in line]
    errors = [line for line in lines if line.startswith(("ERROR", "npm error"))]
    return mask_secrets(" | ".join(errors[:3] or lines[-3:])) or "no message"
