"""What differs between two releases: files by digest, and everything they were made from."""

from collections.abc import Mapping
from dataclasses import dataclass

from graftline.release.manifest import Manifest


@dataclass(frozen=True)
class Diff:
    """From a first release to a second."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    origin: Mapping[str, tuple[str, str]]
    """Fields of lineage and verdict that differ: name, before, after."""


def diff(first: Manifest, second: Manifest) -> Diff:
    """Compare two releases by their manifests."""
    before = {entry.path: entry.digest for entry in first.files}
    after = {entry.path: entry.digest for entry in second.files}
    return Diff(
        added=tuple(sorted(after.keys() - before.keys())),
        removed=tuple(sorted(before.keys() - after.keys())),
        changed=tuple(path for path in sorted(before.keys() & after.keys()) if before[path] != after[path]),
        origin={
            name: (old, new)
            for (name, old), new in zip(_origin(first).items(), _origin(second).values(), strict=True)
            if old != new
        },
    )


def _origin(manifest: Manifest) -> dict[str, str]:
    parts = {"pipeline": manifest.pipeline, **dict(manifest.lineage), **_verdict_of(manifest)}
    return {name: "none" if value is None else str(value) for name, value in parts.items()}


def _verdict_of(manifest: Manifest) -> dict[str, object]:
    return {f"verdict_{name}": value for name, value in dict(manifest.verdict).items()}
