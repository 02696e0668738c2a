"""Resources of this process: cores, memory and the limits set by a container, a scheduler or a shell.

Linux limits processes by control group, version 1 or 2: Docker, Kubernetes, systemd and SLURM each put a process into
one, often several levels below the root, and the tightest level holds. A container that cannot see its own group at the
path that the kernel names finds it at the root of the mount. `ulimit` limits address space. Elsewhere nothing is found.
"""

import contextlib
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from graftline.errors import ConfigError

CORES_VARIABLE = "GRAFTLINE_CORES"
"""Number of cores that the parent process reserved for this one."""
_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUP = Path("/proc/self/cgroup")
_STATUS = Path("/proc/self/status")
_MACHINE = Path("/proc/vmstat")
_KILL_FILES = ("memory.events", "memory.oom_control")
"""Of version 2 and version 1."""
_VERSION_2 = ("", "unified")
"""Mount points of version 2: alone, or beside version 1."""
_UNLIMITED = 1 << 60
"""Version 1 reports the largest number of pages if there is no limit."""


@dataclass(frozen=True)
class MemoryLimit:
    """A memory limit in bytes: the limit, what is left of it now, and who set it."""

    limit: int
    left: int
    source: str


class _Group(NamedTuple):
    """A level of control groups: its folder, and whether it is of version 1."""

    folder: Path
    is_old: bool


def memory_limits() -> list[MemoryLimit]:
    """Every limit on this process's memory, the tightest first; empty if there is none.

    Free memory of a control group is counted as in Kubernetes: file cache that can be reclaimed is free.
    """
    found = [limit for group in _groups("memory") if (limit := _memory_of(group))]
    if limit := _address_space():
        found.append(limit)
    return sorted(found, key=lambda limit: limit.left)


def usable_cores() -> int:
    """Cores that this process may use, at least 1, given affinity, a container's quota and reserved cores.

    Raises:
        ConfigError: the variable `CORES_VARIABLE` is not a number of cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    limits = [cores, *([] if quota is None else [math.ceil(quota)])]
    if (given := os.environ.get(CORES_VARIABLE)) is not None:
        if not (given.isascii() and given.isdecimal() and int(given) > 0):
            raise ConfigError(f"given {CORES_VARIABLE}={given}; expected a number of cores, 1 or more; or unset it")
        limits.append(int(given))
    return max(1, min(limits))


def visible_gpus() -> list[str]:
    """GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = [name.strip() for name in chosen.split(",")]
        # CUDA stops reading at the first invalid name.
        end = next((index for index, name in enumerate(names) if name in ("", "-1", "NoDevFiles")), len(names))
        return names[:end]
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    return done.stdout.split() if done.returncode == 0 else []


def cpu_quota() -> float | None:
    """CPU time that this process's control groups allow, in cores; None if they do not limit it."""
    return min((quota for group in _groups("cpu") if (quota := _quota_of(group))), default=None)


def memory_kills() -> int:
    """Number of processes that the kernel has killed so far because memory ran out: compare two readings."""
    counts = [_count(group.folder / name, "oom_kill") for group in _groups("memory") for name in _KILL_FILES]
    return _count(_MACHINE, "oom_kill") + sum(counts)


def why_killed(kills_before: int) -> str:
    """What may have sent SIGKILL to a process, as a message, given `memory_kills` from before it started."""
    if memory_kills() <= kills_before:
        return "what sent SIGKILL is not known; the kernel does so where memory runs out, a scheduler where time does"
    tightest = next(iter(memory_limits()), None)
    limit = f": {tightest.source} allows {tightest.limit / 1e9:.2f} GB" if tightest else ""
    return f"the kernel ended it because memory ran out{limit}; `graftline plan PIPELINE` says what a training needs"


def _groups(controller: str) -> Iterator[_Group]:
    """The levels from this process's own group up to the root, for each mounted version."""
    try:
        lines = _OWN_GROUP.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        is_old = number != "0"
        if is_old and controller not in names.split(","):
            continue
        for mount in dict.fromkeys((names, controller)) if is_old else _VERSION_2:
            yield from (_Group(folder, is_old) for folder in _levels(_GROUPS / mount, path))


def _levels(root: Path, path: str) -> Iterator[Path]:
    own = root / path.strip("/")
    # A path that begins with ".." is above the mount, of which only the root is visible.
    levels = [root] if ".." in own.parts else [own, *(parent for parent in own.parents if parent.is_relative_to(root))]
    yield from (level for level in levels if level.is_dir())


def _memory_of(group: _Group) -> MemoryLimit | None:
    with contextlib.suppress(OSError, ValueError, KeyError):  # "max": no limit
        names = ("limit_in_bytes", "usage_in_bytes") if group.is_old else ("max", "current")
        limit, used = (int(_read(group.folder / f"memory.{name}")) for name in names)
        if limit < _UNLIMITED:
            stat = dict(line.split() for line in _read(group.folder / "memory.stat").splitlines())
            files = int(stat["total_inactive_file" if group.is_old else "inactive_file"])
            return MemoryLimit(limit, max(0, limit - used + files), f"control group {group.folder}")
    return None


def _quota_of(group: _Group) -> float | None:
    with contextlib.suppress(OSError, ValueError):  # "max", or files that the root group does not have
        if group.is_old:
            quota, period = (int(_read(group.folder / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
        else:
            quota, period = map(int, _read(group.folder / "cpu.max").split())
        if quota > 0 and period > 0:  # -1: no limit
            return quota / period
    return None


def _count(path: Path, name: str) -> int:
    """The number beside a name in a kernel file; 0 if there is none."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return int(dict(line.split() for line in _read(path).splitlines())[name])
    return 0


def _address_space() -> MemoryLimit | None:
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    used = 0
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = _STATUS.read_text(encoding="utf-8", errors="replace").splitlines()
        used = int(next(line for line in lines if line.startswith("VmSize:")).split()[1]) * 1024
    return MemoryLimit(limit, max(0, limit - used), "ulimit -v")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip()
