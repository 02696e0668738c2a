"""Quantized folders: make one from a dense folder, and read one as if it were dense."""

import json
import logging
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from graftline.digest import Digest, of_json, write_json
from graftline.errors import QuantizeError
from graftline.logs import OnProgress, silent
from graftline.settings.model import Quantize
from graftline.settings.start import Weighting
from graftline.weights.cast import is_finite
from graftline.weights.identity import read_identity
from graftline.weights.model_folder import ModelReader
from graftline.weights.quant.blockwise import dequantize
from graftline.weights.quant.calibration import CalibrationInputs, calibration_bytes
from graftline.weights.quant.low_rank import FACTORS_FILE, FactorSettings
from graftline.weights.quant.report import (
    REPORT_FILE,
    InitializedLayer,
    InitReport,
    LayerReport,
    initialize_compensated,
    initialize_paired,
    initialize_plain,
    layer_from_json,
    report_pair,
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
from graftline.weights.quant.weighted import FullMetric, Metric, make_weighted_pair
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
            lines.write(json.dumps(layer.report.as_json()) + "\n")
        for key, factor in zip(_factor_names(name), layer.factors or (), strict=False):
            if key not in self._factors:
                self._factors.add(key, factor)
        for key, tensor in to_tensors(name, layer.quantized, source_dtype=source_dtype).items():
            if key not in self._weights:
                self._weights.add(key, tensor)

    def read_dense(self, name: str, code: str, factors: FactorSettings | None) -> Tensor:
        """What was written for a quantized weight as one matrix (O, I) in fp32: Q, or Q + s·BA with its factors."""
        dense_OI = dequantize(from_tensors(name, state_key(name, code), self._weights.read))
        if factors is not None:
            A_RI, B_OR = (self._factors.read(key) for key in _factor_names(name))
            dense_OI.addmm_(B_OR, A_RI, alpha=factors.scale)
        return dense_OI

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
Rows = Sequence[Sequence[int]]
"""Token ids of each calibration row."""


def peak_bytes_bound(source: Path, quantize: Quantize | None = None, rows: Rows = ()) -> int:
    """Upper bound of an initialization's main memory: 4 × the largest tensor + 700 MB, and `calibration_bytes`."""
    return _peak_bytes_bound(ModelReader(source), quantize.weighting if quantize else "none", rows)


def _peak_bytes_bound(reader: ModelReader, weighting: Weighting, rows: Rows) -> int:
    beside = 0
    if weighting != "none":
        shapes = {name: reader.info(name).shape for name in reader.names()}
        beside = calibration_bytes(shapes, reader.architecture, rows, weighting)
    return 4 * reader.largest_bytes + _PROCESS_BYTES + beside


def device_bytes_bound(source: Path) -> int:
    """Upper bound of its memory on a GPU: 4 × the largest weight that is quantized + 700 MB."""
    reader = ModelReader(source)
    weights = (name for name in reader.names() if reader.architecture.is_linear_weight(name))
    return 4 * max((reader.info(name).num_bytes for name in weights), default=0) + _PROCESS_BYTES


def initialize(  # noqa: PLR0913  # what a folder is made of, and where
    source: Path,
    out: Path,
    *,
    quantize: Quantize,
    seed: int,
    factors: FactorsOf | None = None,
    rows: Rows = (),
    device: str = "cpu",
    on_progress: OnProgress = silent,
) -> InitReport:
    """Make the folder ``out`` from the dense folder ``source``; resumes where an interrupted call stopped.

    One tensor at a time is quantized on ``device``, while the next is read and the last is written. Plain codes are the
    same bytes on every device; LoftQ and QPiSSA, whose matrix products round differently there, are not.

    Beside a model folder's files, ``out`` gets `quantization.json` (the report) and, with LoftQ or QPiSSA, the factors
    that the adapter must start from (`low_rank.FACTORS_FILE`). Random numbers are drawn from a seed and the layer's
    name, so a layer that is made again has the same bytes.

    Args:
        source: a dense model folder.
        out: the folder to make.
        quantize: the pipeline's section.
        seed: for the random projections of LoftQ and QPiSSA.
        factors: the adapter of each layer, which those two methods need.
        rows: the calibration rows, where ``quantize`` has a weighting.
        device: where to compute, ``cpu`` or ``cuda``; a calibrated start is computed on the CPU.
        on_progress: called with (tensors done, all tensors).

    Raises:
        CheckpointError: a damaged or unknown source, too little disk space, or ``out`` exists.
        QuantizeError: nothing to quantize; the source is quantized already; Inf or NaN in a tensor, a weight that is
            not two-dimensional; a rule that matches nothing.
    """
    return _make(source, out, _Asked(quantize, seed, factors, rows), device, on_progress)


@dataclass(frozen=True)
class _Asked:
    """What `initialize` or `quantize_folder` was asked for."""

    quantize: Quantize
    seed: int
    factors: FactorsOf | None
    rows: Rows
    calibration: "Calibration | None" = None
    """Round by `compensated.quantize_compensated`."""

    @property
    def weighting(self) -> Weighting:
        """What is collected of the layers' inputs."""
        return "full" if self.calibration else self.quantize.weighting

    @property
    def record(self) -> dict[str, Any]:
        """For the folder's identity."""
        if self.calibration is None:
            return quantizer_record(self.quantize, self.seed)
        base = self.calibration.base
        updated = {"updated_from": str(read_identity(base).digest)} if base else {}
        return quantizer_record(self.quantize, self.seed) | {"rounding": "compensated"} | updated

    @cached_property
    def base(self) -> "DequantizingReader | None":
        """Of the weights before an update."""
        base = self.calibration.base if self.calibration else None
        return DequantizingReader(base) if base else None


def _make(source: Path, out: Path, asked: _Asked, device: str, on_progress: OnProgress) -> InitReport:
    reader, plan = ModelReader(source), plan_of(asked.quantize)
    schemes = _schemes(reader, reader.architecture, plan)
    wanted = _wanted_factors(schemes, asked.quantize, asked.factors)
    calibration = _calibration(reader, asked)
    check_free_space(out, _output_bytes(reader, schemes, wanted))
    bound = _peak_bytes_bound(reader, asked.weighting, asked.rows)
    _LOG.info("initializing %s takes at most %.2f GB of memory", out, bound / 1e9)
    source_digest = read_identity(source).digest
    job = _job(source_digest, asked.record, wanted, asked.rows if calibration else ())
    with InitOutput(out, job=job) as output:
        making = _Making(reader, output, schemes, wanted, asked)
        if calibration is None:
            _make_streamed(making, device, on_progress)
        else:
            _make_calibrated(making, calibration, on_progress)
        _write_config(source, output.stage, plan, schemes)
        return output.finish(source_digest=source_digest, quantizer=asked.record, peak_bytes_bound=bound)


@dataclass(frozen=True)
class _Making:
    """The folder under way, and what its layers are made with."""

    reader: ModelReader
    output: InitOutput
    schemes: Mapping[str, Scheme]
    wanted: Mapping[str, FactorSettings]
    asked: _Asked

    def is_written(self, name: str) -> bool:
        scheme = self.schemes.get(name)
        if scheme is None:
            return self.output.has_tensor(name)
        return self.output.has_layer(name, scheme.code, paired=name in self.wanted)

    def layer(self, name: str, tensor: Tensor, metric: Metric | None = None) -> InitializedLayer:
        W_OI = tensor.T if self.reader.architecture.conv1d else tensor
        if self.asked.calibration:
            assert isinstance(metric, FullMetric)
            before = self.asked.base.read(name).float() if self.asked.base else None
            base_OI = before.T if before is not None and self.reader.architecture.conv1d else before
            return initialize_compensated(name.removesuffix(".weight"), W_OI, self.schemes[name], metric, base_OI)
        pairing = _Pairing(self.wanted.get(name), self.asked.quantize, self.asked.seed, metric)
        return _initialize_layer(name, W_OI, self.schemes[name], pairing)


def _make_streamed(making: _Making, device: str, on_progress: OnProgress) -> None:
    names = making.reader.names()
    left = [name for name in names if not making.is_written(name)]
    with _Stream(making.reader, making.output, left, device) as tensors:
        for done, (name, tensor) in enumerate(tensors, start=len(names) - len(left) + 1):
            if name in making.schemes:
                tensors.write_layer(name, making.layer(name, tensor), source_dtype=tensor.dtype)
            else:
                making.output.add_tensor(name, tensor)
            on_progress(done, len(names))


def _make_calibrated(making: _Making, calibration: CalibrationInputs, on_progress: OnProgress) -> None:
    """Layer by layer in the order of the forward pass: the inputs of one come from those that are made before it."""
    reader, output = making.reader, making.output
    for done, name in enumerate(calibration.names(), start=1):
        scheme, own = making.schemes.get(name), making.wanted.get(name)
        if not making.is_written(name):
            tensor = _read_finite(reader, name)
            if scheme is None:
                output.add_tensor(name, tensor)
            else:
                is_weighted = own is not None or making.asked.calibration is not None
                layer = making.layer(name, tensor, calibration.metric(name) if is_weighted else None)
                output.add_layer(name, layer, source_dtype=tensor.dtype)
        if scheme is not None:
            calibration.carry(name, output.read_dense(name, scheme.code, own))
        on_progress(done, len(reader.names()))


def _calibration(reader: ModelReader, asked: _Asked) -> CalibrationInputs | None:
    if asked.weighting == "none":
        return None
    if not any(map(len, asked.rows)):
        wanted, instead = (
            ("the rounding is compensated", "round to the nearest code")
            if asked.calibration
            else (f"quantize.init has the weighting {asked.weighting}", "write `weighting: none`")
        )
        raise QuantizeError(
            f"{wanted}, and no calibration rows were given; expected the token ids of training rows: pass rows, or "
            f"{instead}"
        )
    rows = [row for row in asked.rows if len(row)]
    return CalibrationInputs(reader, rows, asked.weighting, evened=asked.calibration is not None)


class _Stream:
    """Tensors of a model folder, one after the other: the next is read and the last layer written meanwhile.

    The next one is read ahead only where both fit the bound of `peak_bytes_bound`; of what is written, at most one
    layer waits, whose codes are a fraction of its weight.
    """

    def __init__(self, reader: ModelReader, output: InitOutput, names: list[str], device: str) -> None:
        self._reader, self._output, self._names, self._device = reader, output, names, device
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="read")
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._written: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._reading.shutdown(cancel_futures=True)
        self._writing.shutdown()
        if kind is None:
            self._wait()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        ahead: Future[Tensor] | None = None
        for name, following in zip_longest(self._names, self._names[1:]):
            tensor = ahead.result() if ahead else self._read(name)
            can_wait = following is not None and self._fits_beside(name, following)
            ahead = self._reading.submit(self._read, following) if can_wait else None
            is_quantized = self._reader.architecture.is_linear_weight(name)
            tensor = tensor.to(self._device) if is_quantized else tensor
            if not is_quantized:
                self._wait()  # dense tensors are written by the caller
            yield name, tensor
            del tensor

    def write_layer(self, name: str, layer: InitializedLayer, *, source_dtype: torch.dtype) -> None:
        """Write a layer in the background, once the one before it is written."""
        self._wait()
        self._written = self._writing.submit(self._output.add_layer, name, layer, source_dtype=source_dtype)

    def _wait(self) -> None:
        written, self._written = self._written, None
        if written:
            written.result()

    def _read(self, name: str) -> Tensor:
        return _read_finite(self._reader, name)

    def _fits_beside(self, name: str, following: str) -> bool:
        # On a GPU main memory has the tensor only until it is copied.
        copies = 4 if self._device == "cpu" else 1
        sizes = copies * self._reader.info(name).num_bytes + self._reader.info(following).num_bytes
        return sizes <= 4 * self._reader.largest_bytes


def quantizer_record(quantize: Quantize, seed: int) -> dict[str, Any]:
    """How a quantized base was made, for its identity. A record on disk: its keys and words must not change."""
    paired = {"steps": quantize.loftq_iterations, "seed": seed}
    return {
        "method": "none" if quantize.init_kind == "plain" else quantize.init_kind,
        "quantization": plan_of(quantize).as_json(),
        **({} if quantize.init_kind == "plain" else paired),
        **({} if quantize.weighting == "none" else {"weighting": quantize.weighting}),
    }


@dataclass(frozen=True)
class _Pairing:
    """What a layer's pair is made with, where it gets one."""

    factors: FactorSettings | None
    quantize: Quantize
    seed: int
    metric: Metric | None


def _initialize_layer(name: str, W_OI: Tensor, scheme: Scheme, given: _Pairing) -> InitializedLayer:
    module, quantize, factors = name.removesuffix(".weight"), given.quantize, given.factors
    kind, steps = quantize.init_kind, quantize.loftq_iterations
    if factors is None or kind == "plain":
        return initialize_plain(module, W_OI, scheme)
    own_seed = int(of_json([given.seed, module]).hex[:15], 16)
    if given.metric is None:
        return initialize_paired(module, W_OI, scheme, factors, method=kind, steps=steps, seed=own_seed)
    generator = torch.Generator().manual_seed(own_seed)
    pair = make_weighted_pair(W_OI, scheme, factors, metric=given.metric, steps=steps, generator=generator)
    return report_pair(module, W_OI, pair)


def _job(source: Digest, record: Mapping[str, Any], wanted: Mapping[str, FactorSettings], rows: Rows) -> Digest:
    """Digest of everything that decides the content of the folder."""
    calibrated = [[list(map(int, row)) for row in rows]] if rows else []
    return of_json([str(source), record, {name: asdict(factors) for name, factors in wanted.items()}, *calibrated])


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
    if quantize.init_kind == "plain":
        return {}
    if factors is None:
        raise QuantizeError(
            f"{quantize.init_kind} makes factors with the base: the adapter's ranks and scales are needed"
        )
    wanted = {name: found for name in schemes if (found := factors(name.removesuffix(".weight"))) is not None}
    if not wanted:
        raise QuantizeError(f"{quantize.init_kind} found no layer with an adapter; check the adapter's targets")
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


@dataclass(frozen=True)
class Calibration:
    """What compensated rounding is fitted to."""

    rows: Rows
    """Training rows."""
    base: Path | None = None
    """The folder before an adapter was folded in, whose update is to be kept whole; None: there was none."""


def quantize_folder(
    source: Path,
    out: Path,
    *,
    quantize: Quantize,
    calibration: Calibration | None = None,
    on_progress: OnProgress = silent,
) -> InitReport:
    """As `initialize`, without initial factors; transformers loads an NF4 folder as a bitsandbytes 4-bit model.

    Args:
        source: a dense model folder.
        out: the folder to make.
        quantize: the pipeline's section; its ``init`` is ignored.
        calibration: what the rounding compensates its errors for (`compensated`), each layer behind those that are
            already rounded; None rounds each weight to the nearest code, with bitsandbytes' bytes.
        on_progress: called with (tensors done, all tensors).
    """
    plain = quantize.replace(init="plain")
    rows = calibration.rows if calibration else ()
    asked = _Asked(plain, seed=0, factors=None, rows=rows, calibration=calibration)
    return _make(source, out, asked, "cpu", on_progress)


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
