"""LoftQ that minimizes the error of a layer's output, on rows that the layer will see, instead of the weight's error.

With R = E[xᵀx] over the rows x that enter the layer, and any S with SᵀS = R,

    E‖x (W − Q − s·BA)ᵀ‖² = ‖(W − Q − s·BA) Sᵀ‖²,

which is smallest for s·BA Sᵀ = SVD_r((W − Q) Sᵀ) = U Σ V, that is s·B = U √Σ and A = √Σ V S⁻ᵀ.

    diagonal   S = diag(√E[x²]): QERA's approximation (arXiv 2410.06040)
    full       S = Lᵀ of R = L Lᵀ, Cholesky: the product BA is the same for every factor of R, so no matrix root is
               needed (CLoQ, arXiv 2501.18475)

R is damped, R + λ·mean(diag R)·I, so that inputs which never occur keep a small weight and R has a Cholesky factor.

Dimensions: O outputs, I inputs, R rank, N rows.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from graftline.errors import QuantizeError
from graftline.settings.start import Weighting
from graftline.weights.quant.blockwise import quantize
from graftline.weights.quant.low_rank import (
    FactorSettings,
    QuantizedPair,
    check_pair_settings,
    copy_to_fp32,
    subtract,
    truncated_svd,
)
from graftline.weights.quant.scheme import Scheme

DAMPING = 0.01


class Metric(Protocol):
    """A factor S of R = E[xᵀx], which turns the error of a weight into the error of its layer's output."""

    def scale(self, M_OI: Tensor) -> Tensor:
        """M Sᵀ, as new memory."""

    def unscale(self, M_RI: Tensor) -> Tensor:
        """M S⁻ᵀ."""


@dataclass(frozen=True)
class DiagonalMetric:
    """S = diag(s)."""

    S_I: Tensor

    def scale(self, M_OI: Tensor) -> Tensor:
        """Each column times its input's root mean square."""
        return M_OI * self.S_I

    def unscale(self, M_RI: Tensor) -> Tensor:
        """Each column divided by it."""
        return M_RI / self.S_I


@dataclass(frozen=True)
class FullMetric:
    """S = Lᵀ for the lower triangle L with L Lᵀ = R."""

    L_II: Tensor

    def scale(self, M_OI: Tensor) -> Tensor:
        """M L."""
        return M_OI @ self.L_II

    def unscale(self, M_RI: Tensor) -> Tensor:
        """X with X L = M."""
        solved: Tensor = torch.linalg.solve_triangular(self.L_II, M_RI, upper=False, left=False)
        return solved


class InputMoments:
    """E[x²] or E[xᵀx] of a layer's inputs, added up batch by batch in fp32; ``full`` takes I² · 4 bytes.

    ``evened``: rows longer than the median of the first batch count as if they were as long as it. The first token of a
    text has activations a hundred times as large in some layers (Sun et al. 2024, arXiv 2402.17762); the norms after
    them divide by that size, and without evening they alone would be what such a layer is fitted to.
    """

    def __init__(self, num_inputs: int, weighting: Weighting, *, evened: bool = False) -> None:
        self.weighting = weighting
        shape = (num_inputs, num_inputs) if weighting == "full" else (num_inputs,)
        self._sum = torch.zeros(shape)
        self._evened, self._median = evened, 0.0
        self.num_rows = 0

    def add(self, x_NI: Tensor) -> None:
        """Add rows."""
        x_NI = x_NI.float()
        if self._evened and len(x_NI):
            x_NI = self._even(x_NI)
        if self.weighting == "full":
            self._sum.addmm_(x_NI.T, x_NI)
        else:
            self._sum += x_NI.square().sum(0)
        self.num_rows += len(x_NI)

    def _even(self, x_NI: Tensor) -> Tensor:
        norm_N1 = x_NI.norm(dim=1, keepdim=True)
        self._median = self._median or float(norm_N1.median())
        return x_NI * (self._median / norm_N1.clamp(min=self._median)) if self._median else x_NI

    def metric(self, module: str) -> Metric:
        """The damped factor; ends the collection, whose memory it takes.

        Raises:
            QuantizeError: the inputs are not finite.
        """
        moments = self._sum.div_(max(self.num_rows, 1))
        diagonal = moments.diagonal() if self.weighting == "full" else moments
        mean = float(diagonal.mean())
        if not math.isfinite(mean):
            raise QuantizeError(
                f"the inputs of {module} hold Inf or NaN on the calibration rows, so their mean square cannot weight "
                "the error; check the base, or write `weighting: none` (for a merged model `package.rounding: nearest`)"
            )
        diagonal += DAMPING * mean if mean > 0 else 1.0  # all inputs are zero: every error counts the same
        if self.weighting == "diagonal":
            return DiagonalMetric(moments.sqrt_())
        return FullMetric(torch.linalg.cholesky(moments))


def make_weighted_pair(
    W_OI: Tensor, scheme: Scheme, factors: FactorSettings, *, metric: Metric, steps: int, generator: torch.Generator
) -> QuantizedPair:
    """LoftQ's alternation, minimizing ‖(W − Q − s·BA) Sᵀ‖; the step with the smallest error is kept.

    Memory beside W and the metric: three fp32 matrices of its shape, the codes twice, thin matrices.

    Raises:
        QuantizeError: as `low_rank.make_pair`.
    """
    check_pair_settings(W_OI, factors, steps, "loftq")
    pairs = _alternate(W_OI, scheme, factors, metric, generator)
    first = best = next(pairs)
    errors = [_known(first.output_error)]
    for pair in itertools.islice(pairs, steps - 1):
        errors.append(_known(pair.output_error))
        best = pair if _known(pair.output_error) < _known(best.output_error) else best
    rest_OI = torch.empty(W_OI.shape)
    norm = copy_to_fp32(rest_OI, W_OI)
    subtract(rest_OI, W_OI, best.quantized)
    rest_OI.addmm_(best.B_OR, best.A_RI, alpha=-factors.scale)
    return replace(
        best,
        error=float(rest_OI.norm()) / norm,
        step_errors=tuple(errors),
        error_plain=first.error_alone,
        output_error_plain=first.output_error_plain,
    )


def _alternate(
    W_OI: Tensor, scheme: Scheme, factors: FactorSettings, metric: Metric, generator: torch.Generator
) -> Iterator[QuantizedPair]:
    """Q = q(W − s·BA), s·BA Sᵀ = SVD_R((W − Q) Sᵀ), repeated from BA = 0. ``error`` is set by the caller."""
    work_OI = torch.empty(W_OI.shape, dtype=torch.float32)
    norm = copy_to_fp32(work_OI, W_OI)
    output_norm = float(metric.scale(work_OI).norm()) or 1.0
    right_RI: Tensor | None = None
    while True:
        quantized = quantize(work_OI, scheme)
        alone = subtract(work_OI, W_OI, quantized)
        scaled_OI = metric.scale(work_OI)
        output_alone = float(scaled_OI.norm())
        U_OR, S_R, right_RI = truncated_svd(
            scaled_OI, factors.rank, method="fast", generator=generator, start_RI=right_RI
        )
        root_R = (S_R / factors.scale).sqrt()
        A_RI = metric.unscale(root_R.unsqueeze(1) * right_RI).contiguous()
        B_OR = (U_OR * root_R).contiguous()
        rest = math.sqrt(max(output_alone**2 - float(S_R.square().sum()), 0.0))
        yield QuantizedPair(
            quantized,
            A_RI,
            B_OR,
            error=math.nan,
            error_alone=alone / norm,
            output_error=rest / output_norm,
            output_error_plain=output_alone / output_norm,
        )
        copy_to_fp32(work_OI, W_OI)
        work_OI.addmm_(B_OR, A_RI, alpha=-factors.scale)


def _known(error: float | None) -> float:
    assert error is not None
    return error
