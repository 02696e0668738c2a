"""Stage init: the base as the adapter will be trained on it, quantized as the pipeline says.

Writes ``base/``: a model folder with its error report and, where base and adapter are made together (LoftQ, QPiSSA),
the adapter's first values. Where nothing is quantized the fetched base serves as it is; ``init.json`` says so.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from graftline.adapters.attach import plan_layers
from graftline.digest import write_json
from graftline.progress import Reporter
from graftline.train.devices import usable_cores
from graftline.weights.quant.factors import Factors
from graftline.weights.quant.init import initialize, peak_bytes_bound
from graftline.weights.quant.load import load_skeleton
from graftline.workflow import stage
from graftline.workflow.base import original_base
from graftline.workflow.stage import Context


def run(context: Context) -> None:
    """Quantize the base, one tensor at a time."""
    quantize, out = context.pipeline.quantize, context.folder("init")
    source = original_base(context)
    if quantize.method == "none":
        write_json(out / "init.json", {"quantized": False})
        return
    torch.set_num_threads(context.pipeline.train.threads or usable_cores())
    stage.logger.info("memory: at most %.2f GB", peak_bytes_bound(source) / 1e9)
    report = initialize(
        source,
        out / "base",
        quantize=quantize,
        seed=context.pipeline.train.seed,
        factors=None if quantize.init == "plain" else _factors(context, source),
        on_progress=Reporter("init", "tensors"),
    )
    write_json(out / "init.json", {"quantized": True, "bits_per_weight": report.bits_per_weight})
    worst = max(report.layers, key=lambda layer: layer.error)
    stage.logger.info(
        "%d layers, %.3f bits a weight, largest error %.4f (%s)",
        len(report.layers),
        report.bits_per_weight,
        worst.error,
        worst.module,
    )


def _factors(context: Context, source: Path) -> Callable[[str], Factors | None]:
    """Rank and scale of the adapter that each layer will get: base and adapter are made for each other."""
    spec = context.pipeline.adapter
    layers = plan_layers(load_skeleton(source), spec)
    found = {name: Factors(rank=layer.rank, scale=layer.scale) for name, layer in layers.items()}
    return found.get


def main() -> None:
    """Command line."""
    stage.main("init", run)


if __name__ == "__main__":
    main()
