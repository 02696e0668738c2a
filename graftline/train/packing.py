"""Packs several rows into one token sequence to reduce padding, without rows seeing each other.

Positions restart at 0 in each row. From `position_ids` alone (no attention mask, no cache) transformers builds the
block-diagonal mask for its eager and sdpa attention, per layer type: full or sliding window. A custom 4-D mask gives
equal logits with full attention, but is wrong for sliding-window layers, whose mask it would replace. Not every
architecture reads positions this way (measured: OPT, BLOOM and Mamba do not), so `check_packing` verifies it on the
model to be trained.

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
"""Tolerated share of the logit difference that packing without separation causes; the rest is rounding (bf16)."""
_ROUNDING = 1e-4
"""Differences below this share of the largest logit count as fp32 rounding."""


@dataclass(frozen=True)
class PackedRows:
    """Packed rows as tensors; right padding is token 0 and counts as a separate, unused row."""

    input_ids: Tensor
    """(B, T) int64."""
    position_ids: Tensor
    """(B, T) int64: each row's positions from 0."""
    predict_at: Tensor
    """(N,) int64: flat positions in B·T whose next token is supervised; never the last token of the previous row."""
    targets: Tensor
    """(N,) int64: those next tokens."""
    num_tokens: int
    """Number of tokens, excluding padding."""
    bounds: Tensor
    """(rows + 1,) int32: start of each row in the flat batch, padding counted as a row, then the end."""
    longest: int
    """Number of tokens in the longest of these rows."""


def plan_packing(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Row indices of each packed row: best-fit decreasing, in O(n log n).

    Longest first, each row goes into the fullest packed row with room: at most 11/9 of the optimal number of packed
    rows (Johnson et al. 1974), like first-fit decreasing. Within a packed row, rows keep their given order.

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
    """Pack rows into sequences of at most ``max_tokens`` tokens, as planned by `plan_packing`.

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
    """Row bounds in the flat batch, and the longest row. Runs on the CPU because it reads values."""
    flat = position_ids_BT.cpu().flatten()
    starts = (flat == 0).nonzero().flatten()
    bounds = torch.cat([starts, starts.new_tensor([len(flat)])]).to(torch.int32)
    return bounds, int(bounds.diff().max())


def attention_arguments(
    position_ids_BT: Tensor, *, implementation: str, made: tuple[Tensor, int] | None = None
) -> dict[str, Tensor | int]:
    """Keyword arguments that keep the rows apart in a transformers model called without attention mask and cache.

    ``flash_attention_2`` and `graftline.train.attention` also get the row bounds in the flat batch: cu_seq_lens
    (rows + 1,) int32 and the longest row, as ``made`` by `pack_rows`. Otherwise the former would recompute them in each
    layer, and for B > 1 not find them at all.
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
    """Verify on three short random rows that the model's logits are the same packed and alone; returns the difference.

    The model's attention implementation, dtype and adapters are used as they are.

    Raises:
        TrainError: rows see each other, or the model does not use positions.
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
