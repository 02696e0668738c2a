"""What the doctor says about the project: its pipelines and their stores."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from graftline import config
from graftline.doctor.finding import Finding
from graftline.errors import GraftlineError
from graftline.words import count


def look(root: Path) -> Iterator[Finding]:
    """Whether pipelines.yaml can be read, and each store that it names can be used."""
    try:
        loaded = config.load(root / config.DEFAULT_FILE)
    except GraftlineError as error:
        yield Finding("pipelines", "missing", str(error), "graftline init writes a starter")
        return
    yield Finding("pipelines", "ok", ", ".join(loaded.names))
    for store in dict.fromkeys(loaded.pipeline(name).release.store for name in loaded.names):
        yield _store(root, store)


def _store(root: Path, store: str) -> Finding:
    name = f"store {store}"
    if store.startswith("s3://"):
        return _try(name, lambda: _read_s3(store), "check AWS_ENDPOINT_URL, credentials and the bucket")
    folder = Path(store.removeprefix("file://"))
    return _try(name, lambda: _write_below(root / folder), "make the folder writable, or change release.store")


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
    from graftline.registry.store import open_store  # boto3 costs 0.4 s

    versions = sum(1 for _ in open_store(store).list("releases/"))
    return f"{count(versions, 'object')} below releases/"
