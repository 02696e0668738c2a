"""Assigns rows to steps and turns them into tensors.

The order is a pure function of the row lengths, the settings and the seed, so a resumed training continues it without
storing it. A step's rows do not depend on how the step is split into micro-batches: 1 x 16 and 4 x 4 see the same
sixteen rows.

Shapes: B rows per micro-batch, T tokens of the longest row, N supervised tokens.
"""

import math
from collections.abc import Sequence
from itertools import takewhile
from typing import Literal, NotRequired, TypedDict

import numpy
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import Dataset
from transformers import DynamicCache, PreTrainedModel

from graftline.data.columns import EncodedColumns, columns_of
from graftline.data.template import Encoded
from graftline.digest import Digest, of_bytes, of_json
from graftline.errors import TrainError
from graftline.train import attention, packing
from graftline.train.packing import attention_arguments

Layout = Literal["padded", "packed", "in one sequence", "shared prefix"]
"""How a micro-batch arranges its rows; in one sequence they are packed without any padding."""
SHORTEST_PREFIX = 8
"""A shorter prefix does not pay for its extra pass over the weights."""
_PACKED_TOKENS = 2048
"""Length of packed sequences: without a variable-length kernel, attention cost is quadratic in it."""
_WINDOW_STEPS = 16
"""Rows are sorted by length within windows of this many steps: little padding, but still well shuffled."""


class MicroBatch(TypedDict):
    """Rows padded on the right, or in another layout.

    Causal attention never looks to the right, so right padding needs no mask: values at padded positions are unused.
    """

    input_ids: Tensor
    """(B, T) int64; padding is token 0. Packed: several rows concatenated."""
    position_ids: NotRequired[Tensor]
    """Packed only: (B, T) int64, from 0 in each row."""
    row_bounds: NotRequired[Tensor]
    """Packed only: (rows + 1,) int32, start of each row in the flat batch, then the end of the batch."""
    longest_row: NotRequired[int]
    """Packed only: number of tokens in the longest row."""
    prefix_ids: NotRequired[Tensor]
    """Shared prefix only: (1, P) int64, the common prefix; ``input_ids`` holds the rest of each row."""
    predict_at: Tensor
    """(N,) int64: flat positions in (B·T) whose next token is supervised."""
    targets: Tensor
    """(N,) int64: those next tokens."""
    num_tokens: Tensor
    """() int64: number of tokens, excluding padding."""
    num_targets: NotRequired[Tensor]
    """Not packed: (B,) int64, how many of ``targets`` belong to each row, in order."""


def plan_steps(lengths: ArrayLike, *, num_steps: int, rows_per_step: int, seed: int) -> NDArray[numpy.int64]:
    """(steps, rows_per_step) row indices; each step holds rows of similar length.

    A step at an epoch boundary holds rows of both epochs, so every step is full and every row is seen once before any
    repeats. The step with the longest row comes first, so that insufficient memory shows at once.
    """
    of_row = numpy.asarray(lengths)
    steps = _shuffled_rows(len(of_row), num_steps * rows_per_step, seed).reshape(num_steps, rows_per_step)
    chooser = torch.Generator().manual_seed(seed + 1)
    for first in range(0, num_steps, _WINDOW_STEPS):
        window = steps[first : first + _WINDOW_STEPS]
        rows = window.ravel()
        ordered = rows[numpy.lexsort((rows, of_row[rows]))].reshape(window.shape)
        window[:] = ordered[torch.randperm(len(window), generator=chooser).numpy()]
    longest = int(of_row[steps[:, -1]].argmax())
    steps[[0, longest]] = steps[[longest, 0]]
    return steps


def _shuffled_rows(num_rows: int, num_wanted: int, seed: int) -> NDArray[numpy.int64]:
    """The first ``num_wanted`` indices of successive shuffles of all rows."""
    chooser = torch.Generator().manual_seed(seed)
    wanted = numpy.empty(num_wanted, dtype=numpy.int64)
    for start in range(0, num_wanted, num_rows):
        part = wanted[start : start + num_rows]
        part[:] = torch.randperm(num_rows, generator=chooser).numpy()[: len(part)]
    return wanted


def count_steps(num_rows: int, *, steps: int | None, epochs: float | None, rows_per_step: int) -> int:
    """Number of optimizer steps, given ``steps`` or ``epochs`` over ``num_rows`` rows.

    Raises:
        TrainError: both or neither are given.
    """
    if (steps is None) == (epochs is None):
        raise TrainError(f"steps is {steps} and epochs is {epochs}; give exactly one of them")
    return steps if steps is not None else max(1, math.ceil((epochs or 0) * num_rows / rows_per_step))


class MicroBatches(Dataset[MicroBatch]):
    """All micro-batches of a training in order, built on access.

    With several devices, micro-batch ``i`` goes to device ``i mod devices``.
    """

    def __init__(self, rows: Sequence[Encoded], steps: ArrayLike, *, parts: int, layout: Layout = "padded") -> None:
        """``steps``: (steps, rows per step). ``parts``: micro-batches per step, over all devices."""
        self.rows, self.parts, self._layout = columns_of(rows), parts, layout
        of_steps = numpy.asarray(steps, dtype=numpy.int64)
        self._row_indices = of_steps.reshape(-1, of_steps.shape[1] // parts)

    def __len__(self) -> int:
        """Number of micro-batches."""
        return len(self._row_indices)

    def __getitem__(self, at: int) -> MicroBatch:
        """Micro-batch ``at``."""
        rows = [self.rows[row] for row in self._row_indices[at].tolist()]
        if self._layout in ("packed", "in one sequence"):
            return pack_rows(rows, in_one=self._layout == "in one sequence")
        shared = shared_prefix(rows) if self._layout == "shared prefix" else 0
        return pad_rows(rows, shared_prefix=shared if shared >= SHORTEST_PREFIX else 0)

    def row_indices(self, step: int) -> list[int]:
        """Indices of the rows of optimizer step ``step`` (from 0)."""
        found: list[int] = self._row_indices[step * self.parts : (step + 1) * self.parts].ravel().tolist()
        return found

    def num_tokens(self) -> int:
        """Number of tokens in all micro-batches, excluding padding."""
        lengths = [len(row.input_ids) for row in self.rows]
        return sum(lengths[row] for piece in self._row_indices for row in piece)

    def digest(self) -> Digest:
        """Digest of all rows and their order: equal digests mean the same data in the same order."""
        order = [list(self._row_indices.shape), str(of_bytes(self._row_indices.tobytes()))]
        return of_json({"rows": str(self.rows.digest), "order": order})


def shared_prefix(rows: Sequence[Encoded]) -> int:
    """Length of the common prefix of all rows whose tokens neither are supervised nor predict a supervised token."""
    longest = min(supervised_positions(row)[0] - 1 for row in rows)
    first, others = rows[0].input_ids, rows[1:]
    same = (all(row.input_ids[at] == first[at] for row in others) for at in range(longest))
    return sum(takewhile(bool, same)) if others else 0


def pad_rows(rows: Sequence[Encoded], *, shared_prefix: int = 0) -> MicroBatch:
    """Right-pad rows to the longest; the first ``shared_prefix`` tokens, equal in all, are stored once, separately."""
    longest = max(len(row.input_ids) for row in rows) - shared_prefix
    ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    for at, row in enumerate(rows):
        ids_BT[at, : len(row.input_ids) - shared_prefix] = torch.tensor(row.input_ids[shared_prefix:])
    starts = range(-shared_prefix, len(rows) * longest - shared_prefix, longest)
    batch = _micro_batch(rows, ids_BT, starts)
    if shared_prefix:
        batch["prefix_ids"] = torch.tensor([rows[0].input_ids[:shared_prefix]])
    return batch


def pack_rows(rows: Sequence[Encoded], *, in_one: bool = False) -> MicroBatch:
    """Pack rows into few sequences of 2048 tokens, or of the longest row's length if that is more.

    ``in_one``: into one sequence without padding, for attention that takes the rows' bounds, whose cost does not depend
    on the length of a sequence. Sequences of 2048 tokens hold 18 % of padding with 16 rows of a median of 245 tokens.
    """
    lengths = [len(row.input_ids) for row in rows]
    packed = packing.pack_rows(rows, max_tokens=sum(lengths) if in_one else max(*lengths, _PACKED_TOKENS))
    return MicroBatch(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        row_bounds=packed.bounds,
        longest_row=packed.longest,
        predict_at=packed.predict_at,
        targets=packed.targets,
        num_tokens=torch.tensor(packed.num_tokens),
    )


def _micro_batch(rows: Sequence[Encoded], ids_BT: Tensor, starts: Sequence[int]) -> MicroBatch:
    """``starts``: flat position of each row's first token."""
    supervised = [supervised_positions(row) for row in rows]
    predict_at = [start + at - 1 for start, positions in zip(starts, supervised, strict=True) for at in positions]
    targets = [row.input_ids[at] for row, positions in zip(rows, supervised, strict=True) for at in positions]
    return MicroBatch(
        input_ids=ids_BT,
        predict_at=torch.tensor(predict_at, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        num_tokens=torch.tensor(sum(len(row.input_ids) for row in rows)),
        num_targets=torch.tensor([len(positions) for positions in supervised]),
    )


def supervised_positions(row: Encoded) -> list[int]:
    """Positions of the supervised tokens that can be predicted: all except the row's first token."""
    return [position for position, mark in enumerate(row.supervised) if mark and position > 0]


def check_rows(rows: Sequence[Encoded]) -> None:
    """Reject rows from which nothing can be learned.

    Raises:
        TrainError: there are no rows, or one has no supervised token that can be predicted or a wrong number of marks.
    """
    if not rows:
        raise TrainError("no rows to train on; at least one is expected: look at the data stage's report")
    for at, row in enumerate(() if isinstance(rows, EncodedColumns) else rows):
        num_tokens, num_marks = len(row.input_ids), len(row.supervised)
        if num_tokens != num_marks:
            raise TrainError(f"row {at} has {num_tokens} tokens but {num_marks} marks; one mark a token is expected")
    columns = columns_of(rows)
    for at in numpy.flatnonzero(columns.count_learned(after=1) == 0)[:1].tolist():
        raise TrainError(
            f"row {at} has no supervised token after its first of {columns.lengths[at]} tokens; "
            "at least one is expected: raise data.max_tokens or drop the row"
        )


# Layouts that save work, and checks on the model itself that they do not change the result.
#
# Packed: several rows in one sequence, kept apart by their positions (graftline.train.packing).
#
# Shared prefix: the common prefix of a micro-batch's rows (a system prompt, an instruction) runs once, and the rows
# attend to its keys and values. The gradient through them is the sum over the rows, as if each row had its own copy.

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Maximum difference of hidden states, relative to the largest hidden state."""


def hidden_states(model: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """Last hidden states (B, T, H) of the decoder's body for a micro-batch in any layout."""
    ids_BT = batch["input_ids"]
    if "prefix_ids" not in batch:
        apart: dict[str, Tensor | int] = {}
        if "position_ids" in batch:
            made = (batch["row_bounds"], batch["longest_row"]) if "row_bounds" in batch else None
            implementation = model.config._attn_implementation
            apart = attention_arguments(batch["position_ids"], implementation=implementation, made=made)
        return model.base_model(input_ids=ids_BT, use_cache=False, **apart).last_hidden_state
    cache = DynamicCache(config=model.config)
    model.base_model(input_ids=batch["prefix_ids"], past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(len(ids_BT))
    return model.base_model(input_ids=ids_BT, past_key_values=cache, use_cache=True).last_hidden_state


def can_share_prefix(model: PreTrainedModel) -> bool:
    """Whether rows after a shared prefix have the same hidden states as alone."""
    try:
        return _difference(model, pad_rows(_probes(model), shared_prefix=_PREFIX)) is None
    except (TypeError, ValueError, AttributeError):
        return False  # an architecture without a KV cache


_PREFIX, _LENGTHS = 5, (12, 6, 17)


def _probes(model: PreTrainedModel) -> list[Encoded]:
    """Three rows of random tokens that share their first five."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (sum(_LENGTHS),), generator=torch.Generator().manual_seed(0)).tolist()
    prefix = ids[:_PREFIX]
    starts = [sum(_LENGTHS[:at]) for at in range(len(_LENGTHS))]
    rows = [prefix + ids[start + _PREFIX : start + length] for start, length in zip(starts, _LENGTHS, strict=True)]
    return [Encoded(row, [at > _PREFIX for at in range(len(row))]) for row in rows]


@torch.no_grad()
def _difference(model: PreTrainedModel, batch: MicroBatch) -> float | None:
    """Relative difference at the predicting positions between ``batch`` and each probe alone; None if tolerable."""
    probes = _probes(model)
    was_training = model.training
    model.eval()
    together_NH = _predicting(model, batch)
    apart_NH = torch.cat([_predicting(model, pad_rows([probe])) for probe in probes])
    model.train(was_training)
    difference = float((together_NH.float() - apart_NH.float()).abs().max() / apart_NH.float().abs().max())
    return None if difference < _TOLERANCE.get(together_NH.dtype, 0.0) else difference


def _predicting(model: PreTrainedModel, batch: MicroBatch) -> Tensor:
    device = next(model.parameters()).device
    on_device: MicroBatch = {name: tensor.to(device) for name, tensor in batch.items()}  # type: ignore[assignment,attr-defined]
    return hidden_states(model, on_device).flatten(0, 1)[on_device["predict_at"]]


def use_row_attention(model: PreTrainedModel) -> bool:
    """Switch the model to `graftline.train.attention` if that matches its own attention on a few rows.

    Returns:
        Whether the model was switched. An explicitly chosen attention (not sdpa) is kept.
    """
    if model.config._attn_implementation != "sdpa":
        return False
    probes, was_training = pad_rows(_probes(model)), model.training
    model.eval()
    with torch.no_grad():
        own_NH = _predicting(model, probes).float()
        before = attention.set_attention(model, attention.NAME)
        try:
            difference = float((_predicting(model, probes).float() - own_NH).abs().max() / own_NH.abs().max())
        except (TypeError, ValueError, RuntimeError):
            difference = math.inf
    model.train(was_training)
    if difference < _TOLERANCE.get(model.dtype, 0.0):
        return True
    attention.set_attention(model, before)
    return False
