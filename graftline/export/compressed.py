"""A merged model in the layouts of compressed-tensors, which vLLM, SGLang and transformers load: FP8 and W4A16.

    fp8     float-quantized: a linear weight in e4m3, one scale an output row
    w4a16   pack-quantized: a linear weight in signed 4-bit integers, eight to an int32, one scale a group of inputs

Activations stay in 16 bits. Embeddings, norms, the head and every layer outside the blocks stay as they are. FP8 rounds
to the nearest code. W4A16 rounds column by column and passes each column's error on to those that follow, weighted by
the inputs of calibration rows (`graftline.weights.quant.compensated`). The inputs come from the layers that are already
quantized.

Every scale is rounded to the model's number type before it is used, so that ``dense`` holds exactly what engines
compute with, in fp32.

Source: https://github.com/vllm-project/compressed-tensors (0.20). Dimensions: O outputs, I inputs, G groups.
"""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from graftline.digest import write_json
from graftline.errors import ExportError
from graftline.logs import OnProgress, silent
from graftline.weights.model_folder import ModelReader, is_quantized, skeleton_of
from graftline.weights.quant.calibration import CalibrationInputs
from graftline.weights.quant.compensated import elimination, round_compensated
from graftline.weights.quant.weighted import FullMetric
from graftline.weights.reader import read_json_object
from graftline.weights.writer import CheckpointWriter, copy_sidecars

Format = Literal["fp8", "w4a16"]
FORMATS: tuple[Format, ...] = get_args(Format)
_E4M3_MAX = 448.0
_GROUPS = (128, 64, 32)
"""Inputs that share a scale, the largest number that divides every layer's inputs; engines' kernels know these."""
_SHRINKS = tuple(1 - step / 20 for step in range(9))
"""Scales that are tried for a group, as shares of the one that reaches its largest weight."""


@dataclass(frozen=True)
class Compressed:
    """One linear weight in a layout."""

    parts: dict[str, Tensor]
    """Tensors by the last part of their names."""
    dense: Tensor
    """What engines compute with, fp32."""


def compress_folder(
    merged: Path,
    out: Path,
    kind: Format,
    *,
    dense: Path,
    rows: Sequence[Sequence[int]] = (),
    on_progress: OnProgress = silent,
) -> None:
    """Write a dense model folder in a layout, and ``dense``: the same weights as a folder that graftline loads.

    Args:
        merged: a dense model folder, as `graftline.merge.fold.merge_folder` writes it.
        out: the folder to make.
        kind: the layout.
        dense: another folder to make, in fp32.
        rows: token ids of calibration rows; needed for w4a16.
        on_progress: called with (tensors done, all tensors).

    Raises:
        ExportError: the folder is quantized, of a family without linear layers, or has inputs that no group divides;
            or rows are missing.
        CheckpointError: a folder exists, or the disk refuses.
    """
    reader = ModelReader(merged)
    arch = reader.architecture
    group = _check(reader, kind, rows)
    dtype = reader.info(next(filter(arch.is_linear_weight, reader.names()))).dtype
    calibration = CalibrationInputs(reader, [row for row in rows if len(row)], "full") if kind == "w4a16" else None
    names = calibration.names() if calibration else iter(reader.names())
    with _writing(out) as packed, _writing(dense) as plain:
        for done, name in enumerate(names, start=1):
            weight, stored = reader.read(name), arch.stored_name(name)
            if not arch.is_linear_weight(name):
                packed.add(stored, weight)
                plain.add(stored, weight.float() if weight.is_floating_point() else weight)
            else:
                made = _compress(name, weight.float(), dtype, calibration, group)
                for part, tensor in made.parts.items():
                    packed.add(f"{stored.removesuffix('.weight')}.{part}", tensor)
                plain.add(stored, made.dense)
                if calibration:
                    calibration.carry(name, made.dense)
            on_progress(done, len(reader.names()))
        config = quantization_config(kind, group, _left_dense(reader))
        for writer, changes in ((packed, {"quantization_config": config}), (plain, {"dtype": "float32"})):
            copy_sidecars(merged, writer.stage)
            document = read_json_object(merged / "config.json")
            write_json(writer.stage / "config.json", document | changes)
            writer.finish()


def quantization_config(kind: Format, group: int, ignored: Sequence[str]) -> dict[str, Any]:
    """The entry in config.json by which engines know the layout."""
    name = {"fp8": "float-quantized", "w4a16": "pack-quantized"}[kind]
    weights: dict[str, Any] = {"symmetric": True, "dynamic": False}
    if kind == "fp8":
        weights |= {"num_bits": 8, "type": "float", "strategy": "channel"}
    else:
        weights |= {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group}
    group_0 = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group_0 | {"format": name}},
        "ignore": list(ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def to_fp8(weight_OI: Tensor, dtype: torch.dtype) -> Compressed:
    """A weight in e4m3 with one scale a row, in ``dtype``."""
    scale_O1 = (weight_OI.abs().amax(1, keepdim=True) / _E4M3_MAX).clamp_(min=torch.finfo(dtype).tiny).to(dtype)
    codes_OI = (weight_OI / scale_O1.float()).clamp_(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    return Compressed({"weight": codes_OI, "weight_scale": scale_O1}, codes_OI.float() * scale_O1.float())


def to_int4(weight_OI: Tensor, dtype: torch.dtype, *, group: int, L_II: Tensor) -> Compressed:
    """A weight in groups of 4-bit integers, by GPTQ; ``L_II`` is the lower triangle with L Lᵀ = E[xᵀx]."""
    codes_OI = torch.empty_like(weight_OI, dtype=torch.int8)
    scales: list[Tensor] = []

    def round_column(left_OI: Tensor, at: int) -> Tensor:
        if at % group == 0:
            scales.append(_scales(left_OI[:, at : at + group], dtype))
        scale_O = scales[-1].float()
        code_O = (left_OI[:, at] / scale_O).round_().clamp_(-8, 7)
        codes_OI[:, at] = code_O.to(torch.int8)
        return code_O * scale_O

    round_compensated(weight_OI, elimination(L_II), round_column)
    scale_OG = torch.stack(scales, 1)
    dense_OI = codes_OI.float() * scale_OG.float().repeat_interleave(group, 1)
    shape = torch.tensor(weight_OI.shape, dtype=torch.int64)
    return Compressed({"weight_packed": pack(codes_OI), "weight_scale": scale_OG, "weight_shape": shape}, dense_OI)


def pack(codes_OI: Tensor) -> Tensor:
    """Signed 4-bit codes (O, I) as int32 (O, I / 8): code j of eight, plus 8, in bits 4j to 4j + 3."""
    nibbles = (codes_OI.to(torch.int64) + 8).unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)
    words = nibbles.sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _compress(
    name: str, weight_OI: Tensor, dtype: torch.dtype, calibration: CalibrationInputs | None, group: int
) -> Compressed:
    if not bool(weight_OI.isfinite().all()):
        raise ExportError(f"{name} holds Inf or NaN; every weight must be finite: merge again")
    if calibration is None:
        return to_fp8(weight_OI, dtype)
    metric = calibration.metric(name)
    assert isinstance(metric, FullMetric)
    return to_int4(weight_OI, dtype, group=group, L_II=metric.L_II)


def _scales(weight_OG: Tensor, dtype: torch.dtype) -> Tensor:
    """For each row of a group the tried scale with the smallest squared error, in ``dtype``."""
    largest_O1 = weight_OG.abs().amax(1, keepdim=True) / 7.5
    best_O, chosen_O = torch.full((len(weight_OG),), torch.inf), torch.ones(len(weight_OG), dtype=dtype)
    for shrink in _SHRINKS:
        scale_O1 = (largest_O1 * shrink).clamp(min=torch.finfo(dtype).tiny).to(dtype)
        codes = (weight_OG / scale_O1.float()).round_().clamp_(-8, 7)
        error_O = (codes * scale_O1.float() - weight_OG).square_().sum(1)
        is_better = error_O < best_O
        best_O, chosen_O = torch.where(is_better, error_O, best_O), torch.where(is_better, scale_O1[:, 0], chosen_O)
    return chosen_O


def _check(reader: ModelReader, kind: Format, rows: Sequence[Sequence[int]]) -> int:
    """Inputs to a scale; raises ExportError for what the layouts cannot hold."""
    arch = reader.architecture
    if is_quantized(reader.config):
        raise ExportError(f"{reader.folder} is quantized already; give a merged model in 16 or 32 bits")
    if arch.conv1d:
        raise ExportError(
            f"{arch.name} has no nn.Linear layers, which compressed-tensors quantizes; ship the 16-bit merged model"
        )
    if arch.experts:
        raise ExportError(f"{arch.name} has experts, which were not tried in this layout; ship the 16-bit merged model")
    if kind == "fp8":
        return 0
    if not any(map(len, rows)):
        raise ExportError("w4a16 is calibrated, and no calibration rows were given; pass training rows")
    inputs = {reader.info(name).shape[1] for name in filter(arch.is_linear_weight, reader.names())}
    group = next((size for size in _GROUPS if all(number % size == 0 for number in inputs)), None)
    if group is None:
        raise ExportError(
            f"w4a16 needs layers whose inputs a group of {', '.join(map(str, _GROUPS))} divides; this model's have "
            f"{', '.join(map(str, sorted(inputs)))}: take fp8"
        )
    return group


def _left_dense(reader: ModelReader) -> list[str]:
    """The linear layers that stay as they are, by name: the head and everything outside the blocks."""
    model = skeleton_of(reader, torch.float32)
    linears = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return sorted(name for name in linears if not reader.architecture.is_linear_weight(f"{name}.weight"))


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[CheckpointWriter]:
    """A writer whose staging folder is removed if the work fails."""
    with CheckpointWriter(out) as writer:
        try:
            yield writer
        finally:
            shutil.rmtree(writer.stage, ignore_errors=True)
