"""Stage release: the package in the release store, every file verified there, the manifest last.

Writes ``release.json`` (version, location, digest). To publish twice is no error: the second call finds everything.
A package that does not say what was scored, or holds something else, is refused.
"""

from graftline.settings import Pipeline
from graftline.workflow import stage
from graftline.workflow.published import publish_package
from graftline.workflow.workspace import Workspace


def run(pipeline: Pipeline, at: Workspace) -> None:
    """Publish the package, if its verdict is `pass`."""
    publish_package(pipeline.release, at, package=at.folder("package"), out=at.folder("release"))


def main() -> None:
    """Command line."""
    stage.main("release", run, measure=False)


if __name__ == "__main__":
    main()
