"""Releases in a store: written once, the manifest last, so that a release exists only when it is complete.

```
releases/<pipeline>/<version>/…files…  model.sig  manifest.json
```

```python
manifest = publish(store, package)                         # resumes where an interrupted call stopped
manifest = fetch(store, "demo", manifest.version, folder)  # every byte hashed as it arrives
```
"""

from collections.abc import Callable
from datetime import datetime
from itertools import accumulate
from pathlib import Path

from graftline.digest import of_file
from graftline.errors import ReleaseError, StoreError
from graftline.logs import OnProgress, silent
from graftline.registry.binding import check_binding
from graftline.registry.copies import CopyContents, bring
from graftline.registry.keys import KeyRing
from graftline.registry.leases import holding
from graftline.registry.objects import check_name, checksum_of, checksum_of_parts, is_name, reading
from graftline.registry.store import Store
from graftline.release.manifest import MANIFEST_NAME, SIGNATURE_NAME, FileEntry, Manifest, list_files, read_manifest

_TRIES = 3  # for bytes that change in transit to or from a store that does not notice


def release_key(pipeline: str, version: str, name: str = "") -> str:
    """Key of a release's folder, or of a file in it."""
    folder = f"releases/{check_name('pipeline', pipeline)}/{check_name('version', version)}"
    return f"{folder}/{name}" if name else folder


def publish(store: Store, package: Path, *, on_progress: OnProgress = silent) -> Manifest:
    """Put a package folder with its manifest, and its signature if it has one, into the store; returns the manifest.

    Files that the store holds already are skipped, so a second call finishes what an interrupted one began. The
    manifest is written only after the store has confirmed the size and checksum of every file.

    Raises:
        ReleaseError: the folder is not what its manifest says.
        ConflictError: somebody is cleaning this release away.
        StoreError: the store refused or damaged something; no manifest was written.
    """
    manifest = read_manifest(package)
    _check_names(package, manifest)
    with reading(package):
        last = [_entry_of(package, name) for name in (SIGNATURE_NAME, MANIFEST_NAME) if (package / name).is_file()]
    done = 0
    with holding(store, manifest.pipeline, manifest.version, doing="publish") as claim:
        for entry in [*manifest.files, *last]:
            claim.check()
            key = release_key(manifest.pipeline, manifest.version, entry.path)
            _put(store, key, package / entry.path, entry, on_progress=_shifted(on_progress, done, manifest.num_bytes))
            done += entry.num_bytes
    return manifest


def list_versions(store: Store, pipeline: str) -> list[str]:
    """Versions of a pipeline that exist (have a manifest), oldest first."""
    folder = f"releases/{check_name('pipeline', pipeline)}"
    parts = [key.removeprefix(f"{folder}/").split("/") for key in store.list(folder)]
    return sorted(version for version, *rest in parts if rest == [MANIFEST_NAME] and is_name(version))


def load_manifest(store: Store, pipeline: str, version: str) -> Manifest:
    """Read the manifest of a release.

    Raises:
        ReleaseError: there is no such release, or the manifest is damaged or belongs to another.
    """
    key = release_key(pipeline, version, MANIFEST_NAME)
    if (data := store.get(key)) is None:
        known = ", ".join(list_versions(store, pipeline)[-3:]) or "none"
        raise ReleaseError(f"{store.url} has no release {version!r} of {pipeline!r}; the newest there: {known}")
    try:
        manifest = Manifest.parse(data)
    except ReleaseError as error:
        raise ReleaseError(f"{store.url}/{key}: {error}") from error
    if (manifest.pipeline, manifest.version) != (pipeline, version):
        raise ReleaseError(
            f"{store.url}: the manifest under {pipeline}/{version} is that of {manifest.pipeline}/{manifest.version}: "
            "it was changed or moved, do not use this release"
        )
    return manifest


def fetch(store: Store, pipeline: str, version: str, folder: Path, *, on_progress: OnProgress = silent) -> Manifest:
    """Get a release into a folder, which appears when it is complete and verified.

    An existing copy is verified, repaired where it is damaged, and given the store's present signature. Several
    processes may fetch into one folder at once.

    Raises:
        ReleaseError: no such release, a file is missing or damaged in the store, or the folder holds something else.
        StoreError: the store cannot be read, or the folder cannot be written.
    """
    manifest, release = load_manifest(store, pipeline, version), release_key(pipeline, version)
    ends = accumulate(entry.num_bytes for entry in manifest.files)
    starts = {entry.path: end - entry.num_bytes for entry, end in zip(manifest.files, ends, strict=True)}

    def get(entry: FileEntry, path: Path) -> None:
        progress = _shifted(on_progress, starts[entry.path], manifest.num_bytes)
        _fetch_file(store, f"{release}/{entry.path}", path, entry, on_progress=progress)

    bring(folder, CopyContents(manifest, store.get(f"{release}/{SIGNATURE_NAME}"), get))
    on_progress(manifest.num_bytes, manifest.num_bytes)
    return manifest


def verify(store: Store, pipeline: str, version: str, *, on_progress: OnProgress = silent) -> Manifest:
    """Compare every byte of a release in the store with the manifest, and the release with its verdict.

    Raises:
        ReleaseError: lists the files that are missing, extra or changed, or not what was judged.
    """
    manifest = load_manifest(store, pipeline, version)
    folder = release_key(pipeline, version)
    present = {key.removeprefix(f"{folder}/") for key in store.list(folder)} - {MANIFEST_NAME, SIGNATURE_NAME}
    problems = [f"not in the manifest: {path}" for path in sorted(present - {entry.path for entry in manifest.files})]
    done = 0
    for entry in manifest.files:
        key = release_key(pipeline, version, entry.path)
        if entry.path not in present:
            problems.append(f"missing: {entry.path}")
        elif all(store.read_digest(key) != entry.digest for _ in range(_TRIES)):
            problems.append(f"changed: {entry.path}")
        done += entry.num_bytes
        on_progress(done, manifest.num_bytes)
    _refuse_damaged(store, folder, problems)
    check_binding(manifest, lambda path: store.get(f"{folder}/{path}") or b"")
    return manifest


def is_whole(store: Store, pipeline: str, version: str) -> bool:
    """Whether the store holds a release's manifest and every file that it names; files are not read."""
    if store.head(release_key(pipeline, version, MANIFEST_NAME)) is None:
        return False
    manifest, folder = load_manifest(store, pipeline, version), release_key(pipeline, version)
    return {f"{folder}/{entry.path}" for entry in manifest.files} <= set(store.list(folder))


def verify_stored(
    store: Store, pipeline: str, version: str, keys: KeyRing | None, *, now: datetime, copy: Path | None = None
) -> Manifest:
    """Refuse what a server that fetches this release now would refuse; returns the manifest.

    The store itself is asked for each file's size and checksum; where it gives no checksum that can be compared, the
    file's bytes are read.

    Args:
        store: where the release is.
        pipeline: its pipeline.
        version: its version.
        keys: whose signatures count; None: signatures are not checked, as on a server without a key file.
        now: keys that have expired by then do not count.
        copy: a folder that may hold a copy. From it the checksum that S3 keeps of a file in parts can be computed,
            which saves reading large objects back.

    Raises:
        ReleaseError: no such release, a file is missing or damaged, or no builder's signature.
        StoreError: the store cannot be read.
    """
    manifest, folder = load_manifest(store, pipeline, version), release_key(pipeline, version)
    if keys is not None:
        signer(store, manifest, keys, now=now)
    problems = []
    for entry in manifest.files:
        path = copy / entry.path if copy else None
        if not _holds(store, f"{folder}/{entry.path}", entry, path):
            there = store.head(f"{folder}/{entry.path}") is not None
            problems.append(f"{'changed' if there else 'missing'}: {entry.path}")
    _refuse_damaged(store, folder, problems)
    return manifest


def _refuse_damaged(store: Store, folder: str, problems: list[str]) -> None:
    if problems:
        raise ReleaseError(f"{store.url}/{folder} is damaged: {'; '.join(problems[:10])}; do not use this release")


def signer(store: Store, manifest: Manifest, keys: KeyRing, *, now: datetime) -> str:
    """Check the signature that the store holds of a release; returns the name of the key that made it.

    Raises:
        ReleaseError: there is none, or it was made with another key than a present builder's, or for other files.
    """
    folder = release_key(manifest.pipeline, manifest.version)
    signature = store.get(f"{folder}/{SIGNATURE_NAME}")
    if signature is None:
        raise ReleaseError(
            f"{store.url}/{folder} has no {SIGNATURE_NAME}: it was never signed, or the signature was lost; sign the "
            "package with `graftline package` and a key, then release it again"
        )
    digests = {entry.path: entry.digest for entry in manifest.files} | {MANIFEST_NAME: manifest.digest}
    return keys.verify_digests(digests, signature, origin=f"{store.url}/{folder}", now=now)


def remove(store: Store, pipeline: str, version: str, *, before_each: Callable[[], None] = lambda: None) -> None:
    """Remove a release, its manifest first, so that nobody sees a partial one; ``before_each`` removal may raise."""
    folder = release_key(pipeline, version)
    for key in [f"{folder}/{MANIFEST_NAME}", *store.list(folder)]:
        before_each()
        store.delete(key)


def _check_names(package: Path, manifest: Manifest) -> None:
    """Compare the names of the folder's files with the manifest's; their bytes are compared when they are stored."""
    present, listed = set(list_files(package)), {entry.path for entry in manifest.files}
    if present != listed:
        raise ReleaseError(
            f"{package}: missing {sorted(listed - present)}, not in the manifest {sorted(present - listed)}; "
            "run `graftline package` again"
        )


def _holds(store: Store, key: str, entry: FileEntry, path: Path | None) -> bool:
    """Whether the store holds the file, by size and checksum.

    Its bytes are read back where the store gives no checksum, or one over parts and ``path`` is not the same file.
    """
    stored = store.head(key)
    if stored is None or stored.num_bytes != entry.num_bytes:
        return False
    if stored.checksum is not None:
        if "-" not in stored.checksum:
            return stored.checksum == checksum_of(entry.digest)
        # Another tool may have used other part sizes, so unequal checksums prove nothing.
        if path and stored.checksum == _checksum_of_copy(path, entry):
            return True
    # More than once, because bytes may also change in transit.
    return any(store.read_digest(key) == entry.digest for _ in range(_TRIES))


def _checksum_of_copy(path: Path, entry: FileEntry) -> str | None:
    """The checksum that a file uploaded in parts must have, from a local copy of it, if there is an equal one."""
    return checksum_of_parts(path) if path.is_file() and of_file(path) == entry.digest else None


def _put(store: Store, key: str, path: Path, entry: FileEntry, *, on_progress: OnProgress) -> None:
    """Write a file until the store is seen to hold it; other bytes under its key are damage and are replaced."""
    for _ in range(_TRIES):
        if _holds(store, key, entry, path):
            on_progress(entry.num_bytes, entry.num_bytes)
            return
        store.put_file(key, path, digest=entry.digest, on_progress=on_progress)
    if not _holds(store, key, entry, path):
        raise StoreError(f"{store.url}/{key}: the store does not hold what was written; run the same command again")


def _entry_of(folder: Path, name: str) -> FileEntry:
    """A manifest entry for a file that the manifest does not list."""
    return FileEntry(path=name, num_bytes=(folder / name).stat().st_size, digest=of_file(folder / name))


def _shifted(on_progress: OnProgress, done: int, total: int) -> OnProgress:
    """The progress of one file as progress of the whole release."""
    return lambda part, _: on_progress(min(done + part, total), total)


def _fetch_file(store: Store, key: str, path: Path, entry: FileEntry, *, on_progress: OnProgress) -> None:
    for _ in range(_TRIES):
        found = store.get_file(key, path, on_progress=on_progress)
        if found == entry.digest:
            return
        path.unlink(missing_ok=True)
    raise ReleaseError(f"{store.url}/{key} has digest {found}, expected {entry.digest}; do not use this release")
