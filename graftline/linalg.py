"""Best low-rank approximations, exact or by random projection.

Dimensions: O rows, I columns, R rank, L = R + oversampling columns of a block, K = L × blocks columns of the subspace.
"""

from typing import Literal

import torch
from torch import Tensor

# Measured on every layer of the demo base at R = 16 (benchmarks/quantized_init.py): ‖W − U S V‖ within 0.6 % of the
# best. Three blocks of a Krylov space cost less than two power iterations, and are nearer to the best.
_OVERSAMPLING = 4
_NUM_BLOCKS = 3


def truncated_svd(
    W_OI: Tensor,
    rank: int,
    *,
    method: Literal["exact", "fast"] = "fast",
    generator: torch.Generator,
    start_IR: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading ``rank`` singular triplets: U (O, R), S (R,) descending, V (R, I) with W ≈ U·diag(S)·V.

    fast: randomized block Krylov iteration (Musco, Musco 2015, arXiv 1504.05477, algorithm 2) from a random start.
    ``start_IR``: right singular directions of a similar matrix to begin with, which saves a block.
    """
    width = rank + _OVERSAMPLING
    num_blocks = _NUM_BLOCKS if start_IR is None else _NUM_BLOCKS - 1
    if method == "exact" or width * num_blocks >= min(W_OI.shape):
        U_OK, S_K, V_KI = torch.linalg.svd(W_OI, full_matrices=False)
        return U_OK[:, :rank], S_K[:rank], V_KI[:rank]
    start_IL = torch.randn(W_OI.shape[1], width, generator=generator).to(W_OI)
    if start_IR is not None:
        start_IL[:, : start_IR.shape[1]] = start_IR
    Q_OK, B_IK = _krylov_space(W_OI, start_IL, num_blocks)
    # W ≈ Q (Qᵀ W) = Q Bᵀ; B is decomposed through its own QR, whose triangle is only K × K.
    P_IK, T_KK = torch.linalg.qr(B_IK)
    right_KK, S_K, left_KK = torch.linalg.svd(T_KK)
    return Q_OK @ left_KK.T[:, :rank], S_K[:rank], (P_IK @ right_KK[:, :rank]).T


def _krylov_space(W_OI: Tensor, start_IL: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Orthonormal basis Q (O, K) of [W s, (W Wᵀ) W s, …], and B = Wᵀ Q (I, K), which falls out of making it."""
    blocks_OL = [_orthonormal(W_OI @ start_IL)]
    images_IL = [W_OI.T @ blocks_OL[0]]
    for _ in range(num_blocks - 1):
        Q_OK, next_OL = torch.cat(blocks_OL, dim=1), W_OI @ images_IL[-1]
        for _ in range(2):  # once leaves rounding errors of the size of what is taken off; twice is enough
            next_OL = next_OL - Q_OK @ (Q_OK.T @ next_OL)
        blocks_OL.append(_orthonormal(next_OL))
        images_IL.append(W_OI.T @ blocks_OL[-1])
    return torch.cat(blocks_OL, dim=1), torch.cat(images_IL, dim=1)


def _orthonormal(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns)[0]
