"""What this machine offers a training line."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from graftline import limits
from graftline.data.sources import default_cache
from graftline.doctor.finding import Finding, Status
from graftline.extras import install_command

_PIN = re.compile(r"([A-Za-z0-9][\w.-]*)==(\S+)")
_PYTHONS = ((3, 11), (3, 12), (3, 13))
"""As pyproject.toml says."""
_GIB = 1 << 30
WANTED_DISK_GIB = 5
WANTED_MEMORY_GIB = 8


def look(root: Path) -> Iterator[Finding]:
    """The machine, the environment and the programs that a line calls."""
    yield _python()
    yield from _packages(root / "constraints.txt")
    yield _disk(default_cache(root))
    yield _memory()
    yield _threads()
    yield _cuda()
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
        yield Finding("packages", "note", f"no {constraints.name} here", "run in the project's folder")
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


def _disk(cache: Path) -> Finding:
    existing = next(folder for folder in (cache.absolute(), *cache.absolute().parents) if folder.exists())
    free_gib = shutil.disk_usage(existing).free / _GIB
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


def _cuda() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("cuda", "missing", f"torch cannot be imported: {error}", "make setup")
    if not torch.cuda.is_available():
        return Finding("cuda", "note", f"none; torch {torch.__version__}", "training runs on the CPU")
    free, total = torch.cuda.mem_get_info()
    name = torch.cuda.get_device_name()
    return Finding("cuda", "ok", f"{name}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free; torch {torch.__version__}")


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
