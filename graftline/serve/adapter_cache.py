"""Adapters of one base in memory: a bounded number, the least recently used goes first, one in use never goes.

The files are ``.onnx_adapter`` files, named by the digest of what is in them; a new version of an adapter is another
file and another entry, so requests that run on the old one end on the old one.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    runner: Runner
    num_bytes: int
    num_users: int = 0


class AdapterCache:
    """Loads adapters when they are needed. May be used from several threads."""

    def __init__(self, session: GraphSession, *, max_adapters: int) -> None:
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
        base = self.session.layout.base_digest
        if adapter is None:
            yield LoadedModel(str(base), self.session, self._plain)
            return
        entry = self._take(adapter)
        try:
            yield LoadedModel(f"{base}+{adapter.digest}", self.session, entry.runner)
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

    def _take(self, adapter: AdapterFile) -> _Entry:
        with self._lock:
            if adapter.digest not in self._entries:
                self._make_place()
                parameters = read_parameters(adapter.file)
                num_bytes = sum(value.numpy().nbytes for value in parameters.values())
                self._entries[adapter.digest] = _Entry(self.session.runner(parameters), num_bytes)
                self.num_loads += 1
            self._entries.move_to_end(adapter.digest)
            entry = self._entries[adapter.digest]
            entry.num_users += 1
            return entry

    def _make_place(self) -> None:
        if len(self._entries) < self.max_adapters:
            return
        unused = next((digest for digest, entry in self._entries.items() if not entry.num_users), None)
        if unused is None:
            raise BusyError(f"all {self.max_adapters} places for adapters are in use; try again later", 1)
        del self._entries[unused]
