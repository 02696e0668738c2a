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
