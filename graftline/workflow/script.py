"""The files of a project's script: the script, the project's modules that it imports, and the files that it names.

Imports and file names that are computed at run time cannot be found.
"""

import ast
import contextlib
import os
import posixpath
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_FILE = re.compile(r"[^\n\0]+")
_MAX_LENGTH = 1024
_PARSING, _TRIES = threading.Lock(), 20
_LIBRARIES = ("graftline/", "tasks/", "flows/")
"""Strings in our modules do not name inputs of the script."""


def parts(script: str, *, is_file: Callable[[str], bool], read: Callable[[str], bytes]) -> list[str]:
    """Paths of a script's files, the script first, the others sorted.

    Args:
        script: a Python file's path below the project's root; like all paths here, with forward slashes.
        is_file: whether there is a file below the root.
        read: the bytes of such a file.
    """
    script = posixpath.normpath(script)
    found: set[str] = set()
    todo = [script]
    while todo:
        path = todo.pop()
        if path in found or path.startswith("../") or posixpath.isabs(path) or not is_file(path):
            continue
        found.add(path)
        if path.endswith(".py"):
            todo += _named(read(path), path, script)
    return [script, *sorted(found - {script})]


def parts_in(root: Path, script: str) -> list[str]:
    """`parts` of a script in the folder ``root``."""
    return parts(script, is_file=lambda path: is_file(root / path), read=lambda path: (root / path).read_bytes())


def is_file(path: Path) -> bool:
    """Whether the file exists; unlike `Path.is_file`, without an error if a long text is too long for a name."""
    return os.path.isfile(path)


def syntax_tree(code: bytes) -> ast.Module:
    """`ast.parse`, again where Python 3.11 is wrong about the depth of the tree (CPython 106905).

    It counts for all threads together: of ours one parses at a time, but Prefect's parse too.
    """
    with _PARSING:
        for _ in range(_TRIES):
            with contextlib.suppress(SystemError):
                return ast.parse(code)
        return ast.parse(code)


def _named(code: bytes, path: str, script: str) -> Iterator[str]:
    """Candidates for files that a module imports or names."""
    try:
        tree = syntax_tree(code)
    except (SyntaxError, ValueError):
        return
    folders = tuple(dict.fromkeys(["", posixpath.dirname(script), posixpath.dirname(path)]))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield from _modules(name.name, folders)
        elif isinstance(node, ast.ImportFrom):
            start = (posixpath.normpath(posixpath.join(path, *[".."] * node.level)),) if node.level else folders
            for name in node.names:
                yield from _modules(".".join(filter(None, [node.module, name.name])), start)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not path.startswith(_LIBRARIES):
            # f"{folder}/words.txt" holds "/words.txt"; import_module(".words", package) holds ".words".
            file, module = node.value.lstrip("/"), node.value.lstrip(".")
            if len(file) <= _MAX_LENGTH and _FILE.fullmatch(node.value):
                yield from (posixpath.normpath(posixpath.join(folder, file)) for folder in folders)
            if _MODULE.fullmatch(module):
                yield from _modules(module, folders)


def _modules(name: str, folders: tuple[str, ...]) -> Iterator[str]:
    """``a.b`` -> a.py, a/__init__.py, a/b.py, a/b/__init__.py below each folder, which an import may run."""
    pieces = name.split(".")
    for folder in folders:
        for length in range(1, len(pieces) + 1):
            place = posixpath.normpath(posixpath.join(folder, *pieces[:length]))
            yield from (f"{place}.py", f"{place}/__init__.py")
