"""A model's logits, a bounded number of positions at a time.

Logits are positions x vocabulary: 2,000 positions of a vocabulary of 150,000 take 1.2 GB in fp32, often more than all
activations. So the decoder runs first, and then the head on as many positions at a time as fit `CHUNK_BYTES`. Whatever
an architecture does with its logits after the head (scaling, soft-capping) applies to each chunk, because the model's
own forward function computes it.

Logits are computed in fp32 from the stored weights, even where the decoder computes in 16 bits: bfloat16 has steps of
0.125 near 20, so close options would tie.

Tensor names: B rows, T columns, N positions, C positions of a chunk, H hidden size, V vocabulary.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftline.errors import CheckpointError
from graftline.weights.stored import StoredLinear

CHUNK_BYTES = 256 << 20
"""Size of one fp32 copy of a chunk's logits."""


def max_positions_at_once(vocabulary: int, *, chunk_bytes: int | None = None) -> int:
    """How many positions' logits fit into ``chunk_bytes`` (`CHUNK_BYTES`) in fp32; at least one."""
    return max(1, (chunk_bytes or CHUNK_BYTES) // (4 * vocabulary))


class _Decoded:
    """A decoder's output with only the last hidden states."""

    def __init__(self, hidden_BTH: Tensor) -> None:
        self.last_hidden_state = hidden_BTH

    def __getitem__(self, at: Any) -> Any:
        return (self.last_hidden_state,)[at]

    def __getattr__(self, name: str) -> None:
        return None


def hidden_states(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """The head's inputs (B, T, H) for these arguments of the model's forward function.

    Raises:
        CheckpointError: the model has no output layer.
    """
    found: list[Tensor] = []

    def take(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found.append(args[0])
        return (args[0][:1, -1:], *args[1:])  # one position, whose logits nobody reads

    handle = head_of(model).register_forward_pre_hook(take)
    try:
        model(**inputs)
    finally:
        handle.remove()
    return found[0]


def head_of(model: PreTrainedModel) -> nn.Module:
    """The output layer; CheckpointError if there is none."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise CheckpointError(f"{type(model).__name__} has no output layer; a causal language model is expected")
    return head


def logits_of(
    model: PreTrainedModel, hidden_NH: Tensor, *, chunk_bytes: int | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Logits (C, V) in fp32 of hidden states from `hidden_states`, chunk by chunk, each with its first position.

    The decoder is not run, and may be missing (`without_decoder`).
    """
    vocabulary = int(model.config.get_text_config().vocab_size)
    size, decoder = max_positions_at_once(vocabulary, chunk_bytes=chunk_bytes), model.base_model
    with _in_fp32(head_of(model)):
        for start in range(0, len(hidden_NH), size):
            chunk_CH = hidden_NH[start : start + size].float()
            ids = torch.zeros(1, len(chunk_CH), dtype=torch.long, device=chunk_CH.device)
            decoder.forward = lambda *_, _given=chunk_CH, **__: _Decoded(_given[None])
            try:
                logits_CV: Tensor = model(input_ids=ids, use_cache=False).logits[0]
            finally:
                del decoder.forward
            yield start, logits_CV


@contextlib.contextmanager
def _in_fp32(head: nn.Module) -> Iterator[None]:
    """Let a dense head, or the one below an adapter, convert its weight to what it is given."""
    changed = [layer for layer in head.modules() if type(layer) is nn.Linear and layer.weight.dtype != torch.float32]
    for layer in changed:
        layer.__class__ = StoredLinear
    try:
        yield
    finally:
        for layer in changed:
            layer.__class__ = nn.Linear


class _NoDecoder(nn.Module):
    def get_input_embeddings(self) -> None:
        """Asked by transformers before it names the output layer."""


def without_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The model's head alone, for `logits_of`: once the model itself is gone, so is the memory of its decoder."""
    head = copy.copy(model)
    head._modules = {**model._modules, model.base_model_prefix: _NoDecoder()}
    return head
