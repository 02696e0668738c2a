"""Lists the files that one address of rows names: a folder's, or those that match a pattern, local or in S3.

``*`` and ``?`` match within one name, ``[…]`` one of several characters, ``**`` any number of folders; names that start
with a dot only match patterns that start with one. If a file with exactly this address exists, the address is not a
pattern. Files are sorted by name, whatever the order of the file system or the store.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from graftline.address import Source
from graftline.data.sources.cache import find, place_of
from graftline.errors import SourceError

ROW_SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")
_WILD = "*?["
_FOLDERS = "**"


@dataclass(frozen=True)
class NamedFile:
    """A listed file: its address, and the ETag if the listing gave one."""

    source: Source
    etag: str | None = None


def list_files(source: Source, root: Path) -> tuple[NamedFile, ...] | None:
    """The files that an address names, sorted; None if it names one file, or if its kind has no patterns.

    Args:
        source: a parsed address.
        root: base folder of relative ``path:`` addresses.

    Raises:
        SourceError: nothing matches, a folder cannot be read, or the store cannot be listed.
    """
    if source.kind == "path":
        try:
            found = _local(source, root)
        except OSError as error:
            reason = error.strerror or error
            raise SourceError(f"cannot look for {source}: {reason}; check the path and its folders' owners") from error
    elif source.kind == "s3":
        found = _objects(source)
    else:
        return None
    if found is not None and not found:
        looked = "holds no file of rows" if not is_wild(source.name) else "matches no file"
        raise SourceError(
            f"{source.masked} {looked}; a folder's rows are in its {', '.join(ROW_SUFFIXES)} files, a pattern has * "
            "inside a name and ** for folders: check the address"
        )
    return found


def is_wild(name: str) -> bool:
    """Whether a name is a pattern."""
    return any(sign in name for sign in _WILD)


def local_part(source: Source) -> str:
    """The file or folder of a ``path:`` address; for a pattern, the folders before its first wildcard."""
    return (_fixed_part(source.name)[0] or ".") if is_wild(source.name) else source.name


def _fixed_part(name: str) -> tuple[str, list[str]]:
    """``a/b/c*/d`` -> ``a/b/`` and ``[c*, d]``: the part before the first name with a wildcard, and the rest."""
    pieces = name.split("/")
    first = next(at for at, piece in enumerate(pieces) if is_wild(piece))
    return "".join(f"{piece}/" for piece in pieces[:first]), [piece for piece in pieces[first:] if piece]


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not names
    if pattern[0] == _FOLDERS:
        inside = bool(names) and not names[0].startswith(".") and _matches(names[1:], pattern)
        return inside or _matches(names, pattern[1:])
    hidden = bool(names) and names[0].startswith(".") and not pattern[0].startswith(".")
    return bool(names) and not hidden and fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


def is_row_file(names: Sequence[str]) -> bool:
    """Whether a folder's file holds rows: not hidden files, nor the markers that Spark and similar tools leave."""
    is_marker = any(name.startswith((".", "_")) for name in names)
    return not is_marker and PurePosixPath(names[-1]).suffix.lower() in ROW_SUFFIXES


def _sorted(files: Iterable[NamedFile]) -> tuple[NamedFile, ...]:
    return tuple(sorted(files, key=lambda file: file.source.name))


# Local files.


def _local(source: Source, root: Path) -> tuple[NamedFile, ...] | None:
    # A file name may contain wildcards: `rows[1].jsonl`.
    place = place_of(source, root)
    if place.is_dir():
        prefix, pattern = f"{source.name.rstrip('/')}/", None
    elif place.exists() or not is_wild(source.name):
        return None
    else:
        prefix, pattern = _fixed_part(source.name)
    folder = find(Source("path", prefix or "."), root)
    deepest = None if pattern is None or _FOLDERS in pattern else len(pattern)
    named = (path.relative_to(folder).parts for path in _walk(folder, deepest, frozenset({folder.resolve()})))
    chosen = (names for names in named if (is_row_file(names) if pattern is None else _matches(names, pattern)))
    return _sorted(NamedFile(Source("path", prefix + "/".join(names))) for names in chosen)


def _walk(folder: Path, deepest: int | None, above: frozenset[Path]) -> Iterator[Path]:
    """Every file below a folder, following links but not cycles; a broken link counts as a file."""
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise SourceError(f"cannot read the folder {folder}: {error.strerror or error}; check its owner") from error
    for path in inside:
        if not path.is_dir():
            yield path
        elif (deepest is None or deepest > 1) and (real := path.resolve()) not in above:
            yield from _walk(path, deepest and deepest - 1, above | {real})


# Objects in a bucket.


def _objects(source: Source) -> tuple[NamedFile, ...] | None:
    bucket, _, key = source.name.removeprefix("s3://").partition("/")
    if key.endswith("/") and not is_wild(key):
        prefix, pattern = key, None
    elif is_wild(key):
        prefix, pattern = _fixed_part(key)
    else:
        return None
    from graftline.data.sources import remote  # takes a second to import

    literal = key[: next((at for at, sign in enumerate(key) if sign in _WILD), len(key))]
    listed = remote.list_objects(source, bucket, literal)
    if key in listed and pattern is not None:
        return None
    chosen = []
    for name, etag in listed.items():
        names = name.removeprefix(prefix).split("/")
        # Keys that end in a slash are empty folder markers.
        if names[-1] and (is_row_file(names) if pattern is None else _matches(names, pattern)):
            chosen.append(NamedFile(Source("s3", f"s3://{bucket}/{name}"), etag))
    return _sorted(chosen)
