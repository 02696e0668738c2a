"""One base in memory for several trainings: each has the bytes that it has alone, whatever happened before it."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from graftline.adapters.peft_config import AdapterIdentity
from graftline.errors import TrainError
from graftline.evaluate.models import Model, ModelInMemory
from graftline.settings.model import Train
from graftline.train.adapter import Folders, train_adapter
from graftline.weights import kept_base
from graftline.weights.identity import read_identity
from graftline.weights.kept_base import KeptBase
from graftline.weights.quant.folder import quantize_folder
from tests.sections import adapter_section, quantize_section, train_section
from tests.train.rows import make_rows

pytestmark = pytest.mark.slow

ROWS = make_rows(24)
CELLS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "dropout": 0.1},
    "pissa": {"method": "pissa"},
    "dora": {"method": "dora"},
    "full": {"method": "full", "targets": ["q_proj"]},
    "head": {"method": "lora", "modules_to_save": ["lm_head"]},
    "lora again": {"method": "lora", "dropout": 0.1},
}
TRAINS_BASE = {"full"}
"""These train the base's own tensors."""


def train_one(base: Path, out: Path, adapter: dict[str, Any], **given: Any) -> bytes:
    """Train a cell; returns the adapter's bytes."""
    settings: Train = train_section(**{"steps": 3, "batch_size": 4, "learning_rate": 0.01, "threads": 1} | given)
    train_adapter(
        ROWS * (settings.batch_size // len(ROWS) + 1),
        [],
        settings=settings,
        adapter=adapter_section(**{"rank": 2, "alpha": 4} | adapter),
        identity=AdapterIdentity(base_digest=read_identity(base).digest),
        folders=Folders(base=base, out=out, work=out / "work", trackers=out / "trackers"),
        planned={},
    )
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Callable[[], KeptBase]:
    """From its call on, bases are kept."""
    monkeypatch.setattr(kept_base, "_kept", None)
    return kept_base.keep_bases


@pytest.fixture(scope="module")
def quantized(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nf4") / "base"
    quantize_folder(tiny_llama, folder, quantize=quantize_section())
    return folder


def test_every_cell_has_the_bytes_that_it_has_alone(
    tiny_llama: Path, tmp_path: Path, kept: Callable[[], KeptBase]
) -> None:
    alone = {name: train_one(tiny_llama, tmp_path / "alone" / name, cell) for name, cell in CELLS.items()}
    assert alone["lora"] == alone["lora again"]
    assert len(set(alone.values())) == len(CELLS) - 1
    bases = kept()
    for name, cell in CELLS.items():
        assert train_one(tiny_llama, tmp_path / "together" / name, cell) == alone[name], name
        bases.check()
    assert bases.num_loads == 1 + len(TRAINS_BASE)


@pytest.mark.long
def test_a_quantized_base_is_shared_and_another_one_takes_its_place(
    tiny_llama: Path, quantized: Path, tmp_path: Path, kept: Callable[[], KeptBase]
) -> None:
    dense = train_one(tiny_llama, tmp_path / "dense", CELLS["lora"])
    alone = [train_one(quantized, tmp_path / f"alone-{seed}", CELLS["lora"], seed=seed) for seed in (0, 1)]
    bases = kept()
    for seed in (0, 1):
        assert train_one(quantized, tmp_path / f"together-{seed}", CELLS["lora"], seed=seed) == alone[seed]
        bases.check()
    assert bases.num_loads == 1
    assert train_one(tiny_llama, tmp_path / "dense again", CELLS["lora"]) == dense
    assert bases.num_loads == 2


@contextmanager
def little_memory() -> Iterator[None]:
    """At most 48 MB more than this process has now."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (48 << 20), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.long
def test_a_cell_that_diverges_or_runs_out_of_memory_leaves_a_clean_base(
    tiny_llama: Path, tmp_path: Path, kept: Callable[[], KeptBase]
) -> None:
    alone = train_one(tiny_llama, tmp_path / "alone", CELLS["lora"])
    bases = kept()
    train_one(tiny_llama, tmp_path / "first", CELLS["lora"])
    with pytest.raises(TrainError, match="a finite one is expected"):
        train_one(tiny_llama, tmp_path / "diverges", CELLS["head"], learning_rate=10)
    bases.check()
    with little_memory(), pytest.raises(TrainError, match="memory did not suffice"):
        train_one(tiny_llama, tmp_path / "too large", CELLS["lora"], batch_size=6000)
    bases.check()
    assert train_one(tiny_llama, tmp_path / "after", CELLS["lora"]) == alone
    assert bases.num_loads == 1


@pytest.mark.long
def test_an_evaluation_takes_the_base_that_was_trained_on(
    tiny_llama: Path, tmp_path: Path, kept: Callable[[], KeptBase]
) -> None:
    bases = kept()
    train_one(tiny_llama, tmp_path / "cell", CELLS["pissa"])
    bases.check()
    digest = read_identity(tiny_llama).digest
    memory = ModelInMemory(template="none", device="cpu")
    plain, _ = memory.get(Model(tiny_llama, digest))
    with torch.no_grad():
        logits = plain(torch.tensor([[5, 6, 7]])).logits
    memory.get(Model(tiny_llama, digest, tmp_path / "cell" / "adapter", owns_base=False))
    memory.free()
    bases.check()
    plain, _ = memory.get(Model(tiny_llama, digest))
    with torch.no_grad():
        assert torch.equal(plain(torch.tensor([[5, 6, 7]])).logits, logits)
    assert bases.num_loads == 1


@pytest.mark.long
def test_a_changed_weight_is_noticed_even_where_torch_does_not_count_it(
    tiny_llama: Path, kept: Callable[[], KeptBase]
) -> None:
    bases = kept()
    for count, sneaky in enumerate((lambda p: p.data.view(-1)[0:1].neg_(), lambda p: p.numpy(force=True).fill(1)), 1):
        model = bases.model(tiny_llama, device="cpu", dtype=torch.float32, keep=False)
        assert bases.num_loads == count
        sneaky(model.model.norm.weight)
        bases.check()
