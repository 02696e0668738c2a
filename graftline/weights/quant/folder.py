"""A quantized folder as a whole: make one from a dense folder, and read one as if it were dense."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from graftline.progress import OnProgress, silent
from graftline.settings.model import Quantize
from graftline.weights.arch import read_architecture
from graftline.weights.header import TensorInfo
from graftline.weights.quant.blockwise import Quantized, dequantize
from graftline.weights.quant.init import initialize
from graftline.weights.quant.report import InitReport
from graftline.weights.quant.tensors import from_tensors, part_names, quantized_weights
from graftline.weights.reader import CheckpointReader


def quantize_folder(source: Path, out: Path, *, quantize: Quantize, on_progress: OnProgress = silent) -> InitReport:
    """Write ``source`` with the linear layers inside its blocks quantized alone; see `init.initialize`.

    An NF4 folder is one that transformers loads as a bitsandbytes 4-bit model.
    """
    return initialize(source, out, quantize=quantize.replace(init="plain"), seed=0, on_progress=on_progress)


class DequantizingReader:
    """A model folder's logical tensors: those stored quantized are read as dense fp32, others as they are stored.

    A dense weight has the shape that a dense folder of its architecture has: (out, in), but (in, out) for GPT-2's
    Conv1D, whose quantized form is kept as (out, in).

    Raises:
        CheckpointError, QuantizeError: as `CheckpointReader` and `tensors.quantized_weights`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = CheckpointReader(folder)
        self._transposed = read_architecture(folder).conv1d
        names = self._reader.names()
        self._states = quantized_weights(names)
        parts = {part for name, state in self._states.items() for part in (state, *part_names(name, names))}
        self._names = [name for name in names if name not in parts]

    def names(self) -> list[str]:
        """Names of the logical tensors, sorted; constants and tables of quantized weights are not among them."""
        return list(self._names)

    def info(self, name: str) -> TensorInfo:
        """As `CheckpointReader.info`; for a quantized weight its dense shape, fp32 and dense bytes."""
        info = self._reader.info(name)
        if name not in self._states:
            return info
        shape = self._read_quantized(name).shape
        shape = shape[::-1] if self._transposed else shape
        return replace(info, dtype=torch.float32, shape=shape, num_bytes=4 * shape[0] * shape[1])

    def read(self, name: str) -> Tensor:
        """Read one tensor; a quantized weight is dequantized to fp32."""
        if name not in self._states:
            return self._reader.read(name)
        dense = dequantize(self._read_quantized(name))
        return dense.T.contiguous() if self._transposed else dense

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor is stored quantized."""
        return name in self._states

    def _read_quantized(self, name: str) -> Quantized:
        return from_tensors(name, self._states[name], self._reader.read)
