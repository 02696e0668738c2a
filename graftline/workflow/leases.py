"""What only one run at a time may use, on every machine of a Prefect server: a pipeline, and each GPU.

Each is a global concurrency limit of one slot, held by a lease that its holder renews. A holder that died renews
nothing: a minute later the server gives the slot to the next in line. Without a server that stays (`make demo`, cron)
nothing is leased: there `hold_folder` keeps two runs of one checkout apart.
"""

import contextlib
import json
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.settings import get_current_settings

from graftline.digest import write_json
from graftline.errors import LockedError
from graftline.workflow import checkout

LEASE_SECONDS = 60.0
"""How long a dead holder keeps a slot; the shortest that Prefect's server takes. Renewed at three quarters of it."""

TRY_SECONDS = 5.0
"""How long one of several free devices is waited for before the next one is tried."""


def has_server() -> bool:
    """Whether runs are kept by a Prefect server that outlives them."""
    return get_current_settings().api.url is not None


@contextlib.contextmanager
def pipeline(name: str, root: Path = Path()) -> Iterator[None]:
    """Hold a pipeline of the project in ``root``: a second run of it, here or on another machine, waits."""
    if not has_server():
        yield
        return
    with _slot(_limit(f"graftline-pipeline-{checkout.project_key(root)}-{name}"), timeout_seconds=None):
        yield


@contextlib.contextmanager
def device() -> Iterator[str | None]:
    """Hold one of this machine's GPUs, or its processors where it has none.

    Yields:
        The GPU's identity for ``CUDA_VISIBLE_DEVICES``; None where there is nothing to choose.
    """
    # Kubernetes gives each pod a device of its own.
    if not has_server() or "KUBERNETES_SERVICE_HOST" in os.environ:
        yield None
        return
    gpus = visible_gpus()
    limits = [_limit(f"graftline-{gpu}") for gpu in gpus] or [_limit(f"graftline-cpu-{platform.node()}")]
    with contextlib.ExitStack() as stack:
        chosen = _enter_first_free(stack, limits)
        yield gpus[chosen] if gpus else None


def _enter_first_free(stack: contextlib.ExitStack, limits: Sequence[str]) -> int:
    if len(limits) == 1:
        stack.enter_context(_slot(limits[0], timeout_seconds=None))
        return 0
    while True:
        for index, limit in enumerate(limits):
            with contextlib.suppress(TimeoutError):
                stack.enter_context(_slot(limit, timeout_seconds=TRY_SECONDS))
                return index


def visible_gpus() -> list[str]:
    """GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in chosen.split(",") if name not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    return done.stdout.split() if done.returncode == 0 else []


def _slot(limit: str, *, timeout_seconds: float | None) -> contextlib.AbstractContextManager[None]:
    # A server that is away for minutes must not stop a training: what it would write twice is guarded by the lock.
    return concurrency(
        limit,
        timeout_seconds=timeout_seconds,
        lease_duration=LEASE_SECONDS,
        strict=True,
        raise_on_lease_renewal_failure=False,
    )


def _limit(name: str) -> str:
    """Make the limit unless it is there; one that somebody changed stays as it is."""
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            with contextlib.suppress(ObjectAlreadyExists):  # Another run was first.
                client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
    return name


# One run at a time in a checkout's pipeline: the second one waits, or says who holds it.
#
# The lock itself is the operating system's (filelock), so it goes when its holder dies, however it dies. The text
# beside it only says who holds it.


@contextlib.contextmanager
def hold_folder(folder: Path, *, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold a pipeline's run folder.

    Args:
        folder: ``runs/<pipeline>``; made when it is missing.
        wait_seconds: how long to wait for another run to end.

    Raises:
        LockedError: another run still holds it; its process, host and start are named.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(folder / ".lock"), folder / ".holder.json"
    try:
        lock.acquire(timeout=wait_seconds)
    except Timeout as timeout:
        raise LockedError(
            f"{folder} is held by {_describe(holder)}; wait for that run, stop it, or use another checkout"
        ) from timeout
    try:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(holder, {"pid": os.getpid(), "host": socket.gethostname(), "since": since})
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _describe(holder: Path) -> str:
    try:
        held = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {held['pid']} on {held['host']} since {held['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        # The other run is between taking the lock and writing who it is, or what it wrote is damaged.
        return "another run, which does not say who it is"
