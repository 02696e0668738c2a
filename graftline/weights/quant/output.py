"""The folder that an initialization writes: weights, factors and report, each of which survives an interruption."""

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from graftline.digest import Digest, write_json
from graftline.weights.disk import writing
from graftline.weights.factors import FACTORS_FILE
from graftline.weights.quant.layer import InitializedLayer
from graftline.weights.quant.report import REPORT_FILE, InitReport, LayerReport, layer_from_json
from graftline.weights.quant.tensors import state_key, to_tensors
from graftline.weights.reader import SINGLE_FILE
from graftline.weights.writer import CheckpointWriter

_LAYERS_FILE = "layers.jsonl"


class Output:
    """Writes ``folder`` for one ``job`` (see `CheckpointWriter`); use as a context manager."""

    def __init__(self, folder: Path, *, job: Digest) -> None:
        self._weights = CheckpointWriter(folder, job=job)
        factors_folder = self.stage / "factors"
        # Complete factors of a run that ended inside `finish`: made again, so that there is one way to the end.
        shutil.rmtree(factors_folder, ignore_errors=True)
        self._factors = CheckpointWriter(factors_folder, max_shard_bytes=sys.maxsize, job=job)

    @property
    def stage(self) -> Path:
        """Where files lie until the folder appears."""
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
        """Write the report, the factors and the tensors of a quantized weight; what is there already is left."""
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
        """Let the folder appear; returns the report, which lies in it too."""
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
        """The reports collected so far, one a layer, sorted; the file that held them is removed."""
        file = self.stage / _LAYERS_FILE
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        reports: dict[str, LayerReport] = {}
        for line in lines:
            try:
                report = layer_from_json(json.loads(line))
            except (ValueError, TypeError):
                continue  # cut short by an interruption: the layer was made again and has a line further down
            reports[report.module] = report
        file.unlink(missing_ok=True)
        return tuple(reports[module] for module in sorted(reports))


def _factor_names(weight_name: str) -> tuple[str, str]:
    module = weight_name.removesuffix(".weight")
    return f"{module}.lora_A", f"{module}.lora_B"
