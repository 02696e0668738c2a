"""The places of a pipeline's files: a folder for each stage's outputs, and the cache that all pipelines share."""

from dataclasses import dataclass
from pathlib import Path

from graftline import settings
from graftline.data.sources import default_cache


@dataclass(frozen=True)
class Workspace:
    """A pipeline's places in a project."""

    root: Path
    """The project's root, with pipelines.yaml."""
    name: str
    """The pipeline's name."""

    @property
    def runs(self) -> Path:
        """Outputs of this pipeline's stages."""
        return self.root / "runs" / self.name

    @property
    def cache(self) -> Path:
        """Fetched sources and converted bases, by content."""
        return default_cache(self.root)

    @property
    def encodings(self) -> Path:
        """Encoded rows, by content."""
        return self.cache / "encoded"

    def folder(self, stage: str) -> Path:
        """Outputs of one stage."""
        return self.runs / stage


def channel_of(pipeline: settings.Pipeline, root: Path) -> settings.Channel | None:
    """The channel that a pipeline releases into; None in a folder without pipelines.yaml."""
    file = root / settings.DEFAULT_FILE
    return settings.load(file).channels.get(pipeline.release.channel) if file.is_file() else None
