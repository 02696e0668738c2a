"""The environment that a commit declares: its packages, which can change every number that a stage computes."""

import re
import tomllib
from collections.abc import Callable
from typing import Any

CONSTRAINTS, PROJECT = "constraints.txt", "pyproject.toml"
STAGES_NEED = ("flow", "s3", "serve")
"""Extras whose packages stages call: what they make can change with them."""
_NAME = re.compile(r"\s*([A-Za-z0-9][\w.-]*)")


def declared(read: Callable[[str], bytes | None]) -> dict[str, Any]:
    """Versions that a commit pins and packages that it asks for, by the file that says so.

    Packages that only an extra asks for that no stage needs (formatters, test tools) are left out; what those need in
    turn is not known to be theirs alone, and counts.

    Args:
        read: the bytes of a file of the commit; None if there is none.
    """
    found: dict[str, Any] = {}
    project = _project(read(PROJECT))
    extras = project.get("optional-dependencies", {})
    needed_lines = [*project.get("dependencies", []), *(line for name in STAGES_NEED for line in extras.get(name, []))]
    if project:
        found[PROJECT] = [project.get("requires-python"), *sorted(needed_lines)]
    if (pins := read(CONSTRAINTS)) is not None:
        extra = _names([line for lines in extras.values() for line in lines]) - _names(needed_lines)
        lines = [line.partition("#")[0].strip() for line in pins.decode("utf-8", "replace").splitlines()]
        found[CONSTRAINTS] = sorted(line for line in lines if line and not _names([line]) & extra)
    return found


def _project(text: bytes | None) -> dict[str, Any]:
    try:
        project = tomllib.loads((text or b"").decode("utf-8")).get("project", {})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        return {}
    return project if isinstance(project, dict) else {}


def _names(requirements: list[str]) -> set[str]:
    found = (_NAME.match(line) for line in requirements)
    return {re.sub(r"[-_.]+", "-", match[1]).lower() for match in found if match}
