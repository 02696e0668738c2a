"""A pipeline of a project on the disk, as the stages take it: ``stage.run(*opened)``."""

from pathlib import Path
from typing import NamedTuple

from graftline import settings
from graftline.workflow.workspace import Workspace


class Opened(NamedTuple):
    """Settings and places."""

    pipeline: settings.Pipeline
    at: Workspace


def open_pipeline(name: str, root: Path) -> Opened:
    """A pipeline of ``root``/pipelines.yaml as that file is now."""
    return Opened(settings.load(root / settings.DEFAULT_FILE).pipeline(name), Workspace(root, name))
