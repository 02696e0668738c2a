"""Prepares the base for adapter training, quantized as the pipeline specifies."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from graftline.adapters.attach import plan_layers
from graftline.digest import write_json
from graftline.errors import TrainError
from graftline.limits import usable_cores
from graftline.logs import Reporter
from graftline.settings.model import Adapter, Pipeline
from graftline.train.devices import DeviceKind, free_bytes, resolve_device, what_limits
from graftline.weights.model_folder import load_skeleton
from graftline.weights.quant.folder import device_bytes_bound, initialize, peak_bytes_bound
from graftline.weights.quant.low_rank import FactorSettings

logger = logging.getLogger("graftline")


def init_base(pipeline: Pipeline, *, base: Path, out: Path, rows: Sequence[Sequence[int]] = ()) -> None:
    """Quantize the base into ``out``/base, one tensor at a time; ``out``/init.json says whether it was quantized.

    Args:
        pipeline: its ``quantize`` is read; if base and adapter are initialized together, its ``adapter`` too.
        base: folder of the model to quantize.
        out: output folder.
        rows: token ids of the rows on which a weighted start is calibrated.

    Raises:
        TrainError: not even half of what it may take is free.
        QuantizeError, CheckpointError: as `graftline.weights.quant.folder.initialize`.
    """
    quantize = pipeline.quantize
    if quantize.method == "none":
        write_json(out / "init.json", {"quantized": False})
        return
    torch.set_num_threads(pipeline.train.threads or usable_cores())
    device = resolve_device(pipeline.train.device) if quantize.weighting == "none" else "cpu"
    _check_memory(device, device_bytes_bound(base) if device == "cuda" else peak_bytes_bound(base, quantize, rows))
    report = initialize(
        base,
        out / "base",
        quantize=quantize,
        seed=pipeline.train.seed,
        factors=None if quantize.init_kind == "plain" else factors_of(pipeline.adapter, base),
        rows=rows,
        device=device,
        on_progress=Reporter("init", "tensors"),
    )
    write_json(out / "init.json", {"quantized": True, "bits_per_weight": report.bits_per_weight})
    worst = max(report.layers, key=lambda layer: layer.error)
    logger.info(
        "%d layers, %.3f bits a weight, largest error %.4f (%s)",
        len(report.layers),
        report.bits_per_weight,
        worst.error,
        worst.module,
    )


def _check_memory(device: DeviceKind, bound: int) -> None:
    where = "the GPU" if device == "cuda" else "this machine"
    logger.info("memory of %s: at most %.2f GB", where, bound / 1e9)
    if (free := free_bytes(device)) >= bound / 2:
        return
    elsewhere = "write train.device: cpu if main memory is larger" if device == "cuda" else "take a larger machine"
    raise TrainError(
        f"stage init takes up to {bound / 1e9:.2f} GB of {where}, {free / 1e9:.2f} GB are free{what_limits(device)}: "
        f"end what else uses it, or {elsewhere}"
    )


def factors_of(adapter: Adapter, base: Path) -> Callable[[str], FactorSettings | None]:
    """Rank and scale of each layer's adapter, to initialize base and adapter together."""
    layers = plan_layers(load_skeleton(base), adapter)
    found = {name: FactorSettings(rank=layer.rank, scale=layer.scale) for name, layer in layers.items()}
    return found.get
