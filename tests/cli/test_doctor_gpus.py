"""What the doctor says of GPUs, told by torch, NVIDIA's library, bitsandbytes and ONNX Runtime."""

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import bitsandbytes.cextension
import onnxruntime
import pytest
import torch

from graftline.doctor import gpus
from graftline.doctor.gpus import look_at_gpus
from graftline.doctor.machine import Finding

GIB = 1 << 30


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Finding]]:
    """Findings on a machine with these GPUs: (name, capability, free GiB, total GiB)."""

    def look(
        *cards: tuple[str, tuple[int, int], float, float],
        driver: str | None = "580.65",
        cuda: str | None = "13.0",
        bnb_cuda: bool = True,
        providers: tuple[str, ...] = ("CUDAExecutionProvider", "CPUExecutionProvider"),
    ) -> dict[str, Finding]:
        def version() -> str:
            if driver is None:
                raise gpus.pynvml.NVMLError(gpus.pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
            return driver

        def free(number: int) -> tuple[int, int]:
            if cards[number][2] < 0:
                raise RuntimeError("CUDA error: device(s) is/are busy or unavailable\nmore")
            return int(cards[number][2] * GIB), int(cards[number][3] * GIB)

        for name in ("nvmlInit", "nvmlShutdown"):
            monkeypatch.setattr(gpus.pynvml, name, lambda: None)
        monkeypatch.setattr(gpus.pynvml, "nvmlSystemGetDriverVersion", version)
        values: list[tuple[Any, str, Any]] = [
            (torch.version, "cuda", cuda),
            (torch.cuda, "is_available", lambda: bool(cards)),
            (torch.cuda, "device_count", lambda: len(cards)),
            (torch.cuda, "mem_get_info", free),
            (torch.cuda, "get_device_capability", lambda number=0: cards[number][1]),
            (torch.cuda, "get_device_name", lambda number=0: cards[number][0]),
            (bitsandbytes.cextension, "lib", SimpleNamespace(compiled_with_cuda=bnb_cuda)),
            (onnxruntime, "get_available_providers", lambda: list(providers)),
        ]
        for owner, name, value in values:
            monkeypatch.setattr(owner, name, value)
        return {finding.name: finding for finding in look_at_gpus()}

    return look


def test_every_gpu_is_looked_at_with_its_free_memory(machine: Callable[..., dict[str, Finding]]) -> None:
    found = machine(("H100", (9, 0), 79.0, 80.0), ("T4", (7, 5), 15.0, 16.0), ("A100", (8, 0), 3.0, 80.0))
    assert list(found) == ["cuda", "gpu 0", "gpu 1", "gpu 2", "bitsandbytes", "onnxruntime"]
    assert "built for CUDA 13.0; driver 580.65" in found["cuda"].found
    assert found["gpu 0"] == Finding("gpu 0", "ok", "H100, 79.0 of 80.0 GiB free, compute capability 9.0")
    assert found["gpu 1"].found.endswith("capability 7.5: no bf16")
    assert found["gpu 2"].advice.startswith("another program uses it")
    assert [found[name].status for name in ("bitsandbytes", "onnxruntime")] == ["ok", "ok"]


def test_a_gpu_that_cannot_be_used_stops_the_line(machine: Callable[..., dict[str, Finding]]) -> None:
    found = machine(("H100", (9, 0), -1.0, 80.0))["gpu 0"]
    assert (found.status, found.found) == (
        "missing",
        "cannot be used: CUDA error: device(s) is/are busy or unavailable",
    )


def test_libraries_without_cuda_are_named_with_what_to_install(machine: Callable[..., dict[str, Finding]]) -> None:
    found = machine(("H100", (9, 0), 79.0, 80.0), bnb_cuda=False, providers=("CPUExecutionProvider",))
    assert "without its CUDA library" in found["bitsandbytes"].found
    assert "onnxruntime-gpu" in found["onnxruntime"].advice


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"driver": None}, "none; torch"),
        ({"cuda": None}, "driver 580.65, but torch .* was built without CUDA"),
        ({}, "built for CUDA 13.0, sees no GPU"),
    ],
    ids=["no driver", "a build without CUDA", "a build that sees none"],
)
def test_why_there_is_no_gpu_is_said(
    machine: Callable[..., dict[str, Finding]], given: dict[str, Any], told: str
) -> None:
    found = machine(**given)
    assert list(found) == ["cuda"]
    assert found["cuda"].status == "note"
    assert re.search(told, found["cuda"].found)
