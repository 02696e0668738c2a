"""Attention without a mask: row bounds in the flat batch keep packed rows apart.

transformers' own attention gets packed rows as a dense mask (T², which no flash kernel accepts), and reads the
position values on the device in every forward pass to detect packing, so the host waits. This module reads no values.
On a GPU, torch's variable-length flash kernel computes packed rows; elsewhere each row is computed separately, with
the same result.

`use_row_attention` verifies on the model itself that the result matches its own attention; a model that needs more
(soft capping, sinks, biases) keeps its own.

Shapes: B sequences, H query heads, K key heads, T queries, S keys, D head size.
"""

import contextlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, PreTrainedModel

NAME = "graftline_rows"
Scored = TypeVar("Scored")
_NEEDS_MORE = ("softcap", "s_aux", "position_bias", "cache")
"""Keyword arguments that request an unsupported kind of attention."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **given: Any,
) -> tuple[Tensor, None]:
    """Causal attention as transformers calls it: query (B, H, T, D), key and value (B, K, S, D) → (B, T, H, D).

    ``cu_seq_lens_q``, (rows + 1,) int32, holds the bounds of packed rows in the flat batch; without it each sequence
    is one row, and the queries are its last T positions.

    Raises:
        ValueError: an unsupported kind of attention, or a mask.
    """
    more = [name for name in _NEEDS_MORE if given.get(name) is not None]
    if more or attention_mask is not None or not getattr(module, "is_causal", True):
        raise ValueError(f"{NAME} computes causal attention without {', '.join(more) or 'a mask'}")
    dropout = given.get("dropout", 0.0) if module.training else 0.0
    window, bounds = given.get("sliding_window"), given.get("cu_seq_lens_q")
    if bounds is None:
        y = _causal(query, key, value, scale=given.get("scaling"), dropout=dropout, window=window)
        return y.transpose(1, 2), None
    if dropout:
        raise ValueError(f"{NAME} has no dropout of attention weights for packed rows")
    flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]
    rows = _rows_by_kernel if query.is_cuda else _rows_one_by_one
    y_NHD = rows(flat, bounds, given["max_length_q"], scale=given.get("scaling"), window=window)
    return y_NHD.view(len(query), query.shape[2], *y_NHD.shape[1:]), None


def _causal(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dropout: float, window: int | None
) -> Tensor:
    """(B, H, T, D): each query sees the keys up to its own position; with a window, the last ``window`` of them."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    common: dict[str, Any] = {"scale": scale, "dropout_p": dropout, "enable_gqa": query.shape[1] != key.shape[1]}
    if window is not None and num_keys > window:
        at = torch.arange(num_keys, device=query.device)
        back = at[num_keys - num_queries :, None] - at
        return F.scaled_dot_product_attention(query, key, value, (back >= 0) & (back < window), **common)
    if num_queries == num_keys:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, **common)
    return F.scaled_dot_product_attention(query, key, value, causal_lower_right(num_queries, num_keys), **common)


def _rows_by_kernel(
    flat: list[Tensor], bounds: Tensor, longest: int, *, scale: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = flat
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0)}
    if "enable_gqa" in known:
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    else:
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    return cast(Tensor, varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scale, **options))


def _rows_one_by_one(
    flat: list[Tensor], bounds: Tensor, longest: int, *, scale: float | None, window: int | None
) -> Tensor:
    del longest
    sizes = bounds.diff().tolist()
    rows = [
        _causal(*(part.transpose(0, 1)[None] for part in parts), scale=scale, dropout=0.0, window=window)
        for parts in zip(*(tensor.split(sizes) for tensor in flat), strict=True)
    ]
    return torch.cat([row[0].transpose(0, 1) for row in rows])


def can_run_here(model: PreTrainedModel) -> bool:
    """Whether the flash kernel supports the model: a GPU, half precision, a head size of at most 256."""
    config = model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    half = model.dtype in (torch.bfloat16, torch.float16)
    known = importlib.util.find_spec("torch.nn.attention.varlen") is not None
    return model.device.type == "cuda" and half and size <= 256 and known


def set_attention(model: PreTrainedModel, name: str) -> str:
    """Switch the model to another attention; returns the name of the previous one."""
    before = str(model.config._attn_implementation)
    AttentionInterface.register(NAME, attend)
    for config in (model.config, model.config.get_text_config()):
        config._attn_implementation = name
    return before


@contextlib.contextmanager
def own_attention_after(model: PreTrainedModel) -> Iterator[Callable[..., Callable[[PreTrainedModel], Any]]]:
    """Restore the model's own attention on exit; yields a wrapper that runs a function of the model with it.

    Scoring and generation may pad on the left with a mask, which attention by bounds does not accept.
    """
    own = str(model.config._attn_implementation)

    def with_own(look: Callable[[PreTrainedModel], Scored]) -> Callable[[PreTrainedModel], Scored]:
        def looked(looked_at: PreTrainedModel) -> Scored:
            trained_with = set_attention(looked_at, own)
            try:
                return look(looked_at)
            finally:
                set_attention(looked_at, trained_with)

        return looked

    try:
        yield with_own
    finally:
        set_attention(model, own)
