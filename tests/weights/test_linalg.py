import pytest
import torch
from torch import Tensor

from graftline.weights.quant.low_rank import truncated_svd

RANK = 8


def decaying(shape: tuple[int, int], power: float) -> Tensor:
    """A random matrix whose k-th singular value is k^−power."""
    generator = torch.Generator().manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=generator))
    V, _ = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=generator))
    return (U * torch.arange(1, min(shape) + 1) ** -power) @ V.T


def decompose(W: Tensor, method: str = "fast", **options: object) -> tuple[Tensor, Tensor, Tensor]:
    return truncated_svd(W, RANK, method=method, generator=torch.Generator().manual_seed(1), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["fast", "exact"])
@pytest.mark.parametrize("shape", [(200, 90), (90, 200), (96, 96), (20, 300), (RANK, 50)])
@pytest.mark.parametrize("power", [0.3, 1.0, 3.0])
def test_error_is_within_one_percent_of_the_best(shape: tuple[int, int], power: float, method: str) -> None:
    W = decaying(shape, power)
    U, S, V = decompose(W, method)
    best = torch.linalg.svdvals(W)[RANK:].norm()
    assert (W - (U * S) @ V).norm() <= 1.01 * best + 1e-5
    assert U.shape == (shape[0], RANK)
    assert V.shape == (RANK, shape[1])
    assert torch.allclose(U.T @ U, torch.eye(RANK), atol=1e-4)
    assert torch.allclose(V @ V.T, torch.eye(RANK), atol=1e-4)
    assert (S.diff() <= 1e-6).all()


def test_noise_without_structure_is_within_one_percent_too() -> None:
    W = torch.randn(300, 200, generator=torch.Generator().manual_seed(2))
    U, S, V = decompose(W)
    assert (W - (U * S) @ V).norm() <= 1.01 * torch.linalg.svdvals(W)[RANK:].norm()


def test_matrix_of_lower_rank_and_matrix_of_zeros_are_restored() -> None:
    low = torch.randn(150, 3) @ torch.randn(3, 100)
    for W in (low, torch.zeros(150, 100)):
        U, S, V = decompose(W)
        assert torch.allclose((U * S) @ V, W, atol=1e-3)


def test_start_near_the_answer_saves_a_block_and_keeps_the_error() -> None:
    W = decaying((200, 150), 0.3)
    _, _, V = decompose(W)
    moved = W + 0.01 * torch.randn(200, 150, generator=torch.Generator().manual_seed(3)) * W.std()
    U, S, V = decompose(moved, start_RI=V)
    assert (moved - (U * S) @ V).norm() <= 1.01 * torch.linalg.svdvals(moved)[RANK:].norm()


def test_same_generator_gives_the_same_factors() -> None:
    W = decaying((200, 90), 1.0)
    assert all(torch.equal(a, b) for a, b in zip(decompose(W), decompose(W), strict=True))
