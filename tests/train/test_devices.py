import mmap
from pathlib import Path

import pytest
import torch

from graftline.errors import TrainError
from graftline.train.devices import (
    cpu_threads,
    peak_memory_bytes,
    reset_peak_memory,
    resolve_device,
    resolve_precision,
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
