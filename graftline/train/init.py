"""Prepares the base for adapter training, quantized as the pipeline specifies."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from graftline.adapters.attach import plan_layers
from graftline.digest import write_json
from graftline.limits import usable_cores
from graftline.logs import Reporter
from graftline.settings.model import Adapter, Pipeline
from graftline.weights.model_folder import load_skeleton
from graftline.weights.quant.folder import initialize, peak_bytes_bound
from graftline.weights.quant.low_rank import FactorSettings

logger = logging.getLogger("graftline")


def init_base(pipeline: Pipeline, *, base: Path, out: Path) -> None:
    """Quantize the base into ``out``/base, one tensor at a time; ``out``/init.json says whether it was quantized.

    Args:
        pipeline: its ``quantize`` is read; if base and adapter are initialized together, its ``adapter`` too.
        base: folder of the model to quantize.
        out: output folder.
    """
    quantize = pipeline.quantize
    if quantize.method == "none":
        write_json(out / "init.json", {"quantized": False})
        return
    torch.set_num_threads(pipeline.train.threads or usable_cores())
    logger.info("memory: at most %.2f GB", peak_bytes_bound(base) / 1e9)
    report = initialize(
        base,
        out / "base",
        quantize=quantize,
        seed=pipeline.train.seed,
        factors=None if quantize.init == "plain" else factors_of(pipeline.adapter, base),
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


def factors_of(adapter: Adapter, base: Path) -> Callable[[str], FactorSettings | None]:
    """Rank and scale of each layer's adapter, to initialize base and adapter together."""
    layers = plan_layers(load_skeleton(base), adapter)
    found = {name: FactorSettings(rank=layer.rank, scale=layer.scale) for name, layer in layers.items()}
    return found.get
