"""Device, precision, threads and memory of the training process."""

import contextlib
import ctypes
import logging
import resource
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

import psutil
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graftline.errors import TrainError
from graftline.limits import memory_limits, usable_cores
from graftline.settings.model import Adapter, Device, Precision, Train
from graftline.weights.quant.linear import QuantLinear
from graftline.weights.sharded import held_bytes

_LOG = logging.getLogger(__name__)
DeviceKind = Literal["cpu", "cuda"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtype of each precision except `auto`, which `resolve_precision` maps to one of them."""
_PROC_STATUS = Path("/proc/self/status")
_PROC_CLEAR = Path("/proc/self/clear_refs")


_BF16_CAPABILITY = (8, 0)
"""Ampere. Earlier devices emulate bf16, several times slower than fp16, and torch calls that supported."""


def resolve_device(device: Device) -> DeviceKind:
    """Resolve ``device`` to a kind of device on this machine; NVIDIA's GPUs are the only ones that are used.

    Raises:
        TrainError: CUDA was requested but is not available.
    """
    other = untested_device()
    available = torch.cuda.is_available() and not other.startswith("ROCm")
    if device == "cuda" and not available:
        why = f"torch was built for {other}, which is not tested and not used" if other else "torch sees no CUDA device"
        raise TrainError(f"train.device is cuda, but {why}; write cpu or auto, or install a CUDA build of torch")
    if device == "auto" and other and not available:
        _say_unused(other)
    return "cuda" if available and device != "cpu" else "cpu"


def untested_device() -> str:
    """A kind of GPU that torch could use here but this project does not, because it was never tried; or nothing."""
    if getattr(torch.version, "hip", None):
        return f"ROCm {torch.version.hip}"
    return "Apple's MPS" if torch.backends.mps.is_available() else ""


@cache
def _say_unused(other: str) -> None:
    _LOG.warning("%s is not used, because nobody has tested it with graftline: everything runs on the CPU", other)


def resolve_precision(precision: Precision, device: DeviceKind) -> Precision:
    """Resolve ``precision`` for ``device``; fp16 is trained with a loss scaler.

    Raises:
        TrainError: fp16 on CPU (no loss scaling there), or bf16 on a CUDA device that only emulates it.
    """
    bf16 = device == "cpu" or has_bf16()
    if precision == "auto":
        return "fp32" if device == "cpu" else "bf16" if bf16 else "fp16"
    if precision == "fp16" and device == "cpu":
        raise TrainError("train.precision is fp16 on a CPU, where it is slow and overflows; write fp32 or bf16")
    if precision == "bf16" and not bf16:
        raise TrainError(f"train.precision is bf16, which {_without_bf16()}; write fp16, fp32 or auto")
    return precision


def scoring_dtype(precision: Precision, device: DeviceKind) -> torch.dtype:
    """The number type that ``evaluate.precision`` means on ``device``: bf16 on a GPU that has it, else fp32.

    Never fp16, in which the activations of models that were made in bf16 overflow.

    Raises:
        TrainError: bf16 on a CUDA device that only emulates it.
    """
    bf16 = device == "cpu" or has_bf16()
    if precision == "bf16" and not bf16:
        raise TrainError(f"evaluate.precision is bf16, which {_without_bf16()}; write fp32 or auto")
    if precision == "auto":
        precision = "bf16" if device == "cuda" and bf16 else "fp32"
    return DTYPES[precision]


def has_bf16() -> bool:
    """Whether this process's CUDA device supports bf16 in hardware."""
    return torch.cuda.get_device_capability() >= _BF16_CAPABILITY


def _without_bf16() -> str:
    major, minor = torch.cuda.get_device_capability()
    return (
        f"{torch.cuda.get_device_name()} does not have (compute capability {major}.{minor}, "
        f"{'.'.join(map(str, _BF16_CAPABILITY))} is needed)"
    )


def weight_dtype(arithmetic: torch.dtype, adapter: Adapter) -> torch.dtype:
    """Dtype of the base's dense weights: the compute dtype, or fp32 if some of them are trained."""
    trains_base = adapter.method == "full" or adapter.bias != "none" or bool(adapter.modules_to_save)
    return torch.float32 if trains_base else arithmetic


def needs_autocast(model: nn.Module, arithmetic: torch.dtype) -> bool:
    """Whether a training in ``arithmetic`` needs autocast.

    bf16 does not if every frozen weight has that dtype already: adapters cast their own factors, and autocast would
    copy activations to fp32 and back at each of them. fp16 keeps it for the operations that overflow.
    """
    if arithmetic != torch.bfloat16:
        return arithmetic != torch.float32
    frozen = [p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    return not frozen or any(held != arithmetic for held in frozen)


_M_MMAP_THRESHOLD, _MAPPED_BYTES = -3, 1 << 20


def return_freed_tensors(settings: Train) -> None:
    """With gradient checkpointing on a CPU, return freed memory of 1 MiB and more to the system at once.

    This lasts for the rest of the process. glibc (2.36) requests slightly more than an aligned tensor needs, so the
    hole that a tensor leaves is too small for the next one of its size. With recomputation, holes add up to several
    times the live memory (studies/memory.py: 1,244 MB resident for 311 MB of tensors), and nothing would be saved.
    Returning memory costs time, so other trainings keep glibc's default. Without glibc nothing happens.
    """
    if settings.gradient_checkpointing and resolve_device(settings.device) == "cpu":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Run with ``count`` threads per operation (None: `usable_cores`), then restore the previous number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or usable_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def reset_peak_memory(device: DeviceKind) -> None:
    """Restart peak memory measurement. On a CPU outside Linux, the peak still covers the process so far."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        _PROC_CLEAR.write_text("5", encoding="utf-8")  # resets VmHWM, see proc(5)


def free_bytes(device: DeviceKind) -> int:
    """Free memory in bytes: of the CUDA device, or of the machine within this process's limits."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    machine = int(psutil.virtual_memory().available)
    return min([machine, *(limit.left for limit in memory_limits())])


def what_limits(device: DeviceKind) -> str:
    """Message text for the limit that leaves less memory than the machine has free; empty if there is none."""
    if device == "cuda":
        return ""
    machine = int(psutil.virtual_memory().available)
    tightest = next((limit for limit in memory_limits() if limit.left < machine), None)
    return f" within the {tightest.limit / 1e9:.2f} GB that {tightest.source} allows" if tightest else ""


def used_bytes(device: DeviceKind) -> int:
    """Memory in use in bytes: allocated on CUDA, resident set of the process on CPU (0 if unknown)."""
    if device == "cuda":
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration):
        return _status_bytes("VmRSS")
    return 0


def peak_memory_bytes(device: DeviceKind) -> int:
    """Peak memory in bytes since `reset_peak_memory`: allocated on CUDA, resident set of the process on CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration):
        return _status_bytes("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status_bytes(name: str) -> int:
    line = next(line for line in _PROC_STATUS.read_text(encoding="utf-8").splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


# Measured memory by part: tensors are counted, and the rest of the peak is attributed to the step.

STEP_PARTS = ("gradients", "activations", "logits", "transient", "gathered weights")
"""Parts of the plan that exist only during a step; only their sum can be measured."""
_CONSTANTS = ("absmax", "nested_absmax", "nested_offset")


def measured_parts(model: nn.Module, *, optimizer_bytes: int, peak_bytes: int) -> dict[str, int]:
    """Measured bytes of a training, by part.

    Args:
        model: the trained model, with its adapter.
        optimizer_bytes: size of the optimizer's states, from `state_bytes`.
        peak_bytes: peak memory of the training.

    Returns:
        Weights, quantization constants, adapters, optimizer, and the rest of the peak as ``step``.
    """
    parameters = list(model.parameters())
    trained = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
    everything = sum(held_bytes(tensor) for tensor in (*parameters, *model.buffers()))
    constants = sum(
        held_bytes(tensor)
        for layer in model.modules()
        if isinstance(layer, QuantLinear)
        for tensor in (getattr(layer, name) for name in _CONSTANTS)
        if tensor is not None
    )
    parts = {
        "weights": everything - trained - constants,
        "quantization constants": constants,
        "adapters": trained,
        "optimizer": optimizer_bytes,
    }
    return parts | {"step": max(0, peak_bytes - sum(parts.values()))}


def state_bytes(optimizer: Optimizer | None) -> int:
    """Bytes of an optimizer's states; 0 before its first step."""
    if optimizer is None:
        return 0
    states = optimizer.state.values()
    return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))
