"""One base kept in memory by a process that makes several models of it, one after another, such as a sweep's cells.

A model made from it has modules of its own and shares every tensor. What trains or changes the base's own tensors (full
fine-tuning, biases, a fault) changes them here too, so `KeptBase.check` compares their sums after each piece of work
and gives up a base that changed: the next model is read from its folder again.
"""

import copy
import gc
import itertools
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from graftline.digest import Digest
from graftline.weights.identity import read_identity
from graftline.weights.quant.linear import load_model

logger = logging.getLogger("graftline")

_PIECE = 1 << 22
"""Numbers that are summed at once: their sum is made of copies of 8 bytes each."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Key:
    """What decides a loaded base's tensors."""

    digest: Digest
    device: torch.device
    dtype: torch.dtype
    keeps_stored: bool


class KeptBase:
    """At most one base, the last that was asked for."""

    def __init__(self) -> None:
        """Start without one."""
        self._key: _Key | None = None
        self._model: PreTrainedModel | None = None
        self._sums: list[int] = []
        self.num_loads = 0
        """How often a base was read from its folder."""

    def model(self, folder: Path, *, device: str, dtype: torch.dtype, keep: bool) -> PreTrainedModel:
        """A model of the base in ``folder``; arguments and errors as of `load_model`."""
        key = _Key(read_identity(folder).digest, _exact(device), dtype, keep)
        if self._model is None or self._key != key:
            self.free()  # first, so that two are never in memory
            self._model = load_model(folder, device=device, dtype=dtype, keep=keep).requires_grad_(False)
            self._key, self._sums = key, _sums(self._model)
            self.num_loads += 1
        else:
            logger.info("the base is in memory already")
        return _sharing(self._model)

    def check(self) -> None:
        """Give up a base whose tensors are not what they were; to be called when no model of it is in use."""
        if self._model is not None and _sums(self._model) != self._sums:
            logger.info("the base's own weights were trained; the next model reads them from its folder again")
            self.free()
        elif self._model is not None:
            self._model.requires_grad_(False).zero_grad(set_to_none=True)
        _collect()

    def free(self) -> None:
        """Give up the base."""
        self._model, self._key, self._sums = None, None, []
        _collect()

    def num_bytes(self, device: str) -> int:
        """Bytes that it takes on a device."""
        if self._model is None or self._key is None or self._key.device.type != torch.device(device).type:
            return 0
        return sum(tensor.nbytes for tensor in _tensors(self._model).values())


_kept: KeptBase | None = None


def keep_bases() -> KeptBase:
    """From now on this process keeps the last base that `load_base` loaded."""
    global _kept
    _kept = _kept or KeptBase()
    return _kept


def load_base(
    folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32, keep: bool = False
) -> PreTrainedModel:
    """`load_model`, or a model that shares its tensors with the base that this process keeps (`keep_bases`)."""
    if _kept is None:
        return load_model(folder, device=device, dtype=dtype, keep=keep)
    return _kept.model(folder, device=device, dtype=dtype, keep=keep)


def kept_bytes(device: str) -> int:
    """Bytes on ``device`` of the base that this process keeps; 0 if it keeps none."""
    return _kept.num_bytes(device) if _kept else 0


def _tensors(model: PreTrainedModel) -> dict[int, Tensor]:
    """Parameters and buffers by identity: tied ones once."""
    return {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}


def _sharing(model: PreTrainedModel) -> PreTrainedModel:
    memo: dict[int, object] = {**_tensors(model)}
    return copy.deepcopy(model, memo)


@torch.no_grad()
def _sums(model: PreTrainedModel) -> list[int]:
    """A sum over each tensor's bits, as integers, which is as exact as it is fast."""
    return [_sum(tensor) for tensor in _tensors(model).values()]


def _sum(tensor: Tensor) -> int:
    bits = tensor.detach().contiguous().reshape(-1).view(_INTEGERS[tensor.element_size()])
    return sum(int(piece.sum(dtype=torch.int64)) for piece in bits.split(_PIECE))


def _exact(device: str) -> torch.device:
    """The device with its number: ``cuda`` is the current GPU."""
    place = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if place == torch.device("cuda") else place


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
