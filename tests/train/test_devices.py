import mmap
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from graftline.errors import TrainError
from graftline.settings.model import Adapter
from graftline.train.devices import (
    cpu_threads,
    peak_memory_bytes,
    reset_peak_memory,
    resolve_device,
    resolve_precision,
    scoring_dtype,
    weight_dtype,
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused_and_auto_takes_the_cpu() -> None:
    assert resolve_device("auto") == "cpu"
    with pytest.raises(TrainError, match=r"train\.device is cuda, but torch sees no CUDA device"):
        resolve_device("cuda")


def test_on_a_cpu_auto_is_fp32_and_fp16_is_refused() -> None:
    assert resolve_precision("auto", "cpu") == "fp32"
    assert resolve_precision("bf16", "cpu") == "bf16"
    with pytest.raises(TrainError, match=r"train\.precision is fp16 on a CPU"):
        resolve_precision("fp16", "cpu")


def test_the_thread_count_is_put_back_after_an_error() -> None:
    before = torch.get_num_threads()
    inside = cpu_threads(before + 1)
    inside.__enter__()
    assert torch.get_num_threads() == before + 1
    assert not inside.__exit__(KeyError, KeyError(), None)
    assert torch.get_num_threads() == before


def test_peak_memory_on_a_cpu_counts_what_was_freed_since_the_reset() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this system cannot start a new peak for a process")
    reset_peak_memory("cpu")
    before = peak_memory_bytes("cpu")
    # Fresh pages: a tensor of this size may be cut from memory that an earlier test freed and the heap kept.
    with mmap.mmap(-1, 32 << 20) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
    assert (24 << 20) < peak_memory_bytes("cpu") - before < (48 << 20)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_checkpointing_freed_tensors_go_back_to_the_system(checkpointing: bool) -> None:
    """In a process of its own: the setting stays for the rest of it. Every other tensor of 8 MB is freed."""
    code = f"""
import torch
from graftline.train.devices import return_freed_tensors, used_bytes
from graftline.settings.model import Train
from tests.sections import train_section

return_freed_tensors(train_section(steps=1, device="cpu", gradient_checkpointing={checkpointing}))
torch.ones(7_000_000)  # freed: from now on glibc puts what is smaller on its heap
tensors = [torch.ones(2_000_000) for _ in range(20)]
before = used_bytes("cpu")
del tensors[::2]
print(before - used_bytes("cpu"))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (int(done.stdout) > 70_000_000) == checkpointing


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        ({"method": "lora"}, torch.bfloat16),
        ({"method": "full"}, torch.float32),
        ({"method": "lora", "bias": "all"}, torch.float32),
        ({"method": "lora", "modules_to_save": ("lm_head",)}, torch.float32),
    ],
)
def test_dense_weights_are_held_as_they_are_computed_with_unless_some_are_trained(
    adapter: dict[str, Any], expected: torch.dtype
) -> None:
    assert weight_dtype(torch.bfloat16, Adapter(**adapter)) == expected


@pytest.fixture(params=[((7, 5), False), ((8, 0), True), ((9, 0), True)], ids=["T4", "A100", "H100"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A GPU of some capability; whether it has bf16. torch calls bf16 supported on all of them."""
    capability, has_bf16 = request.param
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: capability)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: "Tesla T4")
    return bool(has_bf16)


def test_auto_is_bf16_only_where_the_gpu_computes_in_it(gpu: bool) -> None:
    assert resolve_precision("auto", "cuda") == ("bf16" if gpu else "fp16")
    assert scoring_dtype("auto", "cuda") == (torch.bfloat16 if gpu else torch.float32)
    assert scoring_dtype("fp32", "cuda") == torch.float32
    if gpu:
        assert resolve_precision("bf16", "cuda") == "bf16"
        return
    for resolve, key in ((resolve_precision, "train"), (scoring_dtype, "evaluate")):
        with pytest.raises(TrainError, match=rf"{key}\.precision is bf16, which Tesla T4 .*7\.5, 8\.0 is needed"):
            resolve("bf16", "cuda")


def test_on_a_cpu_models_are_scored_in_fp32_unless_bf16_is_asked_for() -> None:
    assert (scoring_dtype("auto", "cpu"), scoring_dtype("bf16", "cpu")) == (torch.float32, torch.bfloat16)


def test_a_rocm_build_is_named_and_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # as ROCm's builds say
    monkeypatch.setattr("torch.version.hip", "6.4.1")
    assert resolve_device("auto") == "cpu"
    assert "ROCm 6.4.1 is not used, because nobody has tested it" in caplog.text
    with pytest.raises(TrainError, match=r"torch was built for ROCm 6\.4\.1, which is not tested and not used"):
        resolve_device("cuda")


def test_mps_is_named_and_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert resolve_device("auto") == "cpu"
    assert resolve_device("cpu") == "cpu"
    assert caplog.text.count("Apple's MPS is not used") == 1
