"""What can be asked for: names and the models behind them. A name can be moved to another model at any time."""

import difflib
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from graftline.adapters.peft_config import read_identity
from graftline.errors import ServingError
from graftline.serve.served_base import AdapterFile, Base


class UnknownModelError(ServingError):
    """No model has that name."""


@dataclass(frozen=True)
class ServedModel:
    """One answer to the question which model a name means."""

    name: str
    base: Base
    adapter: AdapterFile | None
    template: str
    parent: str | None = None
    """Name of the base, for an adapter."""
    release: str | None = None
    """``pipeline@version`` of the release that it came from."""
    created: int = field(default_factory=lambda: int(time.time()))
    by_request: bool = False
    """Whether a client had it loaded; only such a model can be unloaded by request."""


class Catalog:
    """Names of models. May be used from several threads."""

    def __init__(self) -> None:
        self._models: dict[str, ServedModel] = {}
        self._bases: dict[str, Base] = {}
        self._lock = threading.Lock()

    def add_base(self, name: str, base: Base) -> None:
        """Serve a base (or a merged model) under a name.

        A base that was made together with an adapter (LoftQ, QPiSSA) is there for that adapter; alone it is worse than
        any other and cannot be asked for.

        Raises:
            ServingError: the name is taken.
        """
        with self._lock:
            if name in self._models or name in self._bases:
                raise ServingError(f"there is a model {name!r} already; give each model a name of its own")
            self._bases[name] = base
            if base.identity.pair is None:
                self._models[name] = ServedModel(name, base, None, base.default_template)

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
            self._check_free(name)  # again: another may have taken it meanwhile
            self._models[name] = model
        return model

    def make_adapter(self, name: str, folder: Path, *, release: str | None = None) -> ServedModel:
        """The model of an adapter folder, on the base that it was trained on; nobody can ask for it before `point`.

        Raises:
            ServingError: no base here fits the adapter.
            BaseMismatchError, AdapterError, ExportError: the adapter is refused; the reason is given.
        """
        bases = self.bases()
        parent = self._find_base(folder, bases)
        adapter, template = bases[parent].prepare_adapter(folder)
        return ServedModel(name, bases[parent], adapter, template, parent, release)

    def point(self, name: str, model: ServedModel) -> None:
        """Let a name mean a model.

        Raises:
            ServingError: it is a base's.
        """
        with self._lock:
            if name in self._bases:
                raise ServingError(f"{name!r} is a base; give it another name")
            self._models[name] = replace(model, name=name, created=int(time.time()), by_request=False)

    def unload(self, name: str) -> None:
        """Forget an adapter's name. Requests that run on it end on it.

        Raises:
            UnknownModelError: no model has that name.
            ServingError: it is a base.
        """
        with self._lock:
            if name in self._bases:
                raise ServingError(f"{name!r} is a base; only adapters can be unloaded")
            if self._models.pop(name, None) is None:
                raise UnknownModelError(f"there is no model {name!r}")

    def unload_requested(self, name: str) -> None:
        """Forget the name of an adapter that a client had loaded.

        Raises:
            UnknownModelError: no model has that name.
            ServingError: it is here for another reason: a base, a channel's, or one of the server's own.
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
        """The model of a name.

        Raises:
            UnknownModelError: none has it; the nearest names are given.
        """
        with self._lock:
            model = self._models.get(name)
            if model is None:
                near = difflib.get_close_matches(name, self._models, n=3) or sorted(self._models)[:5]
        if model is None:
            raise UnknownModelError(f"there is no model {name[:100]!r}; try {', '.join(near)}")
        return model

    def models(self) -> list[ServedModel]:
        """Every model, in the order in which they came."""
        with self._lock:
            return list(self._models.values())

    def bases(self) -> dict[str, Base]:
        """Every base by name."""
        with self._lock:
            return dict(self._bases)

    def _check_free(self, name: str) -> None:
        if name in self._bases or name in self._models:
            raise ServingError(f"there is a model {name!r} already; unload it first")

    @staticmethod
    def _find_base(folder: Path, bases: dict[str, Base]) -> str:
        """Name of the base that an adapter was trained on; the only one, where the adapter does not say."""
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
