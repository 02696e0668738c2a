"""Stage init: the base as the adapter will be trained on it, quantized as the pipeline says.

Writes ``base/``: a model folder with its error report and, where base and adapter are made together (LoftQ, QPiSSA),
the adapter's first values. Where nothing is quantized the fetched base serves as it is; ``init.json`` says so.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch

from graftline.adapters.attach import plan_layers
from graftline.adapters.spec import AdapterSpec
from graftline.config import Quantize
from graftline.digest import write_json
from graftline.errors import QuantizeError
from graftline.progress import Reporter
from graftline.quant.factors import Factors
from graftline.quant.init import InitPlan, initialize, peak_bytes_bound
from graftline.quant.load import load_skeleton
from graftline.quant.plan import QuantizationPlan
from graftline.quant.scheme import Scheme
from tasks import stage
from tasks.base import original_base
from tasks.stage import Context

_CODES = {2: "nf2", 3: "nf3", 4: "nf4"}


def run(context: Context) -> None:
    """Quantize the base, one tensor at a time."""
    quantize, out = context.pipeline.quantize, context.folder("init")
    source = original_base(context)
    if quantize.method == "none":
        write_json(out / "init.json", {"quantized": False})
        return
    torch.set_num_threads(stage.num_threads(context))
    stage.logger.info("memory: at most %.2f GB", peak_bytes_bound(source) / 1e9)
    paired = quantize.init != "plain"
    plan = InitPlan(
        quantization_plan(quantize),
        method=quantize.init if quantize.init != "plain" else "none",
        steps=quantize.loftq_iterations,
        seed=context.pipeline.train.seed,
    )
    report = initialize(
        source,
        out / "base",
        plan=plan,
        factors=_factors(context, source) if paired else None,
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
    spec = AdapterSpec(**context.pipeline.adapter.model_dump())
    layers = plan_layers(load_skeleton(source), spec)
    found = {name: Factors(rank=layer.rank, scale=layer.scale) for name, layer in layers.items()}
    return found.get


def quantization_plan(quantize: Quantize) -> QuantizationPlan:
    """The library's plan for a pipeline's ``quantize`` section."""

    def scheme(bits: int) -> Scheme:
        return Scheme(_CODES[bits], quantize.block_size, quantize.double_quant)

    if quantize.method != "mixed":
        return QuantizationPlan(Scheme(quantize.method, quantize.block_size, quantize.double_quant))
    rules = tuple((_pattern(key), scheme(bits)) for key, bits in quantize.bits.items())
    return QuantizationPlan(scheme(4), rules)


def _pattern(key: str) -> str:
    """A layer range such as ``0-7`` as a regular expression on the module's path; anything else is one already."""
    bounds = re.fullmatch(r"(\d+)-(\d+)", key)
    if not bounds:
        return key
    first, last = int(bounds[1]), int(bounds[2])
    if first > last:
        raise QuantizeError(f"quantize.bits names the layers {key}; expected the smaller number first")
    return rf".*\.(?:{'|'.join(map(str, range(first, last + 1)))})\."


def main() -> None:
    """Command line."""
    stage.main("init", run)


if __name__ == "__main__":
    main()
