"""Rounding that passes each column's error on to the columns after it, weighted by the layer's inputs: GPTQ.

    d_i = round(w_i),  e_i = (w_i − d_i) / U_ii,  W_{:,j} −= e_i · U_ij for j > i
    U: the upper triangle with UᵀU = R⁻¹, R = E[xᵀx] + damping

Frantar et al. 2022, arXiv 2210.17323. What a step rounds away is not lost: the columns that follow take it over as far
as their inputs resemble this one's. With inputs that do not correlate (a diagonal R) nothing is passed on.

That alone does not keep a small update of a weight which lies on the codes' values, W = Q + ΔW, as an adapter's merge
into a dequantized base is: moving a weight by a whole step often costs more error than the update is worth, so the
least error is reached with a part of the update, and the parts that every layer leaves out add up. Therefore Q + γ·ΔW
is rounded, with the γ ≥ 1 at which the whole update reaches the layer's output,

    ⟨(D − Q) Sᵀ, ΔW Sᵀ⟩ = ‖ΔW Sᵀ‖²,  D what Q + γ·ΔW becomes, SᵀS = R.

What is left is noise in other directions, which does not add up. γ is found on a part of the rows of W, all candidates
in one pass.

GPTQ decides on each column once, from the first to the last. Every column is then decided on again, given all others,
in a few sweeps that never make the error larger (QuantEase, Behdin et al. 2023, arXiv 2309.01885):

    d_j = round(d_j + ((W − D) R)_j / R_jj).

Blockwise code books keep the constants of plain quantization, which depend on whole blocks; only the codes differ.

Dimensions: O outputs, I inputs, G candidates for γ, N = rows of W that are rounded.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graftline.weights.quant.blockwise import FP8_MAX, QuantizedWeight, constants, pack, quantize
from graftline.weights.quant.scheme import Scheme, code_table, nearest_codes
from graftline.weights.quant.weighted import FullMetric

_BLOCK = 128
"""Columns whose errors reach the rest of the matrix in one product."""
_GAINS = tuple(2 ** (step / 3) for step in range(13))
"""Candidates for γ, from 1 to 16."""
_ENOUGH = 0.99
"""Share of an update that is kept anyway, with γ = 1."""
_SAMPLED_ROWS = 64
"""Rows of W on which γ is found."""

_SWEEPS = 3
"""Times that every column is decided on again."""

RoundColumn = Callable[[Tensor, int], Tensor]
"""Rounds a column, given what is left of the weight (N, I) and the column's number: the values that were taken (N,)."""


def elimination(L_II: Tensor) -> Tensor:
    """U of R = L Lᵀ, L a lower triangle. Memory: two matrices of L's size."""
    U_II: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(L_II), upper=True)
    return U_II


def round_compensated(W_NI: Tensor, U_II: Tensor, round_column: RoundColumn) -> None:
    """Round every column from the first to the last, and correct those that are left.

    Memory beside W: once more its size. Time: N · I² multiplications.

    Args:
        W_NI: fp32; it is not changed.
        U_II: `elimination`.
        round_column: keeps what it rounds to.
    """
    left_NI = W_NI.clone()
    for start in range(0, W_NI.shape[1], _BLOCK):
        end = min(start + _BLOCK, W_NI.shape[1])
        errors_NB = torch.zeros(len(W_NI), end - start)
        for at in range(start, end):
            error_N = (left_NI[:, at] - round_column(left_NI, at)) / U_II[at, at]
            left_NI[:, at:end] -= error_N[:, None] * U_II[at, at:end]
            errors_NB[:, at - start] = error_N
        left_NI[:, end:] -= errors_NB @ U_II[start:end, end:]


def sweep(W_NI: Tensor, R_II: Tensor, taken_NI: Tensor, round_column: RoundColumn) -> None:
    """Decide on every column of ``taken_NI`` again, given all the others; in place.

    Memory beside W and what was taken: twice their size. Time: N · I² multiplications, twice.
    """
    rest_NI = (W_NI - taken_NI) @ R_II
    for start in range(0, W_NI.shape[1], _BLOCK):
        end = min(start + _BLOCK, W_NI.shape[1])
        moved_NB = torch.zeros(len(W_NI), end - start)
        for at in range(start, end):
            rest_NI[:, at].div_(R_II[at, at]).add_(taken_NI[:, at])  # the best value of this column
            moved_N = round_column(rest_NI, at) - taken_NI[:, at]
            taken_NI[:, at] += moved_N
            rest_NI[:, at + 1 : end] -= moved_N[:, None] * R_II[at, at + 1 : end]
            moved_NB[:, at - start] = moved_N
        rest_NI[:, end:] -= moved_NB @ R_II[start:end, end:]


def quantize_compensated(
    W_OI: Tensor, scheme: Scheme, metric: FullMetric, base_OI: Tensor | None = None, *, sweeps: int = _SWEEPS
) -> QuantizedWeight:
    """Quantize a weight so that its layer's output is right on the rows of ``metric``; stored as by plain `quantize`.

    Memory beside W, base and metric: four fp32 copies of W, a byte a weight, two matrices of the metric's size.

    Args:
        W_OI: the weight.
        scheme: how it is stored.
        metric: of the layer's inputs.
        base_OI: the weight before an update, which is to reach the output whole; None: there was none.
        sweeps: times that every column is decided on again.
    """
    W_OI = W_OI.float()
    plain = quantize(W_OI, scheme)
    U_II = elimination(metric.L_II)
    codes = _Codes(constants(plain.absmax), scheme, W_OI.shape[1], U_II, metric.L_II @ metric.L_II.T, sweeps)
    if base_OI is not None:
        W_OI = W_OI - base_OI  # the update, and in the same memory what is rounded
        W_OI.mul_(_gain(base_OI, W_OI, metric, codes)).add_(base_OI)
    codes_OI = codes.round(W_OI, torch.arange(len(W_OI)))
    if scheme.code == "fp8":
        return replace(plain, packed=codes_OI.view(-1))
    zero = int(nearest_codes(torch.zeros(1), scheme.code))
    return replace(plain, packed=pack(codes_OI.view(-1), scheme.bits, fill=zero))


def _gain(base_OI: Tensor, update_OI: Tensor, metric: FullMetric, codes: "_Codes") -> float:
    """γ, between the two candidates around it."""
    rows_N = torch.arange(0, len(base_OI), -(-len(base_OI) // _SAMPLED_ROWS))
    base_NI, update_NI = base_OI[rows_N], update_OI[rows_N]
    wanted_NI = metric.scale(update_NI)
    whole = float(wanted_NI.square().sum())
    if whole == 0:
        return 1.0
    gains_G11 = torch.tensor(_GAINS).view(-1, 1, 1)
    all_rows_N = rows_N.repeat(len(_GAINS))
    codes_NI = codes.round((base_NI + gains_G11 * update_NI).flatten(0, 1), all_rows_N)
    taken_GNI = codes.values(codes_NI, all_rows_N).unflatten(0, (len(_GAINS), -1))
    kept = [float((metric.scale(taken_NI - base_NI) * wanted_NI).sum()) / whole for taken_NI in taken_GNI]
    if kept[0] >= _ENOUGH:
        return 1.0
    above = next((at for at, share in enumerate(kept) if share >= 1), None)
    if above is None:
        # Too little is left of an update that is far below a step: the best of what was tried.
        return _GAINS[kept.index(max(kept))]
    low, high = kept[above - 1], kept[above]
    share = (1 - low) / (high - low)
    return _GAINS[above - 1] + share * (_GAINS[above] - _GAINS[above - 1])


@dataclass(frozen=True)
class _Codes:
    """The codes of a weight with ``num_inputs`` columns, under constants as they are stored."""

    scale: Tensor
    scheme: Scheme
    num_inputs: int
    U_II: Tensor
    R_II: Tensor
    sweeps: int

    def round(self, W_NI: Tensor, rows_N: Tensor) -> Tensor:
        """Codes (N, I); ``rows_N``: which rows of the weight these are."""
        codes_NI = torch.empty(W_NI.shape, dtype=torch.uint8)

        def round_column(left_NI: Tensor, at: int) -> Tensor:
            scale_N = self._scale(rows_N, at)
            codes_NI[:, at] = self._nearest(left_NI[:, at], scale_N)
            return self._decode(codes_NI[:, at]) * scale_N

        round_compensated(W_NI, self.U_II, round_column)
        taken_NI = self.values(codes_NI, rows_N)
        for _ in range(self.sweeps):
            sweep(W_NI, self.R_II, taken_NI, round_column)
        return codes_NI

    def values(self, codes_NI: Tensor, rows_N: Tensor) -> Tensor:
        """What codes of these rows stand for."""
        return self._decode(codes_NI) * self._scale(rows_N.unsqueeze(1), torch.arange(self.num_inputs))

    def _scale(self, rows: Tensor, columns: Tensor | int) -> Tensor:
        # A row of FP8 has a scale; a block of a code book may cross rows.
        if self.scheme.code == "fp8":
            return self.scale[rows]
        return self.scale[(rows * self.num_inputs + columns) // self.scheme.block_size]

    def _nearest(self, values_N: Tensor, scale_N: Tensor) -> Tensor:
        # Constants in 8 bits can come out as zero, or below it for the smallest block of an uneven weight.
        scaled_N = values_N / torch.where(scale_N == 0, 1.0, scale_N)
        if self.scheme.code == "fp8":
            return scaled_N.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
        return nearest_codes(scaled_N.clamp_(-1, 1), self.scheme.code)

    def _decode(self, codes: Tensor) -> Tensor:
        if self.scheme.code == "fp8":
            return codes.contiguous().view(torch.float8_e4m3fn).float()
        return code_table(self.scheme.code)[codes.int()]
