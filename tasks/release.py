"""Stage release: the package in the release store, every file verified there, the manifest last.

Writes ``release.json`` (version, location, digest). To publish twice is no error: the second call finds everything.
A package that does not say what was scored, or holds something else, is refused.
"""

from graftline.digest import write_json
from graftline.errors import ReleaseError
from graftline.progress import Reporter
from graftline.registry.binding import check_binding
from graftline.registry.named import note_latest
from graftline.registry.releases import publish
from graftline.registry.store import open_store
from graftline.release.manifest import read_manifest
from graftline.workflow import resolve, stage
from graftline.workflow.stage import Context


def run(context: Context) -> None:
    """Publish the package, if its verdict is `pass`."""
    package = context.folder("package")
    manifest = read_manifest(package)
    if manifest.verdict.outcome != "pass":
        raise ReleaseError(
            f"the gates' verdict on {context.name} is {manifest.verdict.outcome}, expected pass; see "
            f"{package / 'report.html'}"
        )
    if manifest.judged is None:
        raise ReleaseError(
            f"{package} does not say which bytes were scored: an earlier version made it; package again: "
            f"dvc repro --force --single-item package@{context.name}"
        )
    check_binding(manifest, lambda path: (package / path).read_bytes())
    store = open_store(resolve.store_url(context))
    manifest = publish(store, package, on_progress=Reporter("publish", "bytes"))
    note_latest(store, context.name, manifest.version)
    location = resolve.location(context, manifest.version)
    record = {"version": manifest.version, "location": location, "digest": str(manifest.digest)}
    write_json(context.folder("release") / "release.json", record)
    stage.logger.info("release %s in %s", manifest.version, location)


def main() -> None:
    """Command line."""
    stage.main("release", run, measure=False)


if __name__ == "__main__":
    main()
