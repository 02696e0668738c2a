"""A training's checkpoints copied, while it runs, to where other machines find them: a folder or S3.

The training itself writes to ``runs/<pipeline>/.work`` and waits for nobody: a thread of the process that started it
copies each checkpoint that appears there, its ``graftline.json`` last, to ``<address>/<pipeline>/train-<digest>``. A
training that begins where no checkpoint lies, or an older one, takes the newest whole copy. When it has ended well its
copies are removed.
"""

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

from graftline.digest import of_folder
from graftline.errors import StoreError
from graftline.registry.store import Store, open_store
from graftline.train.checkpoint import IDENTITY, checkpoints_in, newest_step, replace_folder, step_of

_LOG = logging.getLogger("graftline")
_LOOK_SECONDS = 2.0
_KEEP = 2


@contextlib.contextmanager
def kept_copies(work: Path, address: str | None, *, name: str) -> Iterator[None]:
    """Bring the newest copy to ``work`` before the block, and copy what appears there until it ends.

    Args:
        work: the training's folder.
        address: a folder or s3://bucket/prefix; None: nothing is copied.
        name: of the training, below the address.

    Raises:
        StoreError: the place of the copies cannot be read. (While training, what cannot be written is told and tried
            again.)
    """
    if address is None:
        yield
        return
    copies = _Copies(open_store(address), name, work)
    copies.fetch()
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(_LOOK_SECONDS):
            copies.send()

    sender = threading.Thread(target=follow, daemon=True)
    sender.start()
    try:
        yield
    except BaseException:
        ended.set()
        sender.join()
        copies.send()
        raise
    ended.set()
    sender.join()
    copies.remove()


class _Copies:
    """The copies of one training."""

    def __init__(self, store: Store, name: str, work: Path) -> None:
        self._store, self._prefix, self._work = store, f"{name}/", work
        self._sent = 0

    def fetch(self) -> None:
        """Bring the newest whole copy, if it is newer than what is here."""
        found = self._steps()
        whole = [step for step, names in found.items() if IDENTITY in names]
        self._sent = newest = max(whole, default=0)
        if newest <= newest_step(self._work):
            return
        with replace_folder(self._work / f"checkpoint-{newest}") as folder:
            for file in found[newest]:
                self._store.get_file(f"{self._prefix}checkpoint-{newest}/{file}", folder / file)
        _LOG.info("the checkpoint of step %d was brought from %s", newest, self._store.url)

    def send(self) -> None:
        """Copy the newest checkpoint, if it is newer than the copies; remove those that are older than the last two."""
        folder = next(reversed(checkpoints_in(self._work)), None)
        if folder is None or step_of(folder) <= self._sent:
            return
        try:
            # A checkpoint appears whole; it may be removed meanwhile, as an old one.
            files = of_folder(folder)
            for file in sorted(files, key=lambda file: file == IDENTITY):
                self._store.put_file(f"{self._prefix}{folder.name}/{file}", folder / file, digest=files[file])
            self._sent = step_of(folder)
            for step, names in sorted(self._steps().items())[:-_KEEP]:
                self._remove(step, names)
        except (StoreError, OSError) as error:
            _LOG.warning("checkpoint %s was not copied, which is tried again: %s", folder.name, error)

    def remove(self) -> None:
        """Remove all copies."""
        try:
            for step, names in self._steps().items():
                self._remove(step, names)
        except (StoreError, OSError) as error:
            _LOG.warning("copies of checkpoints stay in %s: %s", self._store.url, error)

    def _remove(self, step: int, names: list[str]) -> None:
        for file in sorted(names, key=lambda file: file != IDENTITY):
            self._store.delete(f"{self._prefix}checkpoint-{step}/{file}")

    def _steps(self) -> dict[int, list[str]]:
        """The files of each copy, by step."""
        found: dict[int, list[str]] = {}
        for key in self._store.list(self._prefix.rstrip("/")):
            folder, _, file = key.removeprefix(self._prefix).partition("/")
            number = folder.removeprefix("checkpoint-")
            if file and number.isdigit():
                found.setdefault(int(number), []).append(file)
        return found
