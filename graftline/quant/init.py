"""Quantized initialization of a base, streamed: read one tensor, quantize, write.

An interrupted run goes on at the next tensor: everything random is drawn from a seed and the tensor's name, so a part
that is made again has the same bytes. Nothing appears under the final name before all of it is written.
"""

import json
import logging
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from graftline.checkpoint.arch import Architecture, read_architecture
from graftline.checkpoint.disk import check_free_space
from graftline.checkpoint.identity import read_identity
from graftline.checkpoint.reader import CheckpointReader, read_json_object
from graftline.checkpoint.sidecars import copy_sidecars
from graftline.checkpoint.writer import CheckpointWriter
from graftline.digest import of_json, write_json
from graftline.errors import QuantizeError
from graftline.progress import OnProgress, silent
from graftline.quant.blockwise import quantize
from graftline.quant.hf_config import quantization_config
from graftline.quant.measure import bits_per_weight, is_finite, measure
from graftline.quant.plan import QuantizationPlan
from graftline.quant.report import REPORT_FILE, InitReport, LayerReport, layer_from_json
from graftline.quant.scheme import Scheme
from graftline.quant.tensors import quantized_weights, state_key, to_tensors

_LOG = logging.getLogger(__name__)
_LAYERS_FILE = "layers.jsonl"
# Interpreter, torch and transformers, and the buffers that do not grow with the model.
_PROCESS_BYTES = 700_000_000


@dataclass(frozen=True)
class InitPlan:
    """What to do with the linear layers. quantization: which layer in which scheme."""

    quantization: QuantizationPlan = field(default_factory=QuantizationPlan)

    def as_json(self) -> dict[str, Any]:
        """For the identity of the base."""
        return {"quantization": self.quantization.as_json()}


def peak_bytes_bound(source: Path) -> int:
    """Upper bound of the process's memory in an initialization: 4 × the largest tensor + 700 MB."""
    return 4 * CheckpointReader(source).largest_bytes + _PROCESS_BYTES


def initialize(source: Path, out: Path, *, plan: InitPlan, on_progress: OnProgress = silent) -> InitReport:
    """Make the folder ``out`` from the dense folder ``source``; goes on where an interrupted call stopped.

    Raises:
        CheckpointError: a damaged or unknown source, too little disk, ``out`` exists.
        QuantizeError: the source is quantized already; Inf or NaN in a tensor, a weight that is not two-dimensional
            (each named); a rule that matches nothing.
    """
    reader, arch = CheckpointReader(source), read_architecture(source)
    schemes = _schemes(reader, arch, plan.quantization)
    check_free_space(out, _output_bytes(reader, schemes))
    bound = peak_bytes_bound(source)
    _LOG.info("initializing %s: at most %.2f GB of memory", out, bound / 1e9)
    source_digest, quantizer = read_identity(source).digest, plan.as_json()
    names = reader.names()
    with CheckpointWriter(out, job=of_json([str(source_digest), quantizer])) as writer:
        for done, name in enumerate(names, start=1):
            scheme = schemes.get(name)
            if (name if scheme is None else state_key(name, scheme.code)) not in writer:
                weight = _read_finite(reader, name)
                if scheme is None:
                    writer.add(name, weight)
                else:
                    _write_quantized(writer, name, weight.T if arch.conv1d else weight, scheme)
            on_progress(done, len(names))
        _write_config(source, writer.stage, plan.quantization, schemes)
        report = InitReport(writer.digest, None, _take_layer_reports(writer.stage), bound)
        write_json(writer.stage / REPORT_FILE, report.as_json())
        writer.finish(source_digest=source_digest, quantizer=quantizer)
    return report


def _schemes(reader: CheckpointReader, arch: Architecture, plan: QuantizationPlan) -> dict[str, Scheme | None]:
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
                "expected: leave the layer dense with a rule"
            )
    modules = [name.removesuffix(".weight") for name in weights]
    plan.check_rules(modules)
    return {name: plan.scheme_of(module) for name, module in zip(weights, modules, strict=True)}


def _output_bytes(reader: CheckpointReader, schemes: dict[str, Scheme | None]) -> int:
    """What the new folder's weights take, plus 1 % and 64 MB for headers, tables and tokenizer."""
    total = 0.0
    for name in reader.names():
        info, scheme = reader.info(name), schemes.get(name)
        total += info.num_bytes if scheme is None else math.prod(info.shape) * scheme.bits_per_weight / 8
    return int(total * 1.01) + 64_000_000


def _read_finite(reader: CheckpointReader, name: str) -> Tensor:
    tensor = reader.read(name)
    if not is_finite(tensor):
        raise QuantizeError(f"{name} in {reader.folder} holds Inf or NaN; every weight must be finite: repair the base")
    return tensor


def _write_quantized(writer: CheckpointWriter, name: str, weight: Tensor, scheme: Scheme) -> None:
    """Quantize one weight (out, in), write its report and its tensors; the state last, it marks them complete."""
    quantized = quantize(weight, scheme)
    distance = measure(weight, quantized)
    report = LayerReport(
        module=name.removesuffix(".weight"),
        code=scheme.code,
        num_weights=weight.numel(),
        bits_per_weight=bits_per_weight(quantized),
        error=distance.error,
        error_alone=distance.error,
        error_plain=distance.error,
        zeros=distance.zeros,
        rank=0,
        step_errors=(),
    )
    with (writer.stage / _LAYERS_FILE).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(asdict(report)) + "\n")
    for key, tensor in to_tensors(name, quantized, source_dtype=weight.dtype).items():
        if key not in writer:
            writer.add(key, tensor)


def _take_layer_reports(stage: Path) -> tuple[LayerReport, ...]:
    """The reports collected so far, one a module, sorted; the file that held them is removed."""
    file = stage / _LAYERS_FILE
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    reports: dict[str, LayerReport] = {}
    for line in lines:
        try:
            report = layer_from_json(json.loads(line))
        except (ValueError, TypeError):
            continue  # cut short by an interruption; the layer was made again and has a line further down
        reports[report.module] = report
    file.unlink(missing_ok=True)
    return tuple(reports[module] for module in sorted(reports))


def _write_config(source: Path, stage: Path, plan: QuantizationPlan, schemes: dict[str, Scheme | None]) -> None:
    """Tokenizer and other files as they are; config.json with what loaders must know about the quantization."""
    copy_sidecars(source, stage)
    config = read_json_object(source / "config.json")
    if any(scheme is not None for scheme in schemes.values()):
        by_module = {name.removesuffix(".weight"): scheme for name, scheme in schemes.items()}
        dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
        config["quantization_config"] = quantization_config(plan, by_module, dtype)
    write_json(stage / "config.json", config)
