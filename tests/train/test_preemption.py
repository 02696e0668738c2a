"""SIGTERM while a training runs: the step is finished and kept, and the next try ends with the same bytes."""

import os
import signal
import threading
from pathlib import Path

import pytest

from graftline.errors import PreemptedError
from graftline.train.preemption import Preemption
from graftline.train.results import OnStep, StepMetrics
from graftline.train.trainer import train
from tests.sections import train_section
from tests.train.rows import lora_model, make_rows

_ROWS = make_rows(24)
_SETTINGS = train_section(steps=8, batch_size=4, learning_rate=1e-2, checkpoint_every=3, device="cpu")


def _asked_at(step: int) -> OnStep:
    def on_step(metrics: StepMetrics) -> None:
        if metrics.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return on_step


@pytest.mark.parametrize("step", [1, 3, 7])
def test_a_training_that_is_asked_to_end_keeps_every_step_it_made(tiny_llama: Path, tmp_path: Path, step: int) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(PreemptedError, match=rf"SIGTERM\) after step {step} of 8.*run again"):
        train(
            lora_model(tiny_llama, dropout=0.2),
            _ROWS,
            settings=_SETTINGS,
            work=tmp_path / "cut",
            on_step=_asked_at(step),
        )
    assert signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "cut" / f"checkpoint-{step}").is_dir()

    seen: list[int] = []
    model = lora_model(tiny_llama, dropout=0.2)
    work = tmp_path / "cut"
    resumed = train(model, _ROWS, settings=_SETTINGS, work=work, on_step=lambda metrics: seen.append(metrics.step))
    assert seen == list(range(step + 1, 9))

    whole = train(lora_model(tiny_llama, dropout=0.2), _ROWS, settings=_SETTINGS, work=tmp_path / "whole")
    assert resumed.losses == whole.losses
    first, second = ((tmp_path / name / "checkpoint-8/adapter.safetensors").read_bytes() for name in ("cut", "whole"))
    assert first == second


def test_a_training_that_writes_no_checkpoints_keeps_one_when_it_is_asked_to_end(
    tiny_llama: Path, tmp_path: Path
) -> None:
    settings = _SETTINGS.replace(checkpoint_every=0)
    with pytest.raises(PreemptedError):
        train(
            lora_model(tiny_llama),
            _ROWS,
            settings=settings,
            work=tmp_path,
            on_step=_asked_at(2),
        )
    assert (tmp_path / "checkpoint-2").is_dir()


def test_one_that_is_asked_during_its_last_step_just_ends(tiny_llama: Path, tmp_path: Path) -> None:
    on_step = _asked_at(8)
    result = train(lora_model(tiny_llama), _ROWS, settings=_SETTINGS, work=tmp_path, on_step=on_step)
    assert result.steps == 8


def test_a_thread_catches_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def enter() -> None:
        with Preemption() as preemption:
            found.append((preemption.is_asked, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(False, before)]
