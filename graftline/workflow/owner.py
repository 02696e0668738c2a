"""Whose checkout this is, and whether they are still at work in it. No clock is asked: clocks are set while runs live.

Two signs, and either keeps a checkout:

* every process of the flows that works in a disposable checkout holds a shared lock on its record, from the start of
  its first flow (`graftline.workflow.process`) to its own end, however that comes;
* the record names the flow run's process as the kernel knows it: its boot, its number and its start in the kernel's
  ticks. It counts from the deployment's steps until the flow starts.
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
    """Say that the process ``pid`` of this machine works in a checkout."""
    write_json(root / RECORD, {"host": platform.node(), **_identity(pid)})


def stay(root: Path) -> None:
    """Hold a checkout that has a record, as long as this process lives; any other folder is left alone."""
    if not (root / RECORD).is_file() or root.absolute() in _HELD:
        return
    try:
        handle = os.open(root / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        _HELD.add(root.absolute())
    except OSError as error:  # No locks on this file system, or whoever removes it was first.
        logger.warning("%s cannot be held: %s", root / _LOCK, error)


def is_abandoned(root: Path) -> bool:
    """Whether nobody can be at work in a checkout. What cannot be told, such as another host's, is not abandoned."""
    try:
        owner: dict[str, Any] = json.loads((root / RECORD).read_text(encoding="utf-8"))
        if owner["host"] != platform.node() or _is_held(root):
            return False
        return not _lives(owner)
    except Exception as error:  # noqa: BLE001  # Whatever is in that file, it must not end this run.
        logger.warning("%s is left: its record cannot be read (%s); remove it once nobody works there", root, error)
        return False


def _identity(pid: int) -> dict[str, Any]:
    return {"boot": _read(_BOOT), "namespace": _link(_NAMESPACE), "pid": pid, "started": _start_of(pid)}


def _lives(owner: dict[str, Any]) -> bool:
    mine = _identity(os.getpid())
    boot, namespace, pid, started = str(owner["boot"]), str(owner["namespace"]), int(owner["pid"]), owner["started"]
    if (boot, namespace) != (mine["boot"], mine["namespace"]):
        # The machine or the container was started again under its old name: the lock alone can tell, and it is free.
        return False
    try:
        return bool(_start_of(pid) == started)
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return False


def _start_of(pid: int) -> float:
    """Clock ticks from the kernel's start to the process's; other systems than Linux keep a time that stays."""
    if not Path("/proc/self/stat").is_file():
        return psutil.Process(pid).create_time()
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    # The name in brackets may hold anything; what follows is field 3 and on (man proc_pid_stat): the start is field 22.
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
