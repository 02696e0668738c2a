"""A tiny base with adapters of several methods, served for real."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import uvicorn
from transformers import PreTrainedModel

from graftline.adapters.attach import attach, trainable_parameters
from graftline.adapters.class_head import add_class_head
from graftline.adapters.peft_config import AdapterIdentity
from graftline.adapters.peft_format import load_adapter, save_adapter
from graftline.data.template import template_digest
from graftline.digest import Digest
from graftline.registry.file_store import FileStore
from graftline.serve.app import AccessRules, Server, create_app
from graftline.serve.catalog import Catalog
from graftline.serve.follower import Follower
from graftline.serve.scheduler import Limits, Scheduler
from graftline.serve.served_base import AdapterCache, Base, Runtime
from graftline.serve.server import KEEP_ALIVE_SECONDS
from graftline.settings.model import Adapter
from graftline.weights.identity import read_identity
from graftline.weights.model_folder import load_tokenizer
from graftline.weights.quant.folder import initialize
from graftline.weights.quant.linear import load_model
from graftline.weights.quant.low_rank import FactorSettings, factors_digest, read_factors
from tests.ports import free_port
from tests.sections import adapter_section, quantize_section
from tests.tiny import make_tiny_llama

METHODS = ("lora", "dora", "vera", "houlsby")
TOKEN = "a-token"
ADMIN_TOKEN = "an-administrator's"


def loaded(cache: AdapterCache) -> dict[Digest, int]:
    """Bytes of each adapter in memory."""
    return {digest: entry.num_bytes for digest, entry in cache._entries.items()}


def make_adapter(
    base: Path,
    folder: Path,
    *,
    method: str = "lora",
    seed: int = 0,
    template: str = "tokenizer",
    labels: tuple[str, ...] = (),
) -> Path:
    """An adapter with random values, large enough to change answers."""
    model, identity = load_model(base), read_identity(base)
    initial = read_factors(base) if identity.pair else None
    if labels:
        add_class_head(model, labels, seed=seed)
    attach(model, adapter_section(method, rank=4), seed=seed, initial=initial)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            # VeRA's vectors scale random projections: it takes more of them to change an answer.
            size = 3.0 if method == "vera" else 0.3
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    made_for = AdapterIdentity(
        base_digest=identity.digest,
        quantizer=identity.quantizer,
        template_digest=template_digest(load_tokenizer(base), template),
        initial_digest=factors_digest(base) if identity.pair else None,
    )
    save_adapter(model, folder, identity=made_for)
    return folder


def make_quantized(base: Path, folder: Path, *, init: str = "plain", code: str = "nf4") -> Path:
    """The base quantized: alone, or together with the first values of an adapter (loftq, qpissa)."""
    alpha = Adapter(method="lora").alpha
    initialize(
        base,
        folder,
        quantize=quantize_section(code, init=init, loftq_iterations=3),
        seed=0,
        factors=lambda module: FactorSettings(4, alpha / 4),
    )
    return folder


def library_model(base: Path, adapter: Path | None) -> PreTrainedModel:
    """transformers with our layers: what the server must agree with."""
    model = load_model(base)
    if adapter is not None:
        load_adapter(model, adapter, base=read_identity(base))
    return model.eval()


def greedy_tokens(model: PreTrainedModel, prompt: list[int], num_tokens: int, stop: frozenset[int]) -> list[int]:
    """transformers' greedy continuation, without the stop token."""
    generated = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=sorted(stop) or None,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    return [token for token in generated if token not in stop]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base. Read-only."""
    return make_tiny_llama(tmp_path_factory.mktemp("serving") / "tiny", num_hidden_layers=1)


@pytest.fixture(scope="session")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    return Runtime(graphs=tmp_path_factory.mktemp("graphs"), num_threads=1, max_adapters=3)


@pytest.fixture(scope="session")
def adapters(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapter folders by method."""
    root = tmp_path_factory.mktemp("adapters")
    return {method: make_adapter(tiny, root / method, method=method) for method in METHODS}


@pytest.fixture
def catalog(tiny: Path, runtime: Runtime, adapters: dict[str, Path]) -> Catalog:
    """The base as ``tiny`` and each adapter under its method's name."""
    catalog = Catalog()
    catalog.add_base("tiny", Base(tiny, runtime))
    for name, folder in adapters.items():
        catalog.load_adapter(name, folder)
    return catalog


@pytest.fixture
def server(catalog: Catalog, tmp_path: Path) -> Server:
    """Not started yet."""
    (tmp_path / "loadable").mkdir()
    access = AccessRules(
        tokens=("another-token", TOKEN),
        admin_tokens=(ADMIN_TOKEN,),
        adapter_folder=tmp_path / "loadable",
        max_body_bytes=100_000,
    )
    return Server(catalog, Scheduler(Limits(max_batch=4, max_waiting=8, piece_tokens=32)), None, access)


@pytest.fixture
def url(server: Server) -> Iterator[str]:
    """The server on a port of its own."""
    with run(server) as address:
        yield address


class run:  # noqa: N801 - used as a function
    """Run a server on a free port while the context lasts."""

    def __init__(self, server: Server, *, keep_alive_seconds: int = KEEP_ALIVE_SECONDS) -> None:
        self._port = free_port()
        config = uvicorn.Config(
            create_app(server),
            host="127.0.0.1",
            port=self._port,
            log_level="error",
            timeout_keep_alive=keep_alive_seconds,
        )
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._uvicorn.run, daemon=True)

    def __enter__(self) -> str:
        self._thread.start()
        while not self._uvicorn.started:
            assert self._thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        return f"http://127.0.0.1:{self._port}"

    def __exit__(self, *exc: object) -> None:
        self._uvicorn.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()


os.environ.setdefault("OPENAI_API_KEY", TOKEN)


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


@pytest.fixture
def follower(store: FileStore, tiny: Path, runtime: Runtime, tmp_path: Path) -> Follower:
    from tests.serve.following import make_follower  # which takes this file's helpers

    return make_follower(store, tiny, runtime, tmp_path / "fetched")
