"""Several trainings side by side: each has the files that it has alone, to the byte, whatever happens to the others."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any

import pytest
import torch

from graftline.adapters.peft_config import AdapterIdentity
from graftline.digest import of_folder
from graftline.errors import PreemptedError, TrainError
from graftline.train import preemption, together
from graftline.train.adapter import Folders, train_adapter
from graftline.train.together import train_together
from graftline.weights import kept_base
from graftline.weights.identity import read_identity
from graftline.weights.quant import linear
from graftline.weights.quant.folder import quantize_folder
from tests.sections import adapter_section, quantize_section, train_section
from tests.train.rows import make_rows

ROWS, HELD_OUT = make_rows(24), make_rows(6, seed=7)
CELLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "small": ({"method": "lora", "rank": 2, "alpha": 4}, {}),
    "dropout": ({"method": "lora", "rank": 4, "alpha": 4, "dropout": 0.2}, {"seed": 3, "learning_rate": 0.002}),
    "held out": ({"method": "rslora", "rank": 3, "alpha": 6}, {"evaluate_every": 2, "patience": 1, "seed": 1}),
    "recomputed": (
        {"method": "dora", "rank": 2, "alpha": 4},
        {"steps": 3, "batch_size": 2, "gradient_accumulation": 2, "gradient_checkpointing": True},
    ),
}

DIVERGES = {"head": ({"method": "lora", "rank": 2, "alpha": 4, "modules_to_save": ["lm_head"]}, {"learning_rate": 10})}


@pytest.fixture
def base(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base in NF4, kept in memory from the second training on."""
    quantize_folder(tiny_llama, tmp_path / "base", quantize=quantize_section())
    monkeypatch.setattr(kept_base, "_kept", None)
    kept_base.keep_bases()
    return tmp_path / "base"


def training(base: Path, out: Path, name: str, **given: Any) -> Callable[[], None]:
    adapter, changed = (CELLS | DIVERGES)[name]
    settings = {"steps": 5, "batch_size": 4, "learning_rate": 0.01, "checkpoint_every": 2, **changed, **given}
    return partial(
        train_adapter,
        ROWS,
        HELD_OUT if "evaluate_every" in changed else [],
        settings=train_section(**settings),
        adapter=adapter_section(**adapter),
        identity=AdapterIdentity(base_digest=read_identity(base).digest),
        folders=Folders(base=base, out=out / name, work=out / "work" / name, trackers=out / "trackers"),
        planned={},
    )


def files(out: Path, name: str) -> dict[str, Any]:
    """Everything that a training leaves, but for times and memory."""
    found: dict[str, Any] = {str(path): str(digest) for path, digest in of_folder(out / "work" / name).items()}
    found |= {f"adapter/{path}": str(digest) for path, digest in of_folder(out / name / "adapter").items()}
    metrics = json.loads((out / name / "metrics.json").read_text())
    metrics = {key: value for key, value in metrics.items() if key not in ("tokens_per_second", "peak_bytes")}
    return found | {"metrics": metrics, "history": (out / name / "history.json").read_text()}


def test_each_has_the_bytes_that_it_has_alone(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = [0], linear.dequantize_here

    def counted(*given: Any) -> torch.Tensor:
        made[0] += 1
        return real(*given)

    monkeypatch.setattr(linear, "dequantize_here", counted)
    for name in CELLS:
        training(base, tmp_path / "alone", name)()
    alone, made[0] = made[0], 0
    assert train_together([training(base, tmp_path / "together", name) for name in CELLS]) == [None] * len(CELLS)
    for name in CELLS:
        assert files(tmp_path / "together", name) == files(tmp_path / "alone", name), name
    assert made[0] < 0.7 * alone


def test_one_that_diverges_leaves_the_others_alone(base: Path, tmp_path: Path) -> None:
    training(base, tmp_path / "alone", "small")()
    diverged, fine = train_together([training(base, tmp_path / "together", name) for name in ("head", "small")])
    assert isinstance(diverged, TrainError)
    assert "a finite one is expected" in str(diverged)
    assert fine is None
    assert files(tmp_path / "together", "small") == files(tmp_path / "alone", "small")


def test_those_that_are_asked_to_end_go_on_together_or_alone(base: Path, tmp_path: Path) -> None:
    names = ("dropout", "held out")
    for name in names:
        training(base, tmp_path / "alone", name)()
    out = tmp_path / "together"
    stopped = train_together([*(training(base, out, name) for name in names), preemption.ask])
    assert [type(error) for error in stopped] == [PreemptedError, PreemptedError, NoneType]
    assert all((out / "work" / name / "checkpoint-1").is_dir() for name in names)
    shutil.copytree(out, tmp_path / "apart")
    assert train_together([training(base, out, name) for name in names]) == [None] * 2
    for name in names:
        training(base, tmp_path / "apart", name)()
        expected = files(tmp_path / "alone", name)
        assert files(out, name) == files(tmp_path / "apart", name) == expected, name


def test_all_come_to_a_block_before_one_goes_on_however_many_passes_each_has() -> None:
    came: list[str] = []

    def of(name: str, passes: int, number: int) -> None:
        turns, _ = together._of_thread.seat
        for at in range(passes):
            turns.pass_on(number, before_pass=True)
            for block in (0, 1):
                turns.pass_on(number)
                came.append(f"{name}{at}{block}")

    train_together([partial(of, "a", 2, 0), partial(of, "b", 1, 1), partial(of, "c", 3, 2)])
    assert came == ["a00", "b00", "c00", "a01", "b01", "c01", "a10", "c10", "a11", "c11", "c20", "c21"]
