"""Quantization and low-rank factors made together: W ≈ Q + s·B·A.

    LoftQ (Li et al. 2023, arXiv 2310.08659): BA = 0;        t = 1…T:  Q = q(W − s·BA),  s·BA = SVD_R(W − Q)
    QPiSSA (Meng et al. 2024, arXiv 2404.02948): s·BA = SVD_R(W);  t = 1…T:  Q = q(W − s·BA),  then s·BA = SVD_R(W − Q)

LoftQ's pair ends with the decomposition, QPiSSA's with the quantization, so that its factors stay the principal part.
Neither error falls steadily: the best step is kept. S is divided by s *before* its root goes to both factors, so the
equation holds for every alpha (PEFT and LoftQ's own code leave the division out: METHODS §1.8).

Dimensions: O outputs, I inputs, R rank.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from graftline.errors import QuantizeError
from graftline.weights.linalg import truncated_svd
from graftline.weights.quant.blockwise import PIECE, Quantized, dequantized_pieces, quantize
from graftline.weights.quant.scheme import Scheme

Method = Literal["loftq", "qpissa"]


@dataclass(frozen=True)
class Factors:
    """What a layer's adapter will be: its rank, and s, which multiplies B·A (alpha / rank, say)."""

    rank: int
    scale: float


@dataclass(frozen=True)
class Pair:
    """A quantized weight and its initial factors A (R, I), B (O, R), fp32. Errors are relative, ‖W − …‖ / ‖W‖.

    error: of the pair. error_alone: of the quantized weight without the factors. step_errors: of the pair after each
    step; the smallest is ``error``. error_plain: of quantizing the weight by itself, LoftQ's first step; None for
    QPiSSA, which does not go through it.
    """

    quantized: Quantized
    A_RI: Tensor
    B_OR: Tensor
    error: float
    error_alone: float
    step_errors: tuple[float, ...] = ()
    error_plain: float | None = None


def make_pair(
    W_OI: Tensor, scheme: Scheme, factors: Factors, *, method: Method, steps: int, generator: torch.Generator
) -> Pair:
    """Quantize a weight together with factors. Memory beside W: one fp32 copy, the codes twice, thin matrices.

    Raises:
        QuantizeError: a rank that is not between 1 and min(O, I), or no steps.
    """
    if not 1 <= factors.rank <= min(W_OI.shape):
        raise QuantizeError(
            f"rank {factors.rank} for a weight of shape {tuple(W_OI.shape)}; expected 1 to {min(W_OI.shape)}"
        )
    if steps < 1:
        raise QuantizeError(f"{method} with {steps} steps; expected at least 1")
    alternate = _loftq if method == "loftq" else _qpissa
    pairs = alternate(W_OI, scheme, factors, generator)
    first = best = next(pairs)
    errors = [best.error]
    for pair in itertools.islice(pairs, steps - 1):
        errors.append(pair.error)
        best = pair if pair.error < best.error else best
    error_plain = first.error_alone if method == "loftq" else None
    return replace(best, step_errors=tuple(errors), error_plain=error_plain)


def _loftq(W_OI: Tensor, scheme: Scheme, factors: Factors, generator: torch.Generator) -> Iterator[Pair]:
    """Q = q(W − s·BA), s·BA = SVD_R(W − Q), again and again from BA = 0."""
    work_OI = torch.empty(W_OI.shape, dtype=torch.float32)
    norm = _take(work_OI, W_OI)
    low: _LowRank | None = None
    while True:
        quantized = quantize(work_OI, scheme)
        alone = _subtract(work_OI, W_OI, quantized)
        low = _decompose(work_OI, factors, generator, start_RI=None if low is None else low.A_RI)
        # What an orthogonal projection leaves: ‖R − U S V‖² = ‖R‖² − ‖S‖².
        error = math.sqrt(max(alone**2 - low.energy, 0.0))
        yield Pair(quantized, low.A_RI, low.B_OR, error / norm, alone / norm)
        _take(work_OI, W_OI)
        work_OI.addmm_(low.B_OR, low.A_RI, alpha=-factors.scale)


def _qpissa(W_OI: Tensor, scheme: Scheme, factors: Factors, generator: torch.Generator) -> Iterator[Pair]:
    """Q = q(W − s·BA), then s·BA = SVD_R(W − Q), again and again from s·BA = SVD_R(W)."""
    work_OI = torch.empty(W_OI.shape, dtype=torch.float32)
    norm = _take(work_OI, W_OI)
    low = _decompose(work_OI, factors, generator)
    while True:
        _take(work_OI, W_OI)
        work_OI.addmm_(low.B_OR, low.A_RI, alpha=-factors.scale)
        quantized = quantize(work_OI, scheme)
        error = _subtract(work_OI, work_OI, quantized)
        alone = _subtract(work_OI, W_OI, quantized)
        yield Pair(quantized, low.A_RI, low.B_OR, error / norm, alone / norm)
        low = _decompose(work_OI, factors, generator, start_RI=low.A_RI)


@dataclass(frozen=True)
class _LowRank:
    A_RI: Tensor
    B_OR: Tensor
    energy: float  # the sum of the squared singular values that it keeps


def _decompose(
    rest_OI: Tensor, factors: Factors, generator: torch.Generator, *, start_RI: Tensor | None = None
) -> _LowRank:
    """A and B with s·B·A = the best rank-R approximation of a matrix."""
    U_OR, S_R, V_RI = truncated_svd(rest_OI, factors.rank, method="fast", generator=generator, start_RI=start_RI)
    root_R = (S_R / factors.scale).sqrt()
    A_RI, B_OR = (root_R.unsqueeze(1) * V_RI).contiguous(), (U_OR * root_R).contiguous()
    return _LowRank(A_RI, B_OR, float(S_R.square().sum()))


def _take(out_OI: Tensor, W_OI: Tensor) -> float:
    """Copy a weight in fp32 into a buffer; returns its norm, or 1 for a weight of zeros, whose errors are all 0."""
    out_OI.copy_(W_OI)
    return math.sqrt(sum(float(torch.dot(piece, piece)) for piece in out_OI.view(-1).split(PIECE))) or 1.0


def _subtract(out_OI: Tensor, W_OI: Tensor, quantized: Quantized) -> float:
    """W − Q in fp32 into a buffer (which may be W itself); returns its norm."""
    total = 0.0
    pieces = zip(
        out_OI.view(-1).split(PIECE), W_OI.reshape(-1).split(PIECE), dequantized_pieces(quantized), strict=True
    )
    for out, weight, values in pieces:
        torch.sub(weight.float(), values, out=out)
        total += float(torch.dot(out, out))
    return math.sqrt(total)
