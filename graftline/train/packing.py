"""Several rows in one row of tokens, so that little is padding, without one row seeing another.

Positions start again at 0 with each row. From `position_ids` alone (no attention mask, no cache) transformers makes the
block-diagonal mask for its eager and sdpa attention, for each layer's kind: full or sliding window. A 4-D mask of our
own gives equal logits on full attention, but is wrong where layers have a window: it would replace theirs. Not every
architecture reads positions this way (measured: OPT, BLOOM and Mamba do not), so `check_packing` proves it on the
model that is going to be trained.

Shapes: B packed rows, T tokens of the longest one, N supervised tokens.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from graftline.data.template import Encoded
from graftline.errors import TrainError
from graftline.train import attention

_PROBE_LENGTHS = (7, 11, 5)
_LARGEST_SHARE = 0.1
"""Of the difference that packing without separation makes, how much may be left: the rest is rounding (bf16)."""
_ROUNDING = 1e-4
"""Differences below this share of the largest logit are rounding in fp32."""


@dataclass(frozen=True)
class PackedRows:
    """Packed rows as tensors; padding on the right is token 0 and counts as a row of its own that nobody reads."""

    input_ids: Tensor
    """(B, T) int64."""
    position_ids: Tensor
    """(B, T) int64: each row's positions from 0."""
    predict_at: Tensor
    """(N,) int64: flat positions in B·T whose next token is supervised; never the last token of the row before."""
    targets: Tensor
    """(N,) int64: those next tokens."""
    num_tokens: int
    """Tokens without padding."""
    bounds: Tensor
    """(rows + 1,) int32: where each row begins in the flat batch, padding as a row too; and the end."""
    longest: int
    """Tokens of the longest of these rows."""


def plan_packing(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Indices of the rows of each packed row: best-fit decreasing, in O(n log n).

    Longest first, each into the fullest packed row that still has room: at most 11/9 of the least number of packed rows
    (Johnson et al. 1974), as first-fit decreasing. Rows of a packed row are in their given order.

    Raises:
        TrainError: a row is longer than ``max_tokens``.
    """
    packed: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, packed row), sorted
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if lengths[row] > max_tokens:
            raise TrainError(
                f"row {row} has {lengths[row]} tokens, a packed row has {max_tokens}; raise data.max_tokens or drop it"
            )
        at = bisect.bisect_left(room, (lengths[row], 0))
        left, into = room.pop(at) if at < len(room) else (max_tokens, len(packed))
        if into == len(packed):
            packed.append([])
        packed[into].append(row)
        bisect.insort(room, (left - lengths[row], into))
    return [sorted(rows) for rows in packed]


def pack_rows(rows: Sequence[Encoded], *, max_tokens: int) -> PackedRows:
    """Pack rows into as few rows of at most ``max_tokens`` tokens as `plan_packing` finds.

    Raises:
        TrainError: a row is longer than ``max_tokens``.
    """
    plan = plan_packing([len(row.input_ids) for row in rows], max_tokens=max_tokens)
    longest = max(sum(len(rows[row].input_ids) for row in packed) for packed in plan)
    ids_BT = torch.zeros(len(plan), longest, dtype=torch.long)
    positions_BT = torch.zeros(len(plan), longest, dtype=torch.long)
    predict_at: list[int] = []
    targets: list[int] = []
    for b, packed in enumerate(plan):
        start = 0
        for row in (rows[at] for at in packed):
            length = len(row.input_ids)
            ids_BT[b, start : start + length] = torch.tensor(row.input_ids)
            positions_BT[b, start : start + length] = torch.arange(length)
            learned = [at for at, mark in enumerate(row.supervised) if mark and at > 0]
            predict_at += [b * longest + start + at - 1 for at in learned]
            targets += [row.input_ids[at] for at in learned]
            start += length
        positions_BT[b, start:] = torch.arange(longest - start)
    num_tokens = sum(len(row.input_ids) for row in rows)
    bounds, most = _bounds(positions_BT)
    return PackedRows(ids_BT, positions_BT, torch.tensor(predict_at), torch.tensor(targets), num_tokens, bounds, most)


def _bounds(position_ids_BT: Tensor) -> tuple[Tensor, int]:
    """Where rows begin in the flat batch, and the longest one. On the CPU: it looks at values."""
    flat = position_ids_BT.cpu().flatten()
    starts = (flat == 0).nonzero().flatten()
    bounds = torch.cat([starts, starts.new_tensor([len(flat)])]).to(torch.int32)
    return bounds, int(bounds.diff().max())


def attention_arguments(
    position_ids_BT: Tensor, *, implementation: str, made: tuple[Tensor, int] | None = None
) -> dict[str, Tensor | int]:
    """Keyword arguments that keep the rows apart in a transformers model called without attention mask and cache.

    ``flash_attention_2`` and `graftline.train.attention` get the rows' bounds in the flat batch too: cu_seq_lens
    (rows + 1,) int32 and the longest row, as `pack_rows` has ``made`` them. The first would otherwise find them again
    in each layer, and for B > 1 not at all.
    """
    if implementation not in ("flash_attention_2", attention.NAME):
        return {"position_ids": position_ids_BT}
    bounds, longest = made or _bounds(position_ids_BT)
    bounds = bounds.to(position_ids_BT.device)
    return {
        "position_ids": position_ids_BT,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> float:
    """Prove on three short random rows that the model's logits are the same packed and alone; returns the difference.

    The model's attention implementation, dtype and adapters are used as they are.

    Raises:
        TrainError: rows see each other, or the model takes no positions.
    """
    chooser = torch.Generator().manual_seed(0)
    vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    rows = [torch.randint(vocabulary, (length,), generator=chooser).tolist() for length in _PROBE_LENGTHS]
    packed = pack_rows([Encoded(row, [True] * len(row)) for row in rows], max_tokens=sum(_PROBE_LENGTHS))
    training = model.training
    model.eval()
    try:
        alone = torch.cat([_logits(model, torch.tensor([row])) for row in rows], dim=1)
        together = _logits(model, packed.input_ids)
        apart = _logits(model, packed.input_ids, packed.position_ids)
    finally:
        model.train(training)
    left, without = (float((logits - alone).abs().max()) for logits in (apart, together))
    if left > max(_LARGEST_SHARE * without, _ROUNDING * float(alone.abs().max())):
        raise TrainError(
            f"{type(model).__name__} with {model.config._attn_implementation} attention lets packed rows see each "
            f"other: logits differ by {left:.2g} (by {without:.2g} without separation); train it without packing"
        )
    return left


def _logits(model: PreTrainedModel, ids_BT: Tensor, position_ids_BT: Tensor | None = None) -> Tensor:
    arguments: dict[str, Tensor | int] = {}
    if position_ids_BT is not None:
        implementation = str(model.config._attn_implementation)
        arguments = attention_arguments(position_ids_BT.to(model.device), implementation=implementation)
    logits: Tensor = model(input_ids=ids_BT.to(model.device), use_cache=False, **arguments).logits
    return logits.float()
