"""What this machine has to offer, and what a line talks to: proxies, DVC's remote, the keys."""

import configparser
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import psutil

from graftline import address, limits
from graftline.data.sources import default_cache
from graftline.errors import ConfigError, GraftlineError
from graftline.extras import DECIDE_NUMBERS, install_command, refuse_other_versions
from graftline.registry.keys import BUILDER, KEY_FILE, KeyRing
from graftline.release.signing import load_private_key

Status = Literal["ok", "note", "missing"]


@dataclass(frozen=True)
class Finding:
    """The result of one check. ``note`` works but may surprise, ``missing`` stops the line."""

    name: str
    status: Status
    found: str
    advice: str = ""


def render(findings: list[Finding]) -> str:
    """Findings as aligned text."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<8}{finding.name:<{width}}  {finding.found}")
        if finding.advice:
            lines.append(f"{'':<8}{'':<{width}}  -> {finding.advice}")
    return "\n".join(lines)


def existing_above(folder: Path) -> Path:
    """A folder, or its nearest parent that exists."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())


_PIN = re.compile(r"([A-Za-z0-9][\w.-]*)==(\S+)")
_PYTHONS = ((3, 11), (3, 12), (3, 13))
"""As in pyproject.toml."""
_GIB = 1 << 30
WANTED_DISK_GIB = 5
WANTED_MEMORY_GIB = 8


def look_at_machine(root: Path) -> Iterator[Finding]:
    """Check the machine, the environment and the programs that a line calls."""
    yield _python()
    yield from _packages(root / "constraints.txt")
    yield _versions()
    yield _disk(default_cache(root))
    yield _memory()
    yield _threads()
    yield _program("git", "--version", "install git: DVC and the manifest's code revision need it", "missing")
    yield _program("npm", "--version", "install Node.js if a source starts with npm:", "note")
    yield _dvc(root)


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info[:2] in _PYTHONS:
        return Finding("python", "ok", found)
    shown = ", ".join(f"{major}.{minor}" for major, minor in _PYTHONS)
    return Finding("python", "missing", found, f"make the environment with one of Python {shown}")


def _packages(constraints: Path) -> Iterator[Finding]:
    if not constraints.is_file():
        advice = f"pip freeze --exclude-editable > {constraints.name} says which there should be"
        yield Finding("packages", "note", f"no {constraints.name} here: versions are not compared", advice)
        return
    matches = map(_PIN.match, constraints.read_text(encoding="utf-8").splitlines())
    pins = {match[1]: match[2] for match in matches if match}
    differing, absent = [], 0
    for name, version in pins.items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            absent += 1
            continue
        # A local build suffix such as +cu128 is the same release.
        if installed.partition("+")[0] != version.partition("+")[0]:
            differing.append(f"{name} {installed} (pinned {version})")
    found = f"{len(pins) - absent} of {len(pins)} pinned packages installed, {len(differing)} of another version"
    if differing:
        shown = ", ".join(differing[:5])
        yield Finding("packages", "note", f"{found}: {shown}", "install the pinned set: make setup")
    else:
        yield Finding("packages", "ok", found)


def _versions() -> Finding:
    name = " and ".join(DECIDE_NUMBERS)
    try:
        refuse_other_versions()
    except ConfigError as error:
        problem, _, advice = str(error).rpartition("; ")
        return Finding(name, "missing", problem, advice)
    return Finding(name, "ok", ", ".join(importlib.metadata.version(package) for package in DECIDE_NUMBERS))


def _disk(cache: Path) -> Finding:
    free_gib = shutil.disk_usage(existing_above(cache)).free / _GIB
    found = f"{free_gib:.1f} GiB free for {cache}"
    if free_gib < WANTED_DISK_GIB:
        return Finding(
            "disk", "note", found, f"the demo needs {WANTED_DISK_GIB} GiB; set GRAFTLINE_CACHE to a larger disk"
        )
    return Finding("disk", "ok", found)


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    free, found = memory.available, f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free"
    if (limit := next(iter(limits.memory_limits()), None)) and limit.left < free:
        free, allowed = limit.left, limit.limit / _GIB
        found += f", but {limit.source} allows {allowed:.1f} GiB: {free / _GIB:.1f} GiB left"
    if free < WANTED_MEMORY_GIB * _GIB * 0.75:
        return Finding("memory", "note", found, f"the demo is sized for {WANTED_MEMORY_GIB} GiB; close something")
    return Finding("memory", "ok", found)


def _threads() -> Finding:
    usable, quota = limits.usable_cores(), limits.cpu_quota()
    load = os.getloadavg()[0]
    found = f"{usable} cores usable, load {load:.1f}, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}"
    if quota is not None:
        found += f", processor time of {quota:.2g} cores allowed"
    if load > usable:
        return Finding("threads", "note", found, "other programs use the cores: expect longer times")
    return Finding("threads", "ok", found)


def _program(name: str, option: str, advice: str, status: Status) -> Finding:
    path = shutil.which(name)
    if path is None:
        return Finding(name, status, "not on the PATH", advice)
    done = subprocess.run(
        [path, option], capture_output=True, encoding="utf-8", errors="replace", timeout=30, check=False
    )
    return Finding(name, "ok", f"{done.stdout.strip() or done.stderr.strip()}, {path}")


def _dvc(root: Path) -> Finding:
    try:
        version = importlib.metadata.version("dvc")
    except importlib.metadata.PackageNotFoundError:
        return Finding("dvc", "missing", "not installed", install_command("flow"))
    if not (root / ".dvc").is_dir():
        return Finding("dvc", "note", f"{version}; no .dvc folder here", "run `dvc init` in the project's folder")
    return Finding("dvc", "ok", version)


_SOON = timedelta(days=30)


def proxy() -> Iterator[Finding]:
    """Proxies in the environment: our commands bypass them for this machine, others may not."""
    found = address.named_proxies(os.environ)
    if not found:
        return
    shown = ", ".join(f"{name}={value}" for name, value in found.items())
    speaks_socks = any(value.lower().startswith("socks") for value in found.values())
    if speaks_socks and importlib.util.find_spec("socksio") is None:
        yield Finding("proxy", "missing", f"{shown}: Prefect's client cannot speak SOCKS", "pip install 'httpx[socks]'")
        return
    spared = dict(os.environ)
    address.spare_loopback(spared)
    advice = f"for `prefect` and `dvc` by hand: export NO_PROXY={','.join(address.spared_hosts(spared))}"
    yield Finding("proxy", "note", f"{shown}; graftline asks this machine without it", advice)


def remote(root: Path) -> Finding:
    """DVC's default remote, through which machines share runs."""
    settings = configparser.ConfigParser(interpolation=None)
    settings.read([root / ".dvc" / "config", root / ".dvc" / "config.local"], encoding="utf-8")
    name = settings.get("core", "remote", fallback=None)
    if name is None:
        advice = "with several machines: dvc remote add --default NAME s3://BUCKET/dvc"
        return Finding("dvc remote", "ok", "none: what this machine runs stays here", advice)
    section = f"'remote \"{name}\"'"
    if not settings.has_option(section, "url"):
        return Finding("dvc remote", "missing", f"{name} has no url", f"dvc remote add --default {name} ADDRESS")
    return Finding("dvc remote", "ok", name)


def keys(root: Path, now: datetime | None = None) -> Finding:
    """The key ring: whether it is readable and has a builder, whose keys they are, and what expires within 30 days."""
    path, now = root / KEY_FILE, now or datetime.now(UTC)
    advice = "graftline new-key FILE, then list FILE.pub in keys.yaml (docs/releases.md)"
    if not path.is_file():
        return Finding("keys", "note", f"no {KEY_FILE}: nothing can be promoted on a signature", advice)
    try:
        ring = KeyRing.load(path)
    except GraftlineError as error:
        return Finding("keys", "missing", str(error), "correct keys.yaml by pull request")
    if not ring.keys:
        return Finding("keys", "note", f"{KEY_FILE} lists no key: nothing can be promoted on a signature", advice)
    alive = [key for key in ring.keys.values() if not key.has_expired(now)]
    if not any(BUILDER in key.roles for key in alive):
        return Finding("keys", "missing", "no builder's key counts now", "add one: docs/runbooks.md, rotate keys")
    if len(alive) > 1 and (nameless := [key.name for key in alive if key.person is None]):
        found = f"{', '.join(nameless)}: no `person`, so that each counts as a different person"
        return Finding("keys", "note", found, "write `person: NAME` beside each key: docs/promotion.md, people")
    if soon := [key.name for key in alive if key.has_expired(now + _SOON)]:
        return Finding("keys", "note", f"{', '.join(soon)} expires within 30 days", "docs/runbooks.md, rotate keys")
    return Finding("keys", "ok", f"{len(alive)} of {len(ring.keys)} keys count now")


def signing_key() -> Finding:
    """The private key that releases are signed with."""
    named = os.environ.get("GRAFTLINE_SIGNING_KEY")
    if not named:
        return Finding("signing key", "note", "GRAFTLINE_SIGNING_KEY is not set: releases are not signed")
    path = Path(named).expanduser()
    try:
        load_private_key(path)
    except GraftlineError as error:
        return Finding("signing key", "missing", str(error), "name a key that `graftline new-key` made")
    if path.stat().st_mode & 0o077:
        return Finding("signing key", "note", f"others may read {path}", f"chmod 600 {path}")
    return Finding("signing key", "ok", str(path))
