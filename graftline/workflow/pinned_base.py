"""The pinned base as a model folder in the cache, fetched and converted if it is missing there.

The base is not an output of a stage, because DVC would keep two more copies; the stages pass on its digest.
"""

import json
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from graftline import settings
from graftline.data.sources import fetch, known_digest, parse
from graftline.data.sources.cache import place_of
from graftline.digest import Digest
from graftline.errors import SourceError
from graftline.logs import Reporter
from graftline.weights.identity import read_identity
from graftline.weights.importing import import_base
from graftline.workflow.workspace import Workspace


def base_folder(section: settings.Base, sha256: str, at: Workspace) -> Path:
    """Fetch and convert the base unless it is in the cache; ``sha256`` is that of the download, as resolved."""
    folder = _place(section, sha256, at)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Two pipelines of one base may start at once; the second waits for the first one's conversion.
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            _convert(section, sha256, at, folder)
    return folder


def base_at_hand(section: settings.Base, at: Workspace) -> Path | None:
    """The base before it is fetched: the folder that ``path:`` names, or one in the cache; None if neither is."""
    source = parse(section.source)
    if source.kind == "path":
        folder = place_of(source, at.root)
        return folder if (folder / "config.json").is_file() else None
    digest = known_digest(source, sha256=section.sha256, cache=at.cache)
    folder = _place(section, digest.hex, at) if digest else at.root
    return folder if digest and folder.is_dir() else None


def _place(section: settings.Base, sha256: str, at: Workspace) -> Path:
    return at.cache / "bases" / f"{sha256[:16]}-{section.dtype}"


def _convert(section: settings.Base, sha256: str, at: Workspace, folder: Path) -> None:
    fetched = fetch(
        parse(section.source),
        sha256=sha256,
        cache=at.cache,
        root=at.root,
        on_progress=Reporter("fetch base", "bytes"),
    )
    import_base(fetched, folder, dtype=getattr(torch, section.dtype), on_progress=Reporter("convert", "tensors"))


def original_base(section: settings.Base, at: Workspace) -> Path:
    """The unquantized base that the fetch stage recorded; SourceError if the cache holds another one."""
    record: dict[str, Any] = json.loads((at.folder("fetch") / "base.json").read_text(encoding="utf-8"))
    folder = base_folder(section, record["sha256"], at)
    expected, found = Digest.parse(record["digest"]), read_identity(folder)
    if not found.is_called(expected):
        raise SourceError(f"{folder} has digest {found.digest}, the fetch stage recorded {expected}; remove the folder")
    return folder


def trained_base(section: settings.Base, at: Workspace) -> Path:
    """The base that the adapter is trained on: the init stage's, or the original if nothing is quantized."""
    made = at.folder("init") / "base"
    return made if made.is_dir() else original_base(section, at)
