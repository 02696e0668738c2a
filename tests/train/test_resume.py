"""Killed at any step, the same final bytes: every method on dense and 4-bit bases, cut into micro-batches, packed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

import graftline.workflow.resolve
import tasks.fetch
import tasks.init
from graftline.adapters.attach import attach, plan_layers
from graftline.adapters.methods import METHODS
from graftline.errors import TrainError
from graftline.settings.model import Adapter, Optimizer, Train
from graftline.train.results import StepMetrics, ignore_step
from graftline.train.trainer import train
from graftline.weights.model_folder import load_skeleton
from graftline.weights.quant.folder import initialize
from graftline.weights.quant.linear import load_model
from graftline.weights.quant.low_rank import FactorSettings, read_factors
from tests.adapters.stand_in import make_experts
from tests.line.project import ROOT, write_yaml
from tests.sections import adapter_section, quantize_section, train_section
from tests.tiny import make_tiny_llama
from tests.train.killing import kill_at, run_and_die
from tests.train.rows import make_rows
from tests.workflow.opened import Opened, open_pipeline
from tests.workflow.tiny_project import PIPELINE
from tests.workflow.tiny_project import make_rows as pet_rows
from tests.workflow.tiny_project import tiny_settings as pet_settings

_ROWS = make_rows(24)
_SETTINGS = train_section(
    steps=5, batch_size=4, learning_rate=1e-2, scheduler="linear", checkpoint_every=2, device="cpu"
)
_PAIRED = {"pissa": "qpissa", "loftq": "loftq"}
"""Methods whose first values are made together with a quantized base."""
DENSE = ["full", "houlsby", "pfeiffer", "lora", "rslora", "dora", "pissa", "vera"]
QUANTIZED = ["houlsby", "pfeiffer", "lora", "rslora", "dora", "pissa", "vera", "loftq"]
LAYOUTS = [(1, False), (2, False), (1, True), (2, True)]
"""Gradient accumulation, packing."""


@pytest.fixture(scope="module")
def quantized(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny base in 4 bits, as a method wants it."""
    made: dict[str, Path] = {}

    def folder(method: str) -> Path:
        init = _PAIRED.get(method, "plain")
        if init not in made:
            made[init] = tmp_path_factory.mktemp("quantized") / init
            layers = plan_layers(load_skeleton(tiny_llama), _spec(method))
            wanted = {name: FactorSettings(rank=layer.rank, scale=layer.scale) for name, layer in layers.items()}
            factors, quantize = None if init == "plain" else wanted.get, quantize_section(init=init)
            initialize(tiny_llama, made[init], quantize=quantize, seed=0, factors=factors)
        return made[init]

    return folder


def _spec(method: str) -> Adapter:
    return adapter_section(method, rank=4, alpha=8, dropout=0.0 if method == "full" else 0.1)


def _model(base: Path, method: str) -> PreTrainedModel:
    model = load_model(base)
    attach(model, _spec(method), seed=0, initial=read_factors(base) if base.name in _PAIRED.values() else None)
    return model


def _same_bytes(base: Path, method: str, tmp_path: Path, *, killed_at: int, settings: Train) -> None:
    def run(work: Path, on_step: Callable[[StepMetrics], None] = ignore_step) -> tuple[float, ...]:
        return train(_model(base, method), _ROWS, settings=settings, work=work, on_step=on_step).losses

    _killed_is_whole(run, tmp_path, killed_at=killed_at)


def _killed_is_whole(run: Callable[..., tuple[float, ...]], tmp_path: Path, *, killed_at: int) -> None:
    whole = run(tmp_path / "whole")
    assert run_and_die(lambda: run(tmp_path / "cut", kill_at(killed_at))) == signal.SIGKILL
    assert run(tmp_path / "cut") == whole
    first, second = ((tmp_path / name / "checkpoint-5/adapter.safetensors").read_bytes() for name in ("whole", "cut"))
    assert first == second


def _cases(methods: list[str]) -> list[object]:
    """Each method once, its layout and the step at which it dies in turns."""
    chosen = [(LAYOUTS[at % 4], 1 + (3 * at + 2) % 5) for at in range(len(methods))]
    return [
        pytest.param(method, pieces, packing, step, id=f"{method}-{pieces}-{'packed' if packing else 'padded'}-{step}")
        for method, ((pieces, packing), step) in zip(methods, chosen, strict=True)
    ]


def _settings(accumulation: int, packing: bool) -> Train:
    return _SETTINGS.replace(batch_size=4 // accumulation, gradient_accumulation=accumulation, packing=packing)


@pytest.mark.parametrize(("method", "accumulation", "packing", "step"), _cases(DENSE))
def test_on_a_dense_base(
    tiny_llama: Path, tmp_path: Path, method: str, accumulation: int, packing: bool, step: int
) -> None:
    _same_bytes(tiny_llama, method, tmp_path, killed_at=step, settings=_settings(accumulation, packing))


@pytest.mark.parametrize(("method", "accumulation", "packing", "step"), _cases(QUANTIZED))
def test_on_a_4_bit_base(
    quantized: Callable[[str], Path], tmp_path: Path, method: str, accumulation: int, packing: bool, step: int
) -> None:
    _same_bytes(quantized(method), method, tmp_path, killed_at=step, settings=_settings(accumulation, packing))


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_with_states_in_8_bits_and_in_pages(
    quantized: Callable[[str], Path], tmp_path: Path, optimizer: Optimizer
) -> None:
    settings = _settings(2, False).replace(optimizer=optimizer)
    _same_bytes(quantized("lora"), "lora", tmp_path, killed_at=3, settings=settings)


@pytest.mark.slow
@pytest.mark.parametrize(("accumulation", "packing"), [(1, False), (2, True)])
@pytest.mark.parametrize("step", [pytest.param(step, marks=[pytest.mark.long] * (step != 4)) for step in range(1, 6)])
@pytest.mark.parametrize("is_quantized", [False, True], ids=["dense", "nf4"])
def test_at_every_step_in_every_layout(
    tiny_llama: Path,
    quantized: Callable[[str], Path],
    tmp_path: Path,
    is_quantized: bool,
    step: int,
    accumulation: int,
    packing: bool,
) -> None:
    base = quantized("dora") if is_quantized else tiny_llama
    _same_bytes(base, "dora", tmp_path, killed_at=step, settings=_settings(accumulation, packing))


def test_with_factors_that_experts_share(tmp_path: Path) -> None:
    targets = ("q_proj", "experts.gate_up_proj", "experts.down_proj")
    spec = Adapter(method="lora", rank=3, targets=targets, experts="shared_outer")

    def run(work: Path, on_step: Callable[[StepMetrics], None] = ignore_step) -> tuple[float, ...]:
        model = make_experts("mixtral")
        attach(model, spec, seed=0)
        return train(model, make_rows(24, vocab_size=96), settings=_SETTINGS, work=work, on_step=on_step).losses

    _killed_is_whole(run, tmp_path, killed_at=3)


def test_the_matrix_is_whole() -> None:
    assert {*DENSE, *QUANTIZED, "qpissa"} == set(METHODS)


def test_another_quantized_base_is_found_by_the_first_loss_after_the_resume(
    quantized: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = _settings(2, False)

    def run(model: PreTrainedModel, on_step: Callable[[StepMetrics], None] = ignore_step) -> None:
        train(model, _ROWS, settings=settings, work=tmp_path, on_step=on_step)

    run_and_die(lambda: run(_model(quantized("lora"), "lora"), kill_at(4)))
    damaged = _model(quantized("lora"), "lora")
    damaged.model.layers[0].mlp.gate_proj.base.quantized.packed.bitwise_xor_(0x70)
    with pytest.raises(TrainError, match=r"step 3 has loss .* after the resume, but .* was recorded before"):
        run(damaged)


@pytest.mark.long
@pytest.mark.slow
def test_the_train_stage_killed_in_its_own_process_leaves_the_adapter_of_one_that_was_not(tmp_path: Path) -> None:
    opened = _project(tmp_path)
    for step in (1, 7):
        _kill_stage(tmp_path, after_step=step)
    _run_stage(tmp_path)
    cut = _files(opened.at.folder("train") / "adapter")
    shutil.rmtree(opened.at.runs / ".work")
    shutil.rmtree(opened.at.folder("train"))
    _run_stage(tmp_path)
    assert cut == _files(opened.at.folder("train") / "adapter")


def _project(root: Path) -> Opened:
    """A tiny project up to its 4-bit base."""
    make_tiny_llama(root / "base")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pet_rows(200)))
    pipeline = pet_settings() | {
        "quantize": {"method": "nf4"},
        "adapter": {"method": "dora", "rank": 4, "dropout": 0.1},
    }
    pipeline["train"] |= {
        "steps": 12, "batch_size": 4, "gradient_accumulation": 2, "packing": True, "checkpoint_every": 2
    }  # fmt: skip
    write_yaml(root, {"pipelines": {PIPELINE: pipeline}, "channels": {"production": {}}})
    opened = open_pipeline(PIPELINE, root)
    for stage in (graftline.workflow.resolve, tasks.fetch, tasks.init):
        stage.run(*opened)
    return opened


def _stage(root: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tasks.train", PIPELINE]
    return subprocess.Popen(command, cwd=root, env=os.environ | {"PYTHONPATH": str(ROOT)})


def _run_stage(root: Path) -> None:
    assert _stage(root).wait() == 0


def _kill_stage(root: Path, *, after_step: int) -> None:
    """SIGKILL as soon as the journal holds the step."""
    process = _stage(root)
    while process.poll() is None:
        (journal,) = [*(root / "runs" / PIPELINE / ".work").glob("train-*/steps.jsonl")] or [None]
        if journal and len(journal.read_text().splitlines()) > after_step:  # one line is its header
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    assert process.wait() == -signal.SIGKILL


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
