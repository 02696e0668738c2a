"""Offloads activations of checkpointed blocks to host memory until the backward pass.

With gradient checkpointing each block keeps its input, (B, T, H), from the forward to the backward pass: layers x
tokens x width, most of the memory of a long context. Here the input is copied to pinned memory on a separate stream
while the next block runs, and copied back during the backward pass of the block after it. At most two inputs are on the
device at a time, and copies do not block computation; transformers' own offloading copies on the compute stream.

On a CPU the same bookkeeping runs on ordinary memory, for tests.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

_SMALLEST_BYTES = 1 << 20
"""Smaller tensors stay on the device: copying them costs more than it saves."""
_BUFFERS = 2


@dataclass
class _Away:
    """One activation in host memory, or being copied."""

    host: Tensor
    device: torch.device
    here: Tensor | None = None
    """The tensor on the device: the original until it is offloaded, the copy once it is fetched."""
    copied: Any = None
    """CUDA event recorded after the copy; None on a CPU."""


class ActivationOffload:
    """Offloads activations; wrap the checkpoint of each block in `saving`."""

    def __init__(self, *, smallest_bytes: int = _SMALLEST_BYTES) -> None:
        self._smallest = smallest_bytes
        self._away: list[_Away] = []
        self._stream: Any = None
        self.num_sent = 0
        """Number of activations offloaded so far."""

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Offload the tensors that are saved for the backward pass within this context."""
        with torch.autograd.graph.saved_tensors_hooks(self._send, self._fetch):
            yield

    def _send(self, tensor: Tensor) -> Tensor | _Away:
        if tensor.nbytes < self._smallest or isinstance(tensor, torch.nn.Parameter):
            return tensor
        host = self._host_tensor(tensor)
        away = _Away(host, tensor.device, here=tensor)
        with self._copying(tensor):
            host.copy_(tensor, non_blocking=True)
            away.copied = _event(tensor.device)
        self._away.append(away)
        self.num_sent += 1
        # Earlier originals are freed once their copies are done; the device waits, not the host.
        for earlier in self._away[-1 - _BUFFERS : -_BUFFERS]:
            self._let_go(earlier)
        return away

    def _host_tensor(self, tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)

    def _fetch(self, saved: Tensor | _Away) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        at = next((at for at, away in enumerate(self._away) if away is saved), None)
        if at is not None:
            for away in self._away[max(0, at + 1 - _BUFFERS) : at + 1][::-1]:
                self._bring_back(away)
            del self._away[at:]
        tensor = saved.here if saved.here is not None else self._bring_back(saved)
        if saved.copied is not None:
            torch.cuda.current_stream(saved.device).wait_event(saved.copied)
            tensor.record_stream(torch.cuda.current_stream(saved.device))
        saved.here = None
        return tensor

    def _bring_back(self, away: _Away) -> Tensor:
        if away.here is None:
            with self._copying(away.host, away.device):
                away.here = away.host.to(away.device, non_blocking=True, copy=True)
                away.copied = _event(away.device)
        return away.here

    def _let_go(self, away: _Away) -> None:
        if away.here is not None and away.copied is not None:
            torch.cuda.current_stream(away.device).wait_event(away.copied)
        away.here = None

    @contextlib.contextmanager
    def _copying(self, tensor: Tensor, device: torch.device | None = None) -> Iterator[None]:
        """On a GPU, enter the copy stream, ordered after all work queued on the compute stream."""
        device = device or tensor.device
        if device.type != "cuda":
            yield
            return
        self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            yield
        if tensor.is_cuda:
            tensor.record_stream(self._stream)


def _event(device: torch.device) -> Any:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def checkpoint_blocks(model: PreTrainedModel, *, offload: ActivationOffload | None = None) -> None:
    """Recompute each block's activations in the backward pass; ``offload`` keeps its input on the host meanwhile."""
    model.activation_checkpointing_enable({"use_reentrant": False})
    if offload is None:
        return

    def away(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with offload.saving():
            return checkpoint(function, *args, use_reentrant=False, **kwargs)

    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module._gradient_checkpointing_func = away  # type: ignore[assignment]
