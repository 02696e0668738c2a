"""Low-rank factors: best approximations, factors made together with a quantized weight, and their file."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from graftline.digest import Digest
from graftline.errors import CheckpointError, QuantizeError
from graftline.settings.model import Svd
from graftline.weights.identity import combine, tensor_digest
from graftline.weights.quant.blockwise import QuantizedWeight, dequantized_pieces, piece_size
from graftline.weights.quant.kernels import quantize_here
from graftline.weights.quant.scheme import Scheme
from graftline.weights.reader import read_header, read_tensor

# Dimensions: O rows, I columns, R rank, L = R + oversampling columns of a block, K = L × blocks columns in all.

# Measured on every layer of the demo base at R = 16 (studies/results/quantized_init.json): ‖W − U S V‖ within 0.6 % of
# the best. Three blocks of a Krylov space cost less than two power iterations, and are more exact.
_OVERSAMPLING = 2
_NUM_BLOCKS = 3


def truncated_svd(
    W_OI: Tensor,
    rank: int,
    *,
    method: Svd,
    generator: torch.Generator,
    start_RI: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading ``rank`` singular triplets: U (O, R), S (R,) descending, V (R, I) with W ≈ U·diag(S)·V.

    fast: randomized block Krylov iteration (Musco, Musco 2015, arXiv 1504.05477, algorithm 2). ``start_RI``: right
    singular directions of a similar matrix to start from, which saves a block.
    """
    width = rank + _OVERSAMPLING
    num_blocks = _NUM_BLOCKS if start_RI is None else _NUM_BLOCKS - 1
    if method == "exact" or width * num_blocks >= min(W_OI.shape):
        U_OK, S_K, V_KI = torch.linalg.svd(W_OI, full_matrices=False)
        return U_OK[:, :rank], S_K[:rank], V_KI[:rank]
    start_LI = torch.randn(width, W_OI.shape[1], generator=generator).to(W_OI)
    if start_RI is not None:
        start_LI[: len(start_RI)] = start_RI
    Q_KO, B_KI = _krylov_space(W_OI, start_LI, num_blocks)
    # W ≈ Qᵀ Q W = Qᵀ B; B is decomposed through the QR of its transpose, whose triangular factor is only K × K.
    P_IK, T_KK = torch.linalg.qr(B_KI.T)
    right_KK, S_K, left_KK = torch.linalg.svd(T_KK)
    return Q_KO.T @ left_KK.T[:, :rank], S_K[:rank], (P_IK @ right_KK[:, :rank]).T


def _krylov_space(W_OI: Tensor, start_LI: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Orthonormal rows Q (K, O) that span s Wᵀ, (s Wᵀ W) Wᵀ, …, and B = Q W (K, I), a by-product.

    Directions are rows of the thin matrices, which makes products with W up to twice as fast on a CPU.
    """
    blocks_LO = [_orthonormal_rows(start_LI @ W_OI.T)]
    images_LI = [blocks_LO[0] @ W_OI]
    for _ in range(num_blocks - 1):
        Q_KO, next_LO = torch.cat(blocks_LO), images_LI[-1] @ W_OI.T
        for _ in range(2):  # once leaves rounding errors as large as what is subtracted; twice is enough
            next_LO = next_LO - (next_LO @ Q_KO.T) @ Q_KO
        blocks_LO.append(_orthonormal_rows(next_LO))
        images_LI.append(blocks_LO[-1] @ W_OI)
    return torch.cat(blocks_LO), torch.cat(images_LI)


def _orthonormal_rows(rows: Tensor) -> Tensor:
    return torch.linalg.qr(rows.T)[0].T


# Quantization and low-rank factors made together: W ≈ Q + s·B·A.
#
#     LoftQ (Li et al. 2023, arXiv 2310.08659): BA = 0;        t = 1…T:  Q = q(W − s·BA),  s·BA = SVD_R(W − Q)
#     QPiSSA (Meng et al. 2024, arXiv 2404.02948): s·BA = SVD_R(W);  t = 1…T:  Q = q(W − s·BA),  s·BA = SVD_R(W − Q)
#
# LoftQ ends with the decomposition, QPiSSA with the quantization, so that its factors stay the principal part. Neither
# error decreases steadily, so the best step is kept. S is divided by s *before* its root goes into both factors, so the
# equation holds for every alpha (PEFT and LoftQ's own code omit the division: METHODS §1.8).
#
# Dimensions: O outputs, I inputs, R rank.

Method = Literal["loftq", "qpissa"]


@dataclass(frozen=True)
class FactorSettings:
    """The adapter that a layer will get: its rank, and s, which multiplies B·A (such as alpha / rank)."""

    rank: int
    scale: float


@dataclass(frozen=True)
class QuantizedPair:
    """A quantized weight and its initial factors A (R, I), B (O, R), fp32. Errors are relative, ‖W − …‖ / ‖W‖.

    error: of the pair. error_alone: of the quantized weight without the factors. step_errors: of the pair after each
    step; the smallest is ``error``. error_plain: of plain quantization, LoftQ's first step; None for QPiSSA.
    output_error, output_error_plain: of the layer's output, with the pair and with plain quantization alone, where the
    error was weighted (`graftline.weights.quant.weighted`); then step_errors are of the output too.
    """

    quantized: QuantizedWeight
    A_RI: Tensor
    B_OR: Tensor
    error: float
    error_alone: float
    step_errors: tuple[float, ...] = ()
    error_plain: float | None = None
    output_error: float | None = None
    output_error_plain: float | None = None


def make_pair(
    W_OI: Tensor, scheme: Scheme, factors: FactorSettings, *, method: Method, steps: int, generator: torch.Generator
) -> QuantizedPair:
    """Quantize a weight together with factors. Memory beside W: one fp32 copy, the codes twice, thin matrices.

    Raises:
        QuantizeError: the rank is not between 1 and min(O, I), or there are no steps.
    """
    check_pair_settings(W_OI, factors, steps, method)
    alternate = _loftq if method == "loftq" else _qpissa
    pairs = alternate(W_OI, scheme, factors, generator)
    first = best = next(pairs)
    errors = [best.error]
    for pair in itertools.islice(pairs, steps - 1):
        errors.append(pair.error)
        best = pair if pair.error < best.error else best
    error_plain = first.error_alone if method == "loftq" else None
    return replace(best, step_errors=tuple(errors), error_plain=error_plain)


def check_pair_settings(W_OI: Tensor, factors: FactorSettings, steps: int, method: Method) -> None:
    """Refuse a rank that is not between 1 and min(O, I), or no steps, with a QuantizeError."""
    if not 1 <= factors.rank <= min(W_OI.shape):
        raise QuantizeError(
            f"rank {factors.rank} for a weight of shape {tuple(W_OI.shape)}; expected 1 to {min(W_OI.shape)}"
        )
    if steps < 1:
        raise QuantizeError(f"{method} with {steps} steps; expected at least 1")


def _loftq(
    W_OI: Tensor, scheme: Scheme, factors: FactorSettings, generator: torch.Generator
) -> Iterator[QuantizedPair]:
    """Q = q(W − s·BA), s·BA = SVD_R(W − Q), repeated from BA = 0."""
    work_OI = torch.empty(W_OI.shape, dtype=torch.float32, device=W_OI.device)
    norm = copy_to_fp32(work_OI, W_OI)
    low: _LowRank | None = None
    while True:
        quantized = quantize_here(work_OI, scheme)
        alone = subtract(work_OI, W_OI, quantized)
        low = _decompose(work_OI, factors, generator, start_RI=None if low is None else low.A_RI)
        # For an orthogonal projection ‖R − U S V‖² = ‖R‖² − ‖S‖².
        error = math.sqrt(max(alone**2 - low.energy, 0.0))
        yield QuantizedPair(quantized, low.A_RI, low.B_OR, error / norm, alone / norm)
        copy_to_fp32(work_OI, W_OI)
        work_OI.addmm_(low.B_OR, low.A_RI, alpha=-factors.scale)


def _qpissa(
    W_OI: Tensor, scheme: Scheme, factors: FactorSettings, generator: torch.Generator
) -> Iterator[QuantizedPair]:
    """Q = q(W − s·BA), s·BA = SVD_R(W − Q), repeated from s·BA = SVD_R(W)."""
    work_OI = torch.empty(W_OI.shape, dtype=torch.float32, device=W_OI.device)
    norm = copy_to_fp32(work_OI, W_OI)
    low = _decompose(work_OI, factors, generator)
    while True:
        copy_to_fp32(work_OI, W_OI)
        work_OI.addmm_(low.B_OR, low.A_RI, alpha=-factors.scale)
        quantized = quantize_here(work_OI, scheme)
        error = subtract(work_OI, work_OI, quantized)
        alone = subtract(work_OI, W_OI, quantized)
        yield QuantizedPair(quantized, low.A_RI, low.B_OR, error / norm, alone / norm)
        low = _decompose(work_OI, factors, generator, start_RI=low.A_RI)


@dataclass(frozen=True)
class _LowRank:
    A_RI: Tensor
    B_OR: Tensor
    energy: float  # sum of the squares of its singular values


def _decompose(
    rest_OI: Tensor, factors: FactorSettings, generator: torch.Generator, *, start_RI: Tensor | None = None
) -> _LowRank:
    """A and B with s·B·A = the best rank-R approximation of a matrix."""
    U_OR, S_R, V_RI = truncated_svd(rest_OI, factors.rank, method="fast", generator=generator, start_RI=start_RI)
    root_R = (S_R / factors.scale).sqrt()
    A_RI, B_OR = (root_R.unsqueeze(1) * V_RI).contiguous(), (U_OR * root_R).contiguous()
    return _LowRank(A_RI, B_OR, float(S_R.square().sum()))


def copy_to_fp32(out_OI: Tensor, W_OI: Tensor) -> float:
    """Copy a weight into an fp32 buffer; returns its norm, or 1 for a weight of zeros, whose errors are all 0."""
    out_OI.copy_(W_OI)
    return math.sqrt(sum(float(torch.dot(piece, piece)) for piece in out_OI.view(-1).split(piece_size(out_OI)))) or 1.0


def subtract(out_OI: Tensor, W_OI: Tensor, quantized: QuantizedWeight) -> float:
    """Write W − Q in fp32 to a buffer (which may be W itself); returns its norm."""
    total = 0.0
    size = piece_size(out_OI)
    pieces = zip(out_OI.view(-1).split(size), W_OI.reshape(-1).split(size), dequantized_pieces(quantized), strict=True)
    for out, weight, values in pieces:
        torch.sub(weight.float(), values, out=out)
        total += float(torch.dot(out, out))
    return math.sqrt(total)


FACTORS_FILE = "adapter_init.safetensors"
"""The initial factors beside a base: ``<module>.lora_A`` (rank, in), ``<module>.lora_B`` (out, rank), fp32. Their
digest is the base's ``pair``, which `identity.check_pair` compares with the adapter's."""


def read_factors(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The factors in a model folder: module -> {"A": (rank, in), "B": (out, rank)}; CheckpointError if unreadable."""
    factors: dict[str, dict[str, Tensor]] = {}
    for info in read_header(folder / FACTORS_FILE):
        module, _, kind = info.name.rpartition(".lora_")
        factors.setdefault(module, {})[kind] = read_tensor(info)
    incomplete = [module for module, parts in factors.items() if parts.keys() != {"A", "B"}]
    if incomplete:
        raise CheckpointError(
            f"{folder / FACTORS_FILE}: {incomplete[0]!r} has not exactly lora_A and lora_B; make it again"
        )
    return factors


def factors_digest(folder: Path) -> Digest:
    """Digest of the factors in a model folder, as `BaseIdentity.pair` records it."""
    return combine([tensor_digest(info) for info in read_header(folder / FACTORS_FILE)])
