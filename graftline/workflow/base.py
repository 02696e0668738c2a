"""The pinned base as a model folder in the cache: fetched and converted once, made again when the cache is gone.

It is no output of a stage: it would lie on the disk three times. What the stages pass on is its digest.
"""

import json
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from graftline.data.sources import fetch, parse
from graftline.digest import Digest
from graftline.errors import SourceError
from graftline.progress import Reporter
from graftline.weights.identity import read_identity
from graftline.weights.importing import import_base
from graftline.workflow.stage import Context


def base_folder(context: Context, sha256: str) -> Path:
    """Fetch and convert the base unless it is there.

    Args:
        context: the pipeline.
        sha256: of what is downloaded, as resolved for this run.
    """
    section = context.pipeline.base
    folder = context.cache / "bases" / f"{sha256[:16]}-{section.dtype}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Two pipelines of one base may start at once; the second waits for what the first converts.
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            _convert(context, sha256, folder)
    return folder


def _convert(context: Context, sha256: str, folder: Path) -> None:
    section = context.pipeline.base
    fetched = fetch(
        parse(section.source),
        sha256=sha256,
        cache=context.cache,
        root=context.root,
        on_progress=Reporter("fetch base", "bytes"),
    )
    import_base(fetched, folder, dtype=getattr(torch, section.dtype), on_progress=Reporter("convert", "tensors"))


def original_base(context: Context) -> Path:
    """The unquantized base that the fetch stage recorded.

    Raises:
        SourceError: the cache holds another one.
    """
    record: dict[str, Any] = json.loads((context.folder("fetch") / "base.json").read_text(encoding="utf-8"))
    folder = base_folder(context, record["sha256"])
    expected, found = Digest.parse(record["digest"]), read_identity(folder)
    if not found.is_called(expected):
        raise SourceError(f"{folder} has digest {found.digest}, the fetch stage recorded {expected}; remove the folder")
    return folder


def trained_base(context: Context) -> Path:
    """The base that the adapter is trained on: what the init stage made, or the original where nothing is quantized."""
    made = context.folder("init") / "base"
    return made if made.is_dir() else original_base(context)
