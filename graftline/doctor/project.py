"""What the doctor says about the project: its pipelines, their gates and their stores."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from graftline import settings
from graftline.address import store_address
from graftline.doctor import power
from graftline.doctor.finding import Finding
from graftline.errors import GraftlineError
from graftline.registry.store import folder_of, open_store
from graftline.words import count


def look(root: Path) -> Iterator[Finding]:
    """Whether pipelines.yaml can be read, its gates can be passed, and each store that it names can be used."""
    try:
        loaded = settings.load(root / settings.DEFAULT_FILE)
    except GraftlineError as error:
        yield Finding(
            "pipelines", "missing", str(error), "run in the project's folder, or make one: graftline init NAME"
        )
        return
    yield Finding("pipelines", "ok", ", ".join(loaded.names))
    for name in loaded.names:
        yield from power.look(name, loaded.pipeline(name), root / "runs" / name / "gate" / "verdict.json")
    for store in dict.fromkeys(loaded.pipeline(name).release.store for name in loaded.names):
        yield _store(root, store)


def _store(root: Path, store: str) -> Finding:
    name = f"store {store}"
    if store.startswith("s3://"):
        return _try(name, lambda: _read_s3(store), "check AWS_ENDPOINT_URL, credentials and the bucket")
    advice = "make the folder writable, or change release.store"
    return _try(name, lambda: _write_below(folder_of(store_address(store, root))), advice)


def _try(name: str, look: Callable[[], str], advice: str) -> Finding:
    try:
        return Finding(name, "ok", look())
    except (OSError, GraftlineError) as error:
        return Finding(name, "missing", str(error), advice)


def _write_below(folder: Path) -> str:
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    with tempfile.TemporaryFile(dir=existing):
        return f"{folder} is writable"


def _read_s3(store: str) -> str:
    versions = sum(1 for _ in open_store(store).list("releases"))
    return f"{count(versions, 'object')} below releases/"
