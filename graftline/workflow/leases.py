"""What runs share, on every machine of a Prefect server: each pipeline, and each machine's GPUs, cores and memory.

Each is a global concurrency limit (a slot for a pipeline or a GPU; one for each core or GB of a machine), held by
leases that their holder renews. A holder that died renews nothing: a minute later the server gives its slots to the
next in line. A pipeline is held for a whole run, the others only by a stage that uses them. Without a server that stays
(`make demo`, cron) nothing is leased: there `hold_folder` keeps two runs of one checkout apart.
"""

import contextlib
import json
import math
import os
import platform
import socket
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.client.schemas.responses import GlobalConcurrencyLimitResponse
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.settings import get_current_settings

from graftline import limits
from graftline.digest import write_json
from graftline.errors import LockedError
from graftline.plan.resources import PLAN, Machine, StageNeeds
from graftline.workflow import checkout

LEASE_SECONDS = 60.0
"""How long a dead holder keeps a slot; the shortest that Prefect's server takes. Renewed at three quarters of it."""

TRY_SECONDS = 5.0
"""How long GPUs that were free a moment ago are waited for before others are looked for."""
LOOK_SECONDS = 5.0
"""Between two looks for free GPUs."""


def has_server() -> bool:
    """Whether runs are kept by a Prefect server that outlives them."""
    return get_current_settings().api.url is not None


@contextlib.contextmanager
def pipeline(name: str, root: Path = Path()) -> Iterator[None]:
    """Hold a pipeline of the project in ``root``: a second run of it, here or on another machine, waits."""
    if not has_server():
        yield
        return
    with _slots([_limit(f"graftline-pipeline-{checkout.project_key(root)}-{name}", 1)], 1):
        yield


@contextlib.contextmanager
def stage(needs: StageNeeds, machine: Machine) -> Iterator[dict[str, str]]:
    """Hold what a stage takes of this machine while it runs: memory, cores, then GPUs, each when all of it is free.

    A stage that waits for a GPU holds no other one: several are taken together or not at all.

    Args:
        needs: what the stage takes.
        machine: what there is.

    Yields:
        Environment variables for the stage: the GPUs and cores that it may use.
    """
    given = {limits.CORES_VARIABLE: str(needs.cores)} if needs.cores and needs.origins["cores"] != PLAN else {}
    # Kubernetes gives each pod devices of its own.
    if not has_server() or "KUBERNETES_SERVICE_HOST" in os.environ:
        yield given
        return
    node = platform.node()
    with contextlib.ExitStack() as stack:
        if needs.memory_gb:
            limit = _limit(f"graftline-memory-{node}", max(1, int(machine.memory_gb)))
            stack.enter_context(_slots([limit], math.ceil(needs.memory_gb)))
        if needs.cores:
            limit = _limit(f"graftline-cores-{node}", machine.cores)
            stack.enter_context(_slots([limit], needs.cores))
        gpus = _enter_free_gpus(stack, machine.gpus, needs.gpus) if needs.gpus else []
        yield given | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if machine.gpus else given


def _enter_free_gpus(stack: contextlib.ExitStack, gpus: Sequence[str], count: int) -> list[str]:
    """Hold so many of these GPUs, whichever are free at the same time."""
    if len(gpus) == count:  # There is nothing to choose.
        stack.enter_context(_slots([_gpu_limit(gpu) for gpu in gpus], 1))
        return list(gpus)
    while True:
        limits_of = {gpu: _gpu_limit(gpu) for gpu in gpus}
        free = [gpu for gpu, limit in limits_of.items() if limit.active_slots < limit.limit][:count]
        if len(free) == count:
            with contextlib.suppress(TimeoutError):  # Another stage was first.
                stack.enter_context(_slots([limits_of[gpu] for gpu in free], 1, timeout_seconds=TRY_SECONDS))
                return free
        time.sleep(LOOK_SECONDS)


def _gpu_limit(gpu: str) -> GlobalConcurrencyLimitResponse:
    # Only NVIDIA's own identities (GPU-…, MIG-…) are another's on no other machine; every machine has a GPU 0.
    is_unique = gpu.startswith(("GPU-", "MIG-"))
    return _limit(f"graftline-{gpu}" if is_unique else f"graftline-{platform.node()}-GPU-{gpu}", 1)


def _slots(
    held: Sequence[GlobalConcurrencyLimitResponse], count: int, *, timeout_seconds: float | None = None
) -> contextlib.AbstractContextManager[None]:
    """Hold ``count`` slots of each of these limits, all at once."""
    # A server that is away for minutes must not stop a training: what it would write twice is guarded by the lock.
    return concurrency(
        [limit.name for limit in held],
        # All slots of a limit that somebody made smaller.
        occupy=max(1, min([count, *(limit.limit for limit in held)])),
        timeout_seconds=timeout_seconds,
        lease_duration=LEASE_SECONDS,
        strict=True,
        raise_on_lease_renewal_failure=False,
    )


def _limit(name: str, slots: int) -> GlobalConcurrencyLimitResponse:
    """The limit as it is now; made unless it is there, and one that somebody changed stays as it is."""
    with get_client(sync_client=True) as client:
        try:
            return client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            with contextlib.suppress(ObjectAlreadyExists):  # Another run was first.
                client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=slots))
        return client.read_global_concurrency_limit_by_name(name)


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
