"""Which paths a release may hold: the same file on every file system, and never one outside its folder."""

import unicodedata
from collections.abc import Iterable
from pathlib import Path

from graftline.errors import ReleaseError

MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "model.sig"
_NOT_LISTED = frozenset({MANIFEST_NAME, SIGNATURE_NAME})
_MAX_PATH_BYTES = 400  # leaves room for the store's prefix within S3's 1024


def check_path(path: str) -> str:
    """Return ``path`` if it is relative, POSIX, normalized and names a file that a manifest may list.

    Raises:
        ReleaseError: absolute, with ``..``, an empty or hidden component, a backslash, a colon, a control character, a
            trailing dot or space, not in Unicode's NFC form, too long, or a name that the release itself uses.
    """
    components = path.split("/")
    wrong = (
        any(_is_bad(component) for component in components)
        or path != unicodedata.normalize("NFC", path)
        or len(path.encode(errors="replace")) > _MAX_PATH_BYTES
        or path.casefold() in _NOT_LISTED
    )
    if wrong:
        raise ReleaseError(
            f"path {path!r} cannot be part of a release; expected a relative path with '/' whose components are "
            "not empty, hidden or '..', without backslash, colon or control character, and other than "
            f"{MANIFEST_NAME} and {SIGNATURE_NAME}"
        )
    return path


def _is_bad(component: str) -> bool:
    return (
        not component
        or component.startswith(".")
        or component.endswith((".", " "))
        or any(character in '\\:*?"<>|' for character in component)
        or not component.isprintable()
    )


def check_distinct(paths: Iterable[str]) -> None:
    """Check that no two paths are one file on a file system without case, and none is the folder of another.

    Raises:
        ReleaseError: names both paths.
    """
    seen: dict[str, str] = {}
    for path in paths:
        folded = path.casefold()
        if folded in seen:
            raise ReleaseError(
                f"paths {seen[folded]!r} and {path!r} are one file where case does not count; rename one of them"
            )
        seen[folded] = path
    for folded, path in seen.items():
        for parent in Path(folded).parents:
            if parent.as_posix() in seen:
                raise ReleaseError(
                    f"path {seen[parent.as_posix()]!r} is a file and the folder of {path!r}; rename one of them"
                )


def list_files(folder: Path) -> list[str]:
    """Paths of all files of a package folder that its manifest has to list, sorted.

    Raises:
        ReleaseError: not a folder, a symbolic link or a special file in it, or a path that `check_path` refuses.
    """
    if not folder.is_dir():
        raise ReleaseError(f"{folder} is not a folder; give the package folder that `graftline package` wrote")
    found: list[str] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ReleaseError(
                f"{path} is a link or a special file; a release holds plain files only, copy its target there"
            )
        if path.is_file() and name not in _NOT_LISTED:
            found.append(check_path(name))
    if not found:
        raise ReleaseError(f"{folder} holds no files; expected the package folder that `graftline package` wrote")
    check_distinct(found)
    return found
