"""A quantized folder as a whole: make one from a dense folder, and read one as if it were dense."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from graftline.progress import OnProgress, silent
from graftline.settings.model import Quantize
from graftline.weights.arch import Architecture
from graftline.weights.header import TensorInfo
from graftline.weights.model_reader import ModelReader
from graftline.weights.quant.blockwise import Quantized, dequantize
from graftline.weights.quant.init import initialize
from graftline.weights.quant.report import InitReport
from graftline.weights.quant.tensors import from_tensors, part_names, quantized_weights


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
        CheckpointError, QuantizeError: as `ModelReader` and `tensors.quantized_weights`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = ModelReader(folder)
        self._transposed = self._reader.architecture.conv1d
        names = self._reader.names()
        self._states = quantized_weights(names)
        parts = {part for name, state in self._states.items() for part in (state, *part_names(name, names))}
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

    def find(self, name: str) -> Tensor | None:
        """A tensor of the model, the head's also where it is the embedding's; None: the model has none of that name."""
        head, embedding = self._reader.tied_names
        if name == head and name not in self._names and self.config.tie_word_embeddings:
            name = embedding
        return self.read(name) if name in self._names else None

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor is stored quantized."""
        return name in self._states

    def _read_quantized(self, name: str) -> Quantized:
        return from_tensors(name, self._states[name], self._reader.read)
