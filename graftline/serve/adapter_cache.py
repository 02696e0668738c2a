"""Adapters of one base in memory: a bounded number, the least recently used goes first, one in use never goes.

The files are ``.onnx_adapter`` files, named by the digest of what is in them; a new version of an adapter is another
file and another entry, so requests that run on the old one end on the old one. The lock is never held while a file is
read: whoever needs an adapter that is being read waits for that one alone.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from graftline.digest import Digest
from graftline.export.onnx_adapter import read_parameters
from graftline.export.onnx_session import GraphSession, Runner
from graftline.serve.generation import BusyError, LoadedModel


@dataclass(frozen=True)
class AdapterFile:
    """An ``.onnx_adapter`` file and the digest of all that it was made of."""

    file: Path
    digest: Digest


@dataclass
class _Entry:
    loaded: "Future[tuple[Runner, int]]" = field(default_factory=Future)
    """The runner and its bytes, once they are read."""
    num_users: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes in memory; 0 while they are being read."""
        return self.loaded.result()[1] if self.loaded.done() and not self.loaded.exception() else 0


class AdapterCache:
    """Loads adapters when they are needed. May be used from several threads.

    Args:
        session: the graph.
        key: what tells this graph from others: requests of equal keys share batches.
        max_adapters: adapters in memory at most.
    """

    def __init__(self, session: GraphSession, *, key: str, max_adapters: int) -> None:
        self._key = key
        self.session, self.max_adapters = session, max_adapters
        self.num_loads = 0
        self._plain = session.runner()
        self._entries: OrderedDict[Digest, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def use(self, adapter: AdapterFile | None) -> Iterator[LoadedModel]:
        """The model with an adapter (None: the base alone), held in memory for as long as the context lasts.

        Raises:
            BusyError: every place is taken by an adapter in use.
            ExportError: the file cannot be read.
        """
        if adapter is None:
            yield LoadedModel(self._key, self.session, self._plain)
            return
        entry, is_new = self._take(adapter)
        try:
            if is_new:
                self._load(adapter, entry)
            runner, _ = entry.loaded.result()
            yield LoadedModel(f"{self._key}+{adapter.digest}", self.session, runner)
        finally:
            with self._lock:
                entry.num_users -= 1

    @property
    def num_bytes(self) -> int:
        """Memory of the adapters that are loaded."""
        with self._lock:
            return sum(entry.num_bytes for entry in self._entries.values())

    @property
    def loaded(self) -> dict[Digest, int]:
        """Bytes of each adapter that is loaded."""
        with self._lock:
            return {digest: entry.num_bytes for digest, entry in self._entries.items()}

    def _take(self, adapter: AdapterFile) -> tuple[_Entry, bool]:
        """The entry of an adapter, with one more user, and whether it is new, so that it has to be read."""
        with self._lock:
            entry = self._entries.get(adapter.digest)
            is_new = entry is None
            if entry is None:
                self._make_place()
                entry = self._entries[adapter.digest] = _Entry()
            self._entries.move_to_end(adapter.digest)
            entry.num_users += 1
            return entry, is_new

    def _load(self, adapter: AdapterFile, entry: _Entry) -> None:
        """Read the file of a new entry; where that fails no entry stays behind, and the next user tries again."""
        try:
            parameters = read_parameters(adapter.file)
            num_bytes = sum(value.numpy().nbytes for value in parameters.values())
            runner = self.session.runner(parameters)
        except BaseException as error:
            with self._lock:
                del self._entries[adapter.digest]
            entry.loaded.set_exception(error)
            raise
        entry.loaded.set_result((runner, num_bytes))
        with self._lock:
            self.num_loads += 1

    def _make_place(self) -> None:
        if len(self._entries) < self.max_adapters:
            return
        unused = next((digest for digest, entry in self._entries.items() if not entry.num_users), None)
        if unused is None:
            raise BusyError(f"all {self.max_adapters} places for adapters are in use; try again later", 1)
        del self._entries[unused]
