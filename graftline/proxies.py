"""Proxies that the environment names: what talks to this machine itself never goes through one.

A run asks its own Prefect server, and often a store, at a loopback address. Most clients (httpx, urllib, botocore,
websockets) take a proxy for that too unless ``NO_PROXY`` says otherwise: minutes of silence, or events that are lost.
"""

from collections.abc import Mapping, MutableMapping

from graftline.address import mask_secrets

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_VARIABLES = ("http_proxy", "https_proxy", "all_proxy")
_SPARED = ("no_proxy", "NO_PROXY")  # The first wins where both are read.


def named(environment: Mapping[str, str]) -> dict[str, str]:
    """The proxies that an environment names, by variable, passwords masked; empty if none."""
    names = [variant for name in _VARIABLES for variant in (name, name.upper())]
    return {name: mask_secrets(environment[name]) for name in names if environment.get(name)}


def spared(environment: Mapping[str, str]) -> list[str]:
    """Hosts that are asked without a proxy."""
    given = next((environment[name] for name in _SPARED if environment.get(name)), "")
    return [host for host in map(str.strip, given.split(",")) if host]


def spare_loopback(environment: MutableMapping[str, str]) -> None:
    """Add this machine to the hosts that are asked without a proxy, for this process and those that it starts.

    The user's hosts stay. An environment that names no proxy stays as it is: the system's own settings hold there.
    """
    hosts = spared(environment)
    if not named(environment) or "*" in hosts:
        return
    wanted = ",".join([*hosts, *(host for host in LOOPBACK if host not in hosts)])
    for name in _SPARED:
        environment[name] = wanted
