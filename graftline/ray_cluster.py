"""A connection to a Ray cluster: a running one, or one that is started on this machine and ends with the process.

Ray is an extra. Its version is checked before use, because its interfaces change between versions.
"""

import contextlib
import importlib.metadata
import logging
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from graftline import extras
from graftline.errors import ClusterError, ConfigError

_SUPPORTED = ((2, 60), (3, 0))
"""Supported versions: from the first one tested up to, but not including, the next that may break the interface."""
NAMESPACE = "graftline"
_OWN_OBJECT_BYTES = 100 << 20
_PASSED_ON = (
    "GRAFTLINE_",
    "HF_",
    "TRANSFORMERS_",
    "OMP_",
    "NCCL_",
    "GLOO_",
    "AWS_ENDPOINT",
    "AWS_DEFAULT_REGION",
    "AWS_REGION",
)
"""Prefixes of environment variables that are passed on to workers. No secrets: Ray shows them."""


@contextlib.contextmanager
def connected(address: str | None, *, processes: int) -> Iterator[ModuleType]:
    """Ray, connected to a cluster until the block ends.

    Args:
        address: the cluster's address, as ``ray.init`` takes it. None: the cluster in ``RAY_ADDRESS``, else a new one
            on this machine's loopback address that ends with this process.
        processes: concurrent workers of a cluster that is started here.

    Raises:
        ConfigError: Ray is not installed, or its version is not supported.
        ClusterError: the cluster cannot be reached, or has another version of Ray or Python.
    """
    is_own = address is None and not os.environ.get("RAY_ADDRESS")
    ray = _import(is_own=is_own)
    given: dict[str, Any] = {"address": address}
    if is_own:
        given = {
            "address": "local",
            "num_cpus": processes,
            "include_dashboard": False,
            "object_store_memory": _OWN_OBJECT_BYTES,
        }
    try:
        ray.init(
            **given,
            namespace=NAMESPACE,
            runtime_env={"env_vars": _passed_on()},
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:  # a plain Exception if a node's processes do not start within half a minute
        where = address or os.environ.get("RAY_ADDRESS") or "this machine"
        why = " ".join(str(error.__cause__ or error).split()).partition(" Note: ")[0]
        raise ClusterError(
            f"no Ray cluster could be used at {where}: {why.rstrip('.')}; check its address (auto on a node of a "
            "cluster, or HOST:PORT), that it runs, its token (RAY_AUTH_TOKEN, or the file ~/.ray/auth_token), and that "
            "it has the same Ray and Python"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _import(*, is_own: bool) -> ModuleType:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if is_own:
        # Ray reads this on import: a single-machine cluster then listens only on the loopback address.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # By default Ray's workers yield to every other process (nice 15), but this process waits for them.
        os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        found = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError as error:
        raise extras.MissingExtraError(
            f"the package ray is not installed; install what this needs: {extras.install_command('ray')}"
        ) from error
    first, beyond = _SUPPORTED
    if not first <= tuple(map(int, found.split(".")[:2])) < beyond:
        raise ConfigError(
            f"Ray {found} is installed, graftline works with {_dotted(first)} and newer, before {_dotted(beyond)}; "
            f"run: {extras.install_command('ray')}"
        )
    import ray

    return ray


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _passed_on() -> dict[str, str]:
    passed = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
    # Workers run the code of this checkout, whatever is installed there.
    passed["PYTHONPATH"] = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH", "")]))
    return passed
