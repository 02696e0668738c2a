"""What a script of the project is made of: itself, the modules of the project that it imports, the files it names.

Imports that are computed and files whose names are put together at run time cannot be found by reading the script.
"""

import ast
import os
import posixpath
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_FILE = re.compile(r"[^\n\0]+")
_MAX_LENGTH = 1024
_PARSING = threading.Lock()
_LIBRARIES = ("graftline/", "tasks/", "flows/")
"""What our own modules name in strings is not the script's input."""


def parts(script: str, *, is_file: Callable[[str], bool], read: Callable[[str], bytes]) -> list[str]:
    """Paths of the files that a script is made of, the script first, the others sorted.

    Args:
        script: a Python file's path below the project's root, with forward slashes, as all paths here.
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
    """`parts` of a script as the folder ``root`` has it now."""
    return parts(script, is_file=lambda path: is_file(root / path), read=lambda path: (root / path).read_bytes())


def is_file(path: Path) -> bool:
    """Whether a file has this name. `Path.is_file` raises where a name is too long for a file, as a long text is."""
    return os.path.isfile(path)


def syntax_tree(code: bytes) -> ast.Module:
    """`ast.parse` in one thread at a time: Python 3.11 counts a tree's depth once for all (CPython issue 106905)."""
    with _PARSING:
        return ast.parse(code)


def _named(code: bytes, path: str, script: str) -> Iterator[str]:
    """Candidates of files that a module imports or names."""
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
    """``a.b`` -> a.py, a/__init__.py, a/b.py, a/b/__init__.py below each folder: what an import may run."""
    pieces = name.split(".")
    for folder in folders:
        for length in range(1, len(pieces) + 1):
            place = posixpath.normpath(posixpath.join(folder, *pieces[:length]))
            yield from (f"{place}.py", f"{place}/__init__.py")
