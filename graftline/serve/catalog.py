"""The served models by name. A name can be pointed at another model at any time."""

import difflib
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from graftline.adapters.peft_config import read_identity
from graftline.digest import Digest
from graftline.errors import ServingError
from graftline.serve.served_base import AdapterFile, Base, default_template


class UnknownModelError(ServingError):
    """There is no model of that name."""


@dataclass(frozen=True)
class ServedModel:
    """The model that a name stands for."""

    name: str
    base: Base
    adapter: AdapterFile | None
    template: str
    parent: str | None = None
    """Name of the base, for an adapter."""
    release: str | None = None
    """``pipeline@version`` of its release, if it has one."""
    digest: Digest | None = None
    """Its release's."""
    created: int = field(default_factory=lambda: int(time.time()))
    by_request: bool = False
    """Whether a client loaded it; only such a model can be unloaded by request."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes that its adapter's head chooses among; empty for a model that writes text."""
        return self.adapter.labels if self.adapter else ()


class Catalog:
    """Models by name; thread-safe."""

    def __init__(self) -> None:
        self._models: dict[str, ServedModel] = {}
        self._bases: dict[str, Base] = {}
        self._lock = threading.Lock()

    def add_base(self, name: str, base: Base) -> None:
        """Serve a base (or a merged model) under a name.

        A base that was made together with an adapter (LoftQ, QPiSSA) is worse than any other without it, so only its
        adapters can be asked for.

        Raises:
            ServingError: the name is taken.
        """
        with self._lock:
            if name in self._models or name in self._bases:
                raise ServingError(f"there is a model {name!r} already; give each model a different name")
            self._bases[name] = base
            if base.identity.pair is None:
                self._models[name] = ServedModel(name, base, None, default_template(base.tokenizer))

    def load_adapter(self, name: str, folder: Path, *, by_request: bool = False) -> ServedModel:
        """Serve an adapter folder under a name, on the base that it was trained on.

        Raises:
            ServingError: the name is taken, or no base here fits the adapter.
            BaseMismatchError, AdapterError, ExportError: the adapter is refused; the reason is given.
        """
        with self._lock:
            self._check_free(name)
        model = replace(self.make_adapter(name, folder), by_request=by_request)
        with self._lock:
            self._check_free(name)  # again: it may have been taken in the meantime
            self._models[name] = model
        return model

    def make_adapter(self, name: str, folder: Path, *, release: str | None = None) -> ServedModel:
        """The model of an adapter folder, on the base that it was trained on; raises as `load_adapter`.

        It cannot be asked for before a name is pointed at it (`point`).
        """
        bases = self.bases()
        parent = self._find_base(folder, bases)
        adapter, template = bases[parent].prepare_adapter(folder)
        return ServedModel(name, bases[parent], adapter, template, parent, release)

    def point(self, name: str, model: ServedModel) -> None:
        """Point a name at a model; ServingError if it is a base's name."""
        with self._lock:
            if name in self._bases:
                raise ServingError(f"{name!r} is a base; give it another name")
            self._models[name] = replace(model, name=name, created=int(time.time()), by_request=False)

    def unload(self, name: str) -> None:
        """Remove an adapter's name; requests that are running finish on it. ServingError if there is none."""
        with self._lock:
            if name in self._bases or self._models.pop(name, None) is None:
                raise ServingError(f"there is no adapter {name!r}")

    def unload_requested(self, name: str) -> None:
        """Remove the name of an adapter that a client loaded.

        Raises:
            UnknownModelError: there is no such model.
            ServingError: it was not loaded by a request, but is a base, a channel's release or one of the server's.
        """
        with self._lock:
            model = self._models.get(name)
            if model is not None and model.by_request:
                del self._models[name]
                return
        if model is None:
            raise UnknownModelError(f"there is no model {name[:100]!r}")
        raise ServingError(f"{name!r} was not loaded by a request, so no request unloads it")

    def resolve(self, name: str) -> ServedModel:
        """The model of a name; UnknownModelError, with the nearest names, if there is none."""
        with self._lock:
            model = self._models.get(name)
            if model is None:
                near = difflib.get_close_matches(name, self._models, n=3) or sorted(self._models)[:5]
        if model is None:
            raise UnknownModelError(f"there is no model {name[:100]!r}; try {', '.join(near)}")
        return model

    def models(self) -> list[ServedModel]:
        """All models, in the order in which they were added."""
        with self._lock:
            return list(self._models.values())

    def bases(self) -> dict[str, Base]:
        """All bases by name."""
        with self._lock:
            return dict(self._bases)

    def _check_free(self, name: str) -> None:
        if name in self._bases or name in self._models:
            raise ServingError(f"there is a model {name!r} already; unload it first")

    @staticmethod
    def _find_base(folder: Path, bases: dict[str, Base]) -> str:
        """Name of the base that an adapter was trained on; the only base if the adapter does not record it."""
        recorded = read_identity(folder)
        if recorded is None:
            if len(bases) == 1:
                return next(iter(bases))
            raise ServingError(f"{folder} does not say which base it belongs to, and {len(bases)} are served")
        for name, base in bases.items():
            if base.identity.is_called(recorded[0].base_digest):
                return name
        served = ", ".join(f"{name} ({base.identity.digest.short})" for name, base in bases.items())
        raise ServingError(
            f"{folder} was trained on the base {recorded[0].base_digest.short}; served are {served}: serve its own base"
        )
