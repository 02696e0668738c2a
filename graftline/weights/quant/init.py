"""Quantized initialization of a base, streamed: read one tensor, quantize, write.

An interrupted run goes on at the next tensor: everything random is drawn from a seed and the layer's name, so a layer
that is made again has the same bytes. Nothing appears under the final name before all of it is written.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from graftline.digest import Digest, of_json, write_json
from graftline.errors import QuantizeError
from graftline.progress import OnProgress, silent
from graftline.settings.model import Quantize
from graftline.weights.arch import Architecture
from graftline.weights.cast import is_finite
from graftline.weights.disk import check_free_space
from graftline.weights.identity import read_identity
from graftline.weights.model_reader import ModelReader
from graftline.weights.quant.factors import Factors
from graftline.weights.quant.hf_config import quantization_config
from graftline.weights.quant.layer import InitializedLayer, initialize_paired, initialize_plain
from graftline.weights.quant.output import Output
from graftline.weights.quant.plan import QuantizationPlan, plan_of
from graftline.weights.quant.report import InitReport
from graftline.weights.quant.scheme import Scheme
from graftline.weights.quant.tensors import quantized_weights
from graftline.weights.reader import read_json_object
from graftline.weights.sidecars import copy_sidecars

_LOG = logging.getLogger(__name__)
# Interpreter, torch and transformers, and the buffers that do not grow with the model.
_PROCESS_BYTES = 700_000_000

FactorsOf = Callable[[str], Factors | None]
"""Rank and scale of the adapter on a linear layer, by the layer's path; None for a layer without one."""


def peak_bytes_bound(source: Path) -> int:
    """Upper bound of the process's memory in an initialization: 4 × the largest tensor + 700 MB."""
    return 4 * ModelReader(source).largest_bytes + _PROCESS_BYTES


def initialize(
    source: Path,
    out: Path,
    *,
    quantize: Quantize,
    seed: int,
    factors: FactorsOf | None = None,
    on_progress: OnProgress = silent,
) -> InitReport:
    """Make the folder ``out`` from the dense folder ``source``; goes on where an interrupted call stopped.

    Beside a model folder's files, ``out`` gets `quantization.json` (the report) and, with LoftQ or QPiSSA, the factors
    that the adapter must start from (`checkpoint.factors`).

    Args:
        source: a dense model folder.
        out: the folder to make.
        quantize: the pipeline's section.
        seed: of the random projections that LoftQ and QPiSSA find their factors with.
        factors: which adapter each layer will get; those two methods need it.
        on_progress: called with tensors done and in all.

    Raises:
        CheckpointError: a damaged or unknown source, too little disk, ``out`` exists.
        QuantizeError: nothing to quantize; the source is quantized already; Inf or NaN in a tensor, a weight that is
            not two-dimensional (each named); a rule that matches nothing.
    """
    reader, plan = ModelReader(source), plan_of(quantize)
    arch = reader.architecture
    schemes = _schemes(reader, arch, plan)
    wanted = _wanted_factors(schemes, quantize, factors)
    check_free_space(out, _output_bytes(reader, schemes, wanted))
    bound = peak_bytes_bound(source)
    _LOG.info("initializing %s takes at most %.2f GB of memory", out, bound / 1e9)
    source_digest, record = read_identity(source).digest, quantizer_record(quantize, seed)
    names = reader.names()
    with Output(out, job=_job(source_digest, record, wanted)) as output:
        for done, name in enumerate(names, start=1):
            scheme = schemes.get(name)
            if scheme is None and not output.has_tensor(name):
                output.add_tensor(name, _read_finite(reader, name))
            elif scheme is not None and not output.has_layer(name, scheme.code, paired=name in wanted):
                weight = _read_finite(reader, name)
                W_OI = weight.T if arch.conv1d else weight
                layer = _initialize_layer(name, W_OI, scheme, wanted.get(name), quantize, seed)
                output.add_layer(name, layer, source_dtype=weight.dtype)
            on_progress(done, len(names))
        _write_config(source, output.stage, plan, schemes)
        return output.finish(source_digest=source_digest, quantizer=record, peak_bytes_bound=bound)


def quantizer_record(quantize: Quantize, seed: int) -> dict[str, Any]:
    """What the identity of a quantized base says about how it was made. A record on disk: its keys and words stay."""
    paired = {"steps": quantize.loftq_iterations, "seed": seed}
    return {
        "method": "none" if quantize.init == "plain" else quantize.init,
        "quantization": plan_of(quantize).as_json(),
        **({} if quantize.init == "plain" else paired),
    }


def _initialize_layer(
    name: str, W_OI: Tensor, scheme: Scheme, factors: Factors | None, quantize: Quantize, seed: int
) -> InitializedLayer:
    module = name.removesuffix(".weight")
    if factors is None or quantize.init == "plain":
        return initialize_plain(module, W_OI, scheme)
    own_seed = int(of_json([seed, module]).hex[:15], 16)
    return initialize_paired(
        module, W_OI, scheme, factors, method=quantize.init, steps=quantize.loftq_iterations, seed=own_seed
    )


def _job(source: Digest, record: Mapping[str, Any], wanted: Mapping[str, Factors]) -> Digest:
    """Everything that decides the content of the folder."""
    return of_json([str(source), record, {name: asdict(factors) for name, factors in wanted.items()}])


def _schemes(reader: ModelReader, arch: Architecture, plan: QuantizationPlan) -> dict[str, Scheme]:
    """Scheme of every linear layer's weight, after everything about them that can be known beforehand was checked."""
    if quantized := quantized_weights(reader.names()):
        raise QuantizeError(
            f"{reader.folder} is quantized already ({next(iter(quantized))}, for example): quantizing twice would add "
            "both errors; give the dense base that it was made from"
        )
    weights = [name for name in reader.names() if arch.is_linear_weight(name)]
    for name in weights:
        info = reader.info(name)
        if len(info.shape) != 2 or 0 in info.shape or not info.dtype.is_floating_point:
            raise QuantizeError(
                f"{name} has shape {info.shape} and dtype {info.dtype}; a two-dimensional floating-point weight was "
                "expected: repair the base, or train on it dense with quantize.method: none"
            )
    modules = [name.removesuffix(".weight") for name in weights]
    plan.check_rules(modules)
    return {name: plan.scheme_of(module) for name, module in zip(weights, modules, strict=True)}


def _wanted_factors(schemes: Mapping[str, Scheme], quantize: Quantize, factors: FactorsOf | None) -> dict[str, Factors]:
    """Factors to make, by the name of the weight."""
    if quantize.init == "plain":
        return {}
    if factors is None:
        raise QuantizeError(f"{quantize.init} makes factors with the base: the adapter's ranks and scales are needed")
    wanted = {name: found for name in schemes if (found := factors(name.removesuffix(".weight"))) is not None}
    if not wanted:
        raise QuantizeError(f"{quantize.init} found no layer with an adapter; check the adapter's targets")
    return wanted


def _output_bytes(reader: ModelReader, schemes: Mapping[str, Scheme], wanted: Mapping[str, Factors]) -> int:
    """What the new folder's weights and factors take, plus 1 % and 64 MB for headers, tables and tokenizer."""
    total = 0.0
    for name in reader.names():
        info, scheme = reader.info(name), schemes.get(name)
        total += info.num_bytes if scheme is None else math.prod(info.shape) * scheme.bits_per_weight / 8
        if name in wanted:
            total += 4 * wanted[name].rank * sum(info.shape)
    return int(total * 1.01) + 64_000_000


def _read_finite(reader: ModelReader, name: str) -> Tensor:
    tensor = reader.read(name)
    if not is_finite(tensor):
        raise QuantizeError(f"{name} in {reader.folder} holds Inf or NaN; every weight must be finite: repair the base")
    return tensor


def _write_config(source: Path, stage: Path, plan: QuantizationPlan, schemes: Mapping[str, Scheme]) -> None:
    """Tokenizer and other files as they are; config.json with what loaders must know about the quantization."""
    copy_sidecars(source, stage)
    config = read_json_object(source / "config.json")
    config.pop("quantization_config", None)  # null, where a tool dequantized it
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    config["quantization_config"] = quantization_config(plan, schemes.values(), dtype)
    write_json(stage / "config.json", config)
