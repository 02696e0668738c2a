"""The product with a frozen matrix, whose backward pass asks for the matrix again instead of keeping it."""

from typing import Any, Protocol

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class FrozenMatrix(Protocol):
    """A frozen matrix W (O, I), quantized or dense, as the two products of a training step."""

    def product(self, x: Tensor, /) -> Tensor:
        """X Wᵀ (..., O) for x (..., I), as a new array."""

    def input_gradient(self, grad_y: Tensor, /) -> Tensor:
        """∂L/∂x = ∂L/∂y W."""


class FrozenProduct(Function):
    """y = x Wᵀ with ∂L/∂x = ∂L/∂y W. Saves what W is made from, never a dequantized W (QLoRA §3, arXiv 2305.14314)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: FrozenMatrix) -> Tensor:
        """The product, in x's number type."""
        ctx.matrix = matrix
        return matrix.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        """The gradient of x."""
        return ctx.matrix.input_gradient(grad_y), None
