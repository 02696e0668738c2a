"""What this machine offers a training line, what is missing, and what to do about it."""

from pathlib import Path

from graftline.doctor import channels, machine, prefect_server, project, services, surroundings
from graftline.doctor.finding import Finding, render

__all__ = ["Finding", "examine", "render"]


def examine(root: Path) -> list[Finding]:
    """Look at the machine, at the project in ``root`` and at what they talk to; nothing is changed."""
    return [
        *machine.look(root),
        *surroundings.look(root),
        services.remote(root),
        prefect_server.look(),
        *services.proxy(),
        services.keys(root),
        services.signing_key(),
        *project.look(root),
        *channels.look(root),
    ]
