"""Fetches what an address names into the cache, once and verified."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from graftline.address import Source
from graftline.data.sources import cache, packages
from graftline.data.sources.cache import Cache, CacheEntry, Downloaded, digest_of, disk_errors_explained, place_of
from graftline.data.sources.packages import extract_member
from graftline.digest import Digest, of_json
from graftline.errors import GraftlineError, SourceError
from graftline.logs import OnProgress, silent

if TYPE_CHECKING:
    from graftline.data.sources.remote import Version

Downloader = Callable[[Source, Path, OnProgress], Downloaded]
_OBJECTS = ("s3", "https")
"""Kinds whose servers report changes by ETag."""
_LOOKS = 3
"""How often to try a path that changes while it is copied before raising an error."""


_READS = 2
"""How often to read an object that changes meanwhile before raising an error."""


class _ChangedError(SourceError):
    """A source does not have the expected digest."""


@dataclass(frozen=True)
class Found:
    """A source's current content: its digest, and the server's identifiers for it (ETag, version), if any."""

    digest: Digest
    version: dict[str, str] = field(default_factory=dict)


def fetch(
    source: Source, *, sha256: str | None, cache: Path, root: Path = Path(), on_progress: OnProgress = silent
) -> Path:
    """Fetch the file or folder that an address names into the cache; returns its path there.

    The second call for the same content needs no network: size and number of files are compared with the record that
    was made when every byte was hashed.

    Args:
        source: a parsed address.
        sha256: 64 hex digits of the download (of the archive, for a member); None takes the current content. For an S3
            object in a versioned bucket, ``source.version`` names the version with this digest.
        cache: cache folder, see `default_cache`.
        root: base folder of relative ``path:`` addresses.
        on_progress: called with bytes done and in total.

    Raises:
        SourceUnavailableError: no response; a later attempt may succeed.
        SourceError: wrong digest (both named), no such member (closest named), refused, or a disk error.
    """
    store = Cache(cache)
    with disk_errors_explained(store.folder):
        entry = _obtain(store, source, sha256, root=root, on_progress=on_progress)
        if source.member:
            entry = _member(store, entry, source.member, on_progress)
    return entry.path


def resolve(source: Source, *, cache: Path, root: Path = Path(), on_progress: OnProgress = silent) -> Digest:
    """The current digest of a source; pass it to `fetch` as ``sha256`` to get the same content again.

    A folder's digest is that of the canonical JSON of its files' digests by path. Arguments and errors as in `fetch`.
    """
    return look(source, cache=cache, root=root, on_progress=on_progress).digest


def look(
    source: Source, *, cache: Path, root: Path = Path(), etag: str | None = None, on_progress: OnProgress = silent
) -> Found:
    """The current content of a source. An object with the same ETag as at the last look is not downloaded again.

    Args:
        source: a parsed address.
        cache: cache folder, see `default_cache`.
        root: base folder of relative ``path:`` addresses.
        etag: the object's ETag from a fresh listing; if omitted, the server is asked.
        on_progress: called with bytes done and in total.

    Raises:
        SourceUnavailableError: no response; a later attempt may succeed.
        SourceError: it does not exist, cannot be read, or changes each time it is read.
    """
    store = Cache(cache)
    with disk_errors_explained(store.folder):
        if source.kind in _OBJECTS:
            entry, version = _object_now(store, source, etag, on_progress)
            return Found(entry.digest, version)
        return Found(_obtain(store, source, None, root=root, on_progress=on_progress).digest)


def known_digest(source: Source, *, sha256: str | None, cache: Path) -> Digest | None:
    """The digest of what `fetch` would bring, where that is certain without asking anybody; None where it is not."""
    if sha256:
        return Digest.parse(f"sha256:{sha256}")
    return Cache(cache).recall(_pin_name(source)) if source.is_pinned else None


def at_hand(source: Source, *, sha256: str | None, cache: Path, root: Path) -> Path | None:
    """Where the file or folder of an address is on this machine; None if it is not, or may have moved.

    Nothing is copied: a ``path:`` address is the place itself.

    Raises:
        SourceError: a ``path:`` address names something else than ``sha256``.
    """
    if source.kind == "path":
        place = place_of(source, root)
        if not place.exists():
            return None
        if sha256 and (found := digest_of(place)).hex != sha256:
            raise SourceError(f"{source.masked} has digest {found}; expected sha256:{sha256}")
        return place
    store, expected = Cache(cache), known_digest(source, sha256=sha256, cache=cache)
    entry = store.find(_key(expected, source)) if expected else None
    if entry and source.member:
        entry = store.find(_member_key(entry, source.member))
    return entry.path if entry else None


def _obtain(store: Cache, source: Source, sha256: str | None, *, root: Path, on_progress: OnProgress) -> CacheEntry:
    """The entry of the download; for a package, its archive."""
    expected = Digest.parse(f"sha256:{sha256}") if sha256 else None
    if expected is None and source.kind == "path":
        return _snapshot(store, source, root, on_progress)
    if expected is None and source.kind in _OBJECTS:
        return _object_now(store, source, None, on_progress)[0]
    if expected is None:
        source, expected = _look_up(store, source)
    entry = store.find(_key(expected, source)) if expected else None
    try:
        entry = entry or _download(store, source, expected, root, on_progress)
    except _ChangedError as error:
        raise SourceError(
            f"{error}; where `sha256` is set, find out why before changing it; where it is not, the source has moved "
            "since this run looked at it: run again"
            if sha256
            else f"{error}, which it had when it was fetched before; an address that names a version must not change: "
            "find out why, and pin what is right with `sha256`"
        ) from error
    if source.is_pinned:
        store.remember(_pin_name(source), entry.digest)
    return entry


def _snapshot(store: Cache, source: Source, root: Path, on_progress: OnProgress) -> CacheEntry:
    """A consistent copy of a path without a given digest: the copy has the digest that the path had before.

    Raises:
        SourceError: the path changes each time it is read.
    """
    path = cache.find(source, root)
    for _look in range(_LOOKS):
        before = cache.stamps(path)
        try:
            expected = cache.digest_of(path)
            return store.find(_key(expected, source)) or _download(store, source, expected, root, on_progress)
        except _ChangedError:
            continue
        except SourceError:
            if cache.stamps(path) == before:
                raise
    raise SourceError(
        f"{source.masked}: {path} changed each of the {_LOOKS} times that it was read: something writes to it; wait "
        "until that is done, or let it write under another name and rename at the end"
    )


def _object_now(
    store: Cache, source: Source, listed: str | None, on_progress: OnProgress
) -> tuple[CacheEntry, dict[str, str]]:
    """The current object and the server's identifiers for it; an unchanged object is not downloaded again.

    The server is asked again after each read. An object that has changed by then is read once more; it must then be
    unchanged, or have given the same bytes twice.

    Raises:
        SourceError: the object keeps changing.
    """
    from graftline.data.sources import remote  # httpx, boto3 and huggingface_hub take a second to import

    name = _pin_name(source)
    key = f"moving-{of_json(name).hex}"

    def take(body: remote.Body) -> tuple[CacheEntry, remote.Version]:
        def fill(folder: Path) -> Downloaded:
            return remote.save_body(source, body, folder, on_progress)

        return store.put(key, fill, publish_as=lambda digest: _key(digest, source)), body.version

    with store.lock(key):
        held, last = _last_look(store, source)
        if held and listed and listed == last.get("etag"):
            return held, last
        read: set[Digest] = set()
        for _ in range(_READS):
            arrived = remote.ask(source, take, unless=last.get("etag") if held else None)
            if arrived is None:
                assert held is not None  # a condition is only given with a held entry
                return held, last
            entry, version = arrived
            if entry.digest in read or _is_still(source, version):
                store.note_look(name, {"sha256": entry.digest.hex, "version": version.names()})
                return entry, version.names()
            read.add(entry.digest)
            held = None
    raise SourceError(
        f"{source.masked} changed each of the {_READS} times that it was read: something writes to it; wait until that "
        "is done, or let it write under another name and copy it here at the end"
    )


def _last_look(store: Cache, source: Source) -> tuple[CacheEntry | None, dict[str, str]]:
    """The cached object of the last look and the server's identifiers for it, if its ETag is strong."""
    seen = store.last_look(_pin_name(source))
    try:
        held = store.find(_key(Digest.parse(f"sha256:{seen['sha256']}"), source))
        version: dict[str, str] = dict(seen["version"])
        is_told = not version["etag"].startswith("W/")
    except (KeyError, TypeError, ValueError, AttributeError, GraftlineError):
        return None, {}
    return (held, version) if held and is_told else (None, {})


def _is_still(source: Source, version: "Version") -> bool:
    """Whether the server still has the version that was read."""
    from graftline.data.sources import remote

    again = remote.ask(source, lambda body: body.version, unless=version.strong_etag)
    return again is None or again == version


def _look_up(store: Cache, source: Source) -> tuple[Source, Digest | None]:
    """Pin a source without a digest before it is downloaded, and recall its recorded digest."""
    if source.kind == "hf" and not source.is_pinned:
        from graftline.data.sources import remote  # takes a second to import

        source = remote.pin_snapshot(source)
    return source, store.recall(_pin_name(source)) if source.is_pinned else None


def _download(store: Cache, source: Source, expected: Digest | None, root: Path, on_progress: OnProgress) -> CacheEntry:
    key = _key(expected, source) if expected else f"moving-{of_json(_pin_name(source)).hex}"
    download = _downloader(source, root)

    def fill(folder: Path) -> Downloaded:
        arrived = download(source, folder, on_progress)
        if expected and arrived.digest != expected:
            raise _ChangedError(f"{source.masked} has digest {arrived.digest}; expected {expected}")
        return arrived

    with store.lock(key):
        # Another process may have been first.
        return store.find(key) or store.put(key, fill, publish_as=lambda digest: _key(digest, source))


def _member(store: Cache, archive: CacheEntry, member: str, on_progress: OnProgress) -> CacheEntry:
    key = _member_key(archive, member)

    def fill(folder: Path) -> Downloaded:
        return extract_member(archive.path, member, folder, on_progress)

    found = store.find(key)
    if found:
        return found
    with store.lock(key):
        return store.find(key) or store.put(key, fill, publish_as=lambda _digest: key)


def _member_key(archive: CacheEntry, member: str) -> str:
    return f"member-{of_json([archive.digest.hex, member]).hex}"


def _key(digest: Digest, source: Source) -> str:
    """Digest and file suffix: row readers choose the format by suffix, so equal bytes may be needed twice."""
    if source.kind not in ("path", "https", "s3"):
        return digest.hex
    suffix = PurePosixPath(urlsplit(source.name).path if source.kind == "https" else source.name).suffix
    return digest.hex + (suffix.lower() if suffix.isascii() and suffix[1:].isalnum() else "")


def _pin_name(source: Source) -> str:
    return f"{source.kind} {source.name} {source.version}"


def _downloader(source: Source, root: Path) -> Downloader:
    if source.kind == "path":
        return lambda source, folder, on_progress: cache.copy(cache.find(source, root), folder, on_progress)
    if source.kind in ("npm", "pypi"):
        return packages.download_npm if source.kind == "npm" else packages.download_pypi
    from graftline.data.sources import remote  # httpx, boto3 and huggingface_hub take a second to import

    return remote.download_snapshot if source.kind == "hf" else remote.download
