"""Quantized folders: make one from a dense folder, and read one as if it were dense."""

import json
import logging
import math
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from graftline.digest import Digest, of_json, write_json
from graftline.errors import QuantizeError
from graftline.logs import OnProgress, silent
from graftline.settings.model import Quantize
from graftline.weights.cast import is_finite
from graftline.weights.identity import read_identity
from graftline.weights.model_folder import ModelReader
from graftline.weights.quant.blockwise import dequantize
from graftline.weights.quant.low_rank import FACTORS_FILE, FactorSettings
from graftline.weights.quant.report import (
    REPORT_FILE,
    InitializedLayer,
    InitReport,
    LayerReport,
    initialize_paired,
    initialize_plain,
    layer_from_json,
)
from graftline.weights.quant.scheme import QuantizationPlan, Scheme, plan_of, quantization_config
from graftline.weights.quant.tensors import (
    dense_shape,
    from_tensors,
    part_names,
    quantized_weights,
    state_key,
    to_tensors,
)
from graftline.weights.reader import SINGLE_FILE, Architecture, TensorInfo, read_json_object
from graftline.weights.writer import CheckpointWriter, check_free_space, copy_sidecars, writing

_LAYERS_FILE = "layers.jsonl"


class InitOutput:
    """Writes weights, factors and report of a quantized folder; resumable, as `CheckpointWriter`. A context manager."""

    def __init__(self, folder: Path, *, job: Digest) -> None:
        self._weights = CheckpointWriter(folder, job=job)
        factors_folder = self.stage / "factors"
        # Complete factors of a run that ended inside `finish` are made again, which keeps `finish` simple.
        shutil.rmtree(factors_folder, ignore_errors=True)
        self._factors = CheckpointWriter(factors_folder, max_shard_bytes=sys.maxsize, job=job)

    @property
    def stage(self) -> Path:
        """Where files are until the folder appears."""
        return self._weights.stage

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._factors.__exit__(*exc)
        self._weights.__exit__(*exc)

    def has_tensor(self, name: str) -> bool:
        """Whether a dense tensor was written."""
        return name in self._weights

    def has_layer(self, name: str, code: str, *, paired: bool) -> bool:
        """Whether everything of a quantized weight was written."""
        return state_key(name, code) in self._weights and (not paired or _factor_names(name)[1] in self._factors)

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """Write a dense tensor."""
        self._weights.add(name, tensor)

    def add_layer(self, name: str, layer: InitializedLayer, *, source_dtype: torch.dtype) -> None:
        """Write the report, the factors and the tensors of a quantized weight; what exists already is kept."""
        reports = self.stage / _LAYERS_FILE
        with writing(reports), reports.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(layer.report)) + "\n")
        for key, factor in zip(_factor_names(name), layer.factors or (), strict=False):
            if key not in self._factors:
                self._factors.add(key, factor)
        for key, tensor in to_tensors(name, layer.quantized, source_dtype=source_dtype).items():
            if key not in self._weights:
                self._weights.add(key, tensor)

    def finish(self, *, source_digest: Digest, quantizer: dict[str, Any], peak_bytes_bound: int) -> InitReport:
        """Write the report and rename the folder to its name; returns the report."""
        pair = self._finish_factors()
        report = InitReport(self._weights.weights_digest, pair, self._take_layer_reports(), peak_bytes_bound)
        write_json(self.stage / REPORT_FILE, report.as_json())
        self._weights.finish(source_digest=source_digest, quantizer=quantizer, pair=pair)
        return report

    def _finish_factors(self) -> Digest | None:
        has_factors = bool(self._factors.names())
        pair = self._factors.finish()
        if has_factors:
            (self._factors.folder / SINGLE_FILE).rename(self.stage / FACTORS_FILE)
        shutil.rmtree(self._factors.folder)
        return pair if has_factors else None

    def _take_layer_reports(self) -> tuple[LayerReport, ...]:
        """The reports collected so far, one a layer, sorted; their file is removed."""
        file = self.stage / _LAYERS_FILE
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        reports: dict[str, LayerReport] = {}
        for line in lines:
            try:
                report = layer_from_json(json.loads(line))
            except (ValueError, TypeError):
                continue  # cut short by an interruption: the layer was made again and has a later line
            reports[report.module] = report
        file.unlink(missing_ok=True)
        return tuple(reports[module] for module in sorted(reports))


def _factor_names(weight_name: str) -> tuple[str, str]:
    module = weight_name.removesuffix(".weight")
    return f"{module}.lora_A", f"{module}.lora_B"


_LOG = logging.getLogger(__name__)
# Interpreter, torch and transformers, and buffers that do not grow with the model.
_PROCESS_BYTES = 700_000_000

FactorsOf = Callable[[str], FactorSettings | None]
"""Rank and scale of the adapter on a linear layer, by the layer's path; None for a layer without one."""


def peak_bytes_bound(source: Path) -> int:
    """Upper bound of an initialization's memory: 4 × the largest tensor + 700 MB."""
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
    """Make the folder ``out`` from the dense folder ``source``; resumes where an interrupted call stopped.

    Beside a model folder's files, ``out`` gets `quantization.json` (the report) and, with LoftQ or QPiSSA, the factors
    that the adapter must start from (`low_rank.FACTORS_FILE`). Random numbers are drawn from a seed and the layer's
    name, so a layer that is made again has the same bytes.

    Args:
        source: a dense model folder.
        out: the folder to make.
        quantize: the pipeline's section.
        seed: for the random projections of LoftQ and QPiSSA.
        factors: the adapter of each layer, which those two methods need.
        on_progress: called with (tensors done, all tensors).

    Raises:
        CheckpointError: a damaged or unknown source, too little disk space, or ``out`` exists.
        QuantizeError: nothing to quantize; the source is quantized already; Inf or NaN in a tensor, a weight that is
            not two-dimensional; a rule that matches nothing.
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
    with InitOutput(out, job=_job(source_digest, record, wanted)) as output:
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
    """How a quantized base was made, for its identity. A record on disk: its keys and words must not change."""
    paired = {"steps": quantize.loftq_iterations, "seed": seed}
    return {
        "method": "none" if quantize.init == "plain" else quantize.init,
        "quantization": plan_of(quantize).as_json(),
        **({} if quantize.init == "plain" else paired),
    }


def _initialize_layer(
    name: str, W_OI: Tensor, scheme: Scheme, factors: FactorSettings | None, quantize: Quantize, seed: int
) -> InitializedLayer:
    module = name.removesuffix(".weight")
    if factors is None or quantize.init == "plain":
        return initialize_plain(module, W_OI, scheme)
    own_seed = int(of_json([seed, module]).hex[:15], 16)
    return initialize_paired(
        module, W_OI, scheme, factors, method=quantize.init, steps=quantize.loftq_iterations, seed=own_seed
    )


def _job(source: Digest, record: Mapping[str, Any], wanted: Mapping[str, FactorSettings]) -> Digest:
    """Digest of everything that decides the content of the folder."""
    return of_json([str(source), record, {name: asdict(factors) for name, factors in wanted.items()}])


def _schemes(reader: ModelReader, arch: Architecture, plan: QuantizationPlan) -> dict[str, Scheme]:
    """The scheme of every linear layer's weight; refuses what cannot be quantized before anything is written."""
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


def _wanted_factors(
    schemes: Mapping[str, Scheme], quantize: Quantize, factors: FactorsOf | None
) -> dict[str, FactorSettings]:
    """The factors to make, by the weight's name."""
    if quantize.init == "plain":
        return {}
    if factors is None:
        raise QuantizeError(f"{quantize.init} makes factors with the base: the adapter's ranks and scales are needed")
    wanted = {name: found for name in schemes if (found := factors(name.removesuffix(".weight"))) is not None}
    if not wanted:
        raise QuantizeError(f"{quantize.init} found no layer with an adapter; check the adapter's targets")
    return wanted


def _output_bytes(reader: ModelReader, schemes: Mapping[str, Scheme], wanted: Mapping[str, FactorSettings]) -> int:
    """Size of the new folder's weights and factors, plus 1 % and 64 MB for headers, tables and tokenizer."""
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
    """Copy the tokenizer and other files, and describe the quantization in config.json."""
    copy_sidecars(source, stage)
    config = read_json_object(source / "config.json")
    config.pop("quantization_config", None)  # dequantizing tools leave null
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    config["quantization_config"] = quantization_config(plan, schemes.values(), dtype)
    write_json(stage / "config.json", config)


def quantize_folder(source: Path, out: Path, *, quantize: Quantize, on_progress: OnProgress = silent) -> InitReport:
    """As `initialize`, without initial factors; transformers loads an NF4 folder as a bitsandbytes 4-bit model."""
    return initialize(source, out, quantize=quantize.replace(init="plain"), seed=0, on_progress=on_progress)


class DequantizingReader:
    """A model folder's logical tensors: quantized ones are read as dense fp32, others as they are stored.

    A dense weight has the shape that it has in a dense folder: (out, in), but (in, out) for GPT-2's Conv1D, which is
    quantized as (out, in).

    Raises:
        CheckpointError, QuantizeError: as `ModelReader` and `tensors.quantized_weights`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = ModelReader(folder)
        self._transposed = self._reader.architecture.conv1d
        names = self._reader.names()
        self._states = quantized_weights(names)
        parts = {part for name, state in self._states.items() for part in (state, *part_names(name))}
        self._names = [name for name in names if name not in parts]

    @property
    def config(self) -> PreTrainedConfig:
        """As `ModelReader.config`."""
        return self._reader.config

    @property
    def architecture(self) -> Architecture:
        """As `ModelReader.architecture`."""
        return self._reader.architecture

    def names(self) -> list[str]:
        """Names of the logical tensors, sorted, without the constants and tables of quantized weights."""
        return list(self._names)

    def info(self, name: str) -> TensorInfo:
        """As `CheckpointReader.info`; for a quantized weight its dense shape, fp32 and dense bytes."""
        info = self._reader.info(name)
        if name not in self._states:
            return info
        shape = dense_shape(name, self._states[name], self._reader.read)
        shape = shape[::-1] if self._transposed else shape
        return replace(info, dtype=torch.float32, shape=shape, num_bytes=4 * shape[0] * shape[1])

    def read(self, name: str) -> Tensor:
        """Read one tensor; a quantized weight is dequantized to fp32."""
        if name not in self._states:
            return self._reader.read(name)
        dense = dequantize(from_tensors(name, self._states[name], self._reader.read))
        return dense.T.contiguous() if self._transposed else dense

    def find(self, name: str) -> Tensor | None:
        """A tensor by its name, a tied head's too; None if the model has none of that name."""
        head, embedding = self._reader.tied_names
        if name == head and name not in self._names and self.config.tie_word_embeddings:
            name = embedding
        return self.read(name) if name in self._names else None

    def linear_shape(self, module: str) -> tuple[int, int]:
        """Shape of a module's weight, (out, in), but (in, out) for Conv1D; CheckpointError if it has none."""
        rows, columns = self.info(f"{module}.weight").shape
        return rows, columns

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor is stored quantized."""
        return name in self._states
