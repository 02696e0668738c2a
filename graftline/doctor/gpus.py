"""Checks of the GPUs: driver, torch's build, free memory of each, bitsandbytes' library, ONNX Runtime's provider."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import pynvml

from graftline.doctor.machine import Finding

_GIB = 1 << 30
_CUDA_TORCH = (
    "pip install torch --index-url https://download.pytorch.org/whl/cu130, or another index that fits the driver"
)


def look_at_gpus() -> Iterator[Finding]:
    """Check what training, evaluation and serving need of a GPU; without one, say that everything runs on the CPU."""
    try:
        import torch
    except ImportError as error:
        yield Finding("cuda", "missing", f"torch cannot be imported: {error}", "make setup")
        return
    driver = _driver()
    if not torch.cuda.is_available() or getattr(torch.version, "hip", None):
        yield _why_none(torch, driver)
        return
    yield Finding("cuda", "ok", f"torch {torch.__version__}, built for CUDA {torch.version.cuda}; {driver}")
    for number in range(torch.cuda.device_count()):
        yield _gpu(torch, number)
    yield _bitsandbytes()
    yield _provider()


def _driver() -> str:
    """NVIDIA's driver, or nothing."""
    try:
        pynvml.nvmlInit()
        try:
            return f"driver {pynvml.nvmlSystemGetDriverVersion()}"
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return ""


def _why_none(torch: Any, driver: str) -> Finding:
    from graftline.train.devices import untested_device

    on_cpu = "everything runs on the CPU"
    if other := untested_device():
        return Finding("cuda", "note", f"none; torch {torch.__version__} for {other}, which is not tested", on_cpu)
    if not driver:
        return Finding("cuda", "note", f"none; torch {torch.__version__}", on_cpu)
    if torch.version.cuda is None:
        found = f"{driver}, but torch {torch.__version__} was built without CUDA: {on_cpu}"
        return Finding("cuda", "note", found, _CUDA_TORCH)
    found = f"{driver}, but torch {torch.__version__}, built for CUDA {torch.version.cuda}, sees no GPU: {on_cpu}"
    return Finding("cuda", "note", found, "look at CUDA_VISIBLE_DEVICES, and whether the driver is as new as that CUDA")


def _gpu(torch: Any, number: int) -> Finding:
    name = f"gpu {number}"
    try:
        free, total = torch.cuda.mem_get_info(number)
        major, minor = torch.cuda.get_device_capability(number)
        what = torch.cuda.get_device_name(number)
    except RuntimeError as error:  # another process holds the GPU exclusively, or it has fallen off the bus
        return Finding(
            name, "missing", f"cannot be used: {str(error).splitlines()[0]}", "leave it out: CUDA_VISIBLE_DEVICES"
        )
    found = f"{what}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free, compute capability {major}.{minor}"
    if (major, minor) < (8, 0):
        return Finding(name, "note", f"{found}: no bf16", "precision: auto trains in fp16 and evaluates in fp32 there")
    if free < total / 2:
        return Finding(name, "note", found, "another program uses it: nvidia-smi names which")
    return Finding(name, "ok", found)


def _bitsandbytes() -> Finding:
    if importlib.util.find_spec("bitsandbytes") is None:
        advice = "pip install bitsandbytes: NF4 is decoded by slower kernels, and there are no paged optimizers"
        return Finding("bitsandbytes", "note", "not installed", advice)
    from bitsandbytes import __version__, cextension

    if getattr(cextension.lib, "compiled_with_cuda", False):
        return Finding("bitsandbytes", "ok", f"{__version__}, its CUDA library is loaded")
    advice = "install a release that has a library for torch's CUDA version (`python -m bitsandbytes` says more)"
    return Finding("bitsandbytes", "note", f"{__version__}, without its CUDA library: NF4 is slower", advice)


def _provider() -> Finding:
    if importlib.util.find_spec("onnxruntime") is None:
        return Finding("onnxruntime", "note", "not installed", "pip install 'graftline[serve]' to serve")
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return Finding("onnxruntime", "ok", f"{onnxruntime.__version__} with CUDA")
    found = f"{onnxruntime.__version__} without CUDA: `graftline serve` computes on the CPU"
    return Finding("onnxruntime", "note", found, "pip install onnxruntime-gpu in its place to serve on the GPU")
