"""Stage release: the package in the release store, every file verified there, the manifest last.

Writes ``release.json`` (version, location, digest). To publish twice is no error: the second call finds everything.
"""

from graftline.digest import write_json
from graftline.errors import ReleaseError
from graftline.progress import Reporter
from graftline.registry.releases import publish, release_key
from graftline.registry.store import open_store
from graftline.release.manifest import read_manifest
from tasks import resolve, stage
from tasks.stage import Context


def run(context: Context) -> None:
    """Publish the package, if its verdict is `pass`."""
    package = context.folder("package")
    verdict = read_manifest(package).verdict
    if verdict.outcome != "pass":
        raise ReleaseError(
            f"the gates' verdict on {context.name} is {verdict.outcome}, expected pass; see {package / 'report.html'}"
        )
    store = open_store(resolve.store_url(context))
    manifest = publish(store, package, on_progress=Reporter("publish", "bytes"))
    location = f"{context.pipeline.release.store}/{release_key(manifest.pipeline, manifest.version)}"
    write_json(
        context.folder("release") / "release.json",
        {"version": manifest.version, "location": location, "digest": str(manifest.digest)},
    )
    stage.logger.info("release %s in %s", manifest.version, location)


def main() -> None:
    """Command line."""
    stage.main("release", run, measure=False)


if __name__ == "__main__":
    main()
