"""Who owns a disposable checkout, and whether they still work in it, without a clock, which may be set during a run.

Either of two signs keeps a checkout:

* every process of the flows that works in it holds a shared lock on its record, from the start of its first flow
  (`graftline.workflow.process`) until the process ends;
* the record identifies the flow run's process by boot, process id and start in the kernel's ticks. It counts from the
  deployment's steps until the flow starts.
"""

import fcntl
import json
import logging
import os
import platform
from pathlib import Path
from typing import Any

import psutil

from graftline.digest import write_json

logger = logging.getLogger("graftline.owner")

RECORD = Path(".git") / "graftline-owner.json"
_LOCK = Path(".git") / "graftline-owner.lock"
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACE = Path("/proc/self/ns/pid")
_HELD: set[Path] = set()
"""Checkouts that this process holds."""


def record(root: Path, pid: int) -> None:
    """Record that the process ``pid`` of this machine works in a checkout."""
    write_json(root / RECORD, {"host": platform.node(), **_identity(pid)})


def stay(root: Path) -> None:
    """Hold a checkout that has a record until this process ends; other folders are left alone."""
    if not (root / RECORD).is_file() or root.absolute() in _HELD:
        return
    try:
        handle = os.open(root / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        _HELD.add(root.absolute())
    except OSError as error:  # a file system without locks, or the checkout was just removed
        logger.warning("%s cannot be held: %s", root / _LOCK, error)


def is_abandoned(root: Path) -> bool:
    """Whether certainly nobody works in a checkout; False for another host's, and for an unreadable record."""
    try:
        owner: dict[str, Any] = json.loads((root / RECORD).read_text(encoding="utf-8"))
        if owner["host"] != platform.node() or _is_held(root):
            return False
        return not _lives(owner)
    except Exception as error:  # noqa: BLE001  # whatever is in that file must not end this run
        logger.warning("%s is left: its record cannot be read (%s); remove it once nobody works there", root, error)
        return False


def _identity(pid: int) -> dict[str, Any]:
    return {"boot": _read(_BOOT), "namespace": _link(_NAMESPACE), "pid": pid, "started": _start_of(pid)}


def _lives(owner: dict[str, Any]) -> bool:
    mine = _identity(os.getpid())
    boot, namespace, pid, started = str(owner["boot"]), str(owner["namespace"]), int(owner["pid"]), owner["started"]
    if (boot, namespace) != (mine["boot"], mine["namespace"]):
        # The machine or container was restarted under its old name, so only the lock counts, and it is free.
        return False
    try:
        return bool(_start_of(pid) == started)
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return False


def _start_of(pid: int) -> float:
    """Clock ticks from the kernel's start to the process's; outside Linux, a fixed creation time."""
    if not Path("/proc/self/stat").is_file():
        return psutil.Process(pid).create_time()
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    # The name in parentheses may contain anything; after it comes field 3 (man proc_pid_stat); the start is field 22.
    return int(stat.rpartition(")")[2].split()[22 - 3])


def _is_held(root: Path) -> bool:
    try:
        handle = os.open(root / _LOCK, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def _link(path: Path) -> str:
    return os.readlink(path) if path.is_symlink() else ""
