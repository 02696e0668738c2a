"""A training in a process of its own, killed and resumed in another: what a forked child cannot do on CUDA."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from graftline.settings.model import Optimizer
from graftline.weights.quant.folder import quantize_folder
from tests.line.project import ROOT
from tests.sections import quantize_section

_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
_CASES: list[tuple[str | None, Optimizer, bool]] = [
    ("nf4", "adamw_8bit", True),
    (None, "adamw", False),
    ("fp8", "paged_adamw_8bit", False),
    ("nf4", "paged_adamw_32bit", False),
]
"""Code of the base, optimizer, packing."""


@pytest.mark.parametrize(
    ("device", "code", "optimizer", "packing"),
    [
        *(pytest.param("cpu", *case, marks=pytest.mark.slow) for case in _CASES[:1]),
        *(pytest.param("cpu", *case, marks=[pytest.mark.slow, pytest.mark.long]) for case in _CASES[1:]),
        *(pytest.param("cuda", *case, marks=_CUDA) for case in _CASES),
    ],
)
def test_a_training_that_was_killed_ends_with_the_same_bytes(
    device: str, code: str | None, optimizer: Optimizer, packing: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    base = tiny_llama
    if code is not None:
        base = tmp_path / "base"
        quantize_folder(tiny_llama, base, quantize=quantize_section(code))
    settings = {
        "steps": 5,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "checkpoint_every": 2,
        "device": device,
        "precision": "bf16",
        "gradient_checkpointing": True,
        "offload_activations": True,
        "optimizer": optimizer,
        "packing": packing,
    }

    def run(name: str, *, kill_at: int = 0) -> int:
        job: dict[str, Any] = {"base": str(base), "train": settings, "kill_at": kill_at}
        job |= {"work": str(tmp_path / name), "out": str(tmp_path / f"{name}.pt")}
        (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, "-m", "tests.train.killed_training", str(tmp_path / "job.json")]
        return subprocess.run(command, cwd=ROOT, check=False).returncode

    assert run("whole") == 0
    assert run("killed", kill_at=3) == -signal.SIGKILL
    assert not (tmp_path / "killed.pt").exists()
    assert run("killed") == 0
    whole, resumed = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
