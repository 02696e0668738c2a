"""Checks of this machine and the project: what is missing for a training line, and what to do about it."""

from pathlib import Path

from graftline.doctor import gpus, machine, prefect_server, surroundings
from graftline.doctor.machine import Finding, render

__all__ = ["Finding", "examine", "render"]


def examine(root: Path) -> list[Finding]:
    """Check the machine, the project in ``root`` and the services that they use; nothing is changed."""
    from graftline.doctor import project  # its gates need scipy, which `graftline --help` must not wait for

    return [
        *machine.look_at_machine(root),
        *gpus.look_at_gpus(),
        *surroundings.look(root),
        machine.remote(root),
        prefect_server.look(),
        *machine.proxy(),
        machine.keys(root),
        machine.signing_key(),
        *project.look_at_project(root),
        *project.look_at_channels(root),
    ]
