"""LoRA: a low-rank update beside a frozen weight.

    y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ            A: (R, I), B: (O, R), s = alpha / R
    embedding:  y = c · (E[x] + s · Aᵀ[x] Bᵀ)    A: (R, V), B: (D, R); c: what the layer scales by (Gemma: √D), or 1

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685. Trained: R·(I + O) a layer.
A is drawn from U(−1/√I, 1/√I) (microsoft/LoRA's and PEFT's default; the paper says Gaussian), B is zero: step 0 is the
base. For an embedding the roles swap, as in PEFT: A is zero and B is drawn from N(0, 1).

The forward and backward passes are written out (`LowRankUpdate`): the update is added into the layer's own output by
the matrix product itself, both for y and for the gradient of x, so no second (T, O) or (T, I) array is made; and
nothing of full size is kept for the backward pass but x, which autograd would keep anyway.

Dimensions: T = tokens (all leading dimensions), I = input features, O = output features, R = rank, V = vocabulary,
D = width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from graftline.adapters.base import (
    AdapterLayer,
    Context,
    Factors,
    LayerPlan,
    Method,
    State,
    dense_weight,
    device_of,
    embedding_scale,
    features_of,
)


@dataclass(frozen=True)
class FrozenLinear:
    """A frozen layer as two products: x Wᵀ + b forward, g W backward (a quantized layer dequantizes W again there)."""

    layer: nn.Module

    def forward(self, x_TI: Tensor) -> Tensor:
        """The layer's own output, as a fresh array."""
        return self.layer(x_TI)

    def backward(self, grad_TO: Tensor) -> Tensor:
        """Gradient of x: g W."""
        return grad_TO @ dense_weight(self.layer, grad_TO.dtype)


def backward_factors(
    grad_TO: Tensor, input_TI: Tensor, hidden_RT: Tensor, factors: tuple[Tensor, Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h (R, T), A (R, I) and B (O, R) behind s · h Bᵀ, h = A xᵀ.

    The hidden values lie as (R, T) here and in the forward pass: BLAS does thin products 2 to 7 times as fast with
    the rank as their first dimension (measured with MKL on one thread at T = 432, O = 1536, R = 8).
    """
    A_RI, B_OR = factors
    grad_hidden_RT = (B_OR.T.contiguous() @ grad_TO.T).mul_(scale)
    grad_A_RI = grad_hidden_RT @ input_TI.to(A_RI.dtype)
    grad_B_OR = (hidden_RT @ grad_TO).mul_(scale).T
    return grad_hidden_RT, grad_A_RI, grad_B_OR


class LowRankUpdate(torch.autograd.Function):
    """x Wᵀ + b + s · x̃ Aᵀ Bᵀ with W and b frozen, x̃ = drop(x) or x itself.

    The adapter is computed in its own precision (fp32) and the sum is cast to the base's once (METHODS.md §7.1).
    """

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, dropped_TI: Tensor | None, A_RI: Tensor, B_OR: Tensor, base: FrozenLinear, scale: float
    ) -> Tensor:
        """Returns y (T, O) in the base's output precision."""
        y_TO = base.forward(x_TI)
        input_TI = x_TI if dropped_TI is None else dropped_TI
        hidden_RT = A_RI @ input_TI.to(A_RI.dtype).T
        ctx.save_for_backward(input_TI, hidden_RT, A_RI, B_OR)
        ctx.base, ctx.scale, ctx.has_dropped = base, scale, dropped_TI is not None
        return y_TO.to(A_RI.dtype).addmm_(hidden_RT.T, B_OR.T, alpha=scale).to(y_TO.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, x̃, A and B."""
        input_TI, hidden_RT, A_RI, B_OR = ctx.saved_tensors
        grad_hidden_RT, grad_A_RI, grad_B_OR = backward_factors(
            grad_TO.to(B_OR.dtype), input_TI, hidden_RT, (A_RI, B_OR), ctx.scale
        )
        grad_x_TI = grad_dropped_TI = None
        if ctx.needs_input_grad[0]:
            grad_x_TI = ctx.base.backward(grad_TO)
            if not ctx.has_dropped:
                grad_x_TI = grad_x_TI.to(A_RI.dtype).addmm_(grad_hidden_RT.T, A_RI).to(grad_x_TI.dtype)
        if ctx.has_dropped and ctx.needs_input_grad[1]:
            grad_dropped_TI = (grad_hidden_RT.T @ A_RI).to(input_TI.dtype)
        return grad_x_TI, grad_dropped_TI, grad_A_RI, grad_B_OR, None, None


def draw_factors(layer: nn.Module, rank: int, context: Context) -> tuple[nn.Parameter, nn.Parameter]:
    """Initial A and B in fp32 on the layer's device: their product is zero."""
    num_inputs, num_outputs = features_of(layer)
    A_RI, B_OR = torch.zeros(rank, num_inputs), torch.zeros(num_outputs, rank)
    if isinstance(layer, nn.Embedding):
        nn.init.normal_(B_OR, generator=context.generator)
    else:
        nn.init.kaiming_uniform_(A_RI, a=math.sqrt(5), generator=context.generator)
    device = device_of(layer)
    return nn.Parameter(A_RI.to(device)), nn.Parameter(B_OR.to(device))


def look_up(embedding: nn.Embedding, tokens: Tensor, table_VD: Tensor) -> Tensor:
    """Rows of another table under the embedding's own rules (padding row without gradient, norm limit)."""
    return F.embedding(
        tokens,
        table_VD,
        padding_idx=embedding.padding_idx,
        max_norm=embedding.max_norm,
        norm_type=embedding.norm_type,
        scale_grad_by_freq=embedding.scale_grad_by_freq,
    )


class LoraLayer(AdapterLayer):
    """A frozen layer with a low-rank update. ``forward`` takes (…, I) or token numbers and returns (…, O)."""

    trained = ("A", "B")

    def __init__(self, base: nn.Module, plan: LayerPlan, context: Context) -> None:
        super().__init__(base, plan)
        self.A, self.B = draw_factors(base, plan.rank, context)
        if plan.name in context.initial:
            self.load_state(context.initial[plan.name])

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output plus the update."""
        if isinstance(self.base, nn.Embedding):
            y = self.base(x)
            update = self.plan.scale * (look_up(self.base, x, self.A.T) @ self.B.T)
            scale = embedding_scale(self.base)
            return (y + (update if scale is None else update * scale)).to(y.dtype)
        if torch.is_autocast_enabled(x.device.type) or (self.bias is not None and self.bias.requires_grad):
            return self._composed(x)
        x_TI = x.reshape(-1, x.shape[-1])
        y_TO = LowRankUpdate.apply(x_TI, self._dropped(x_TI), self.A, self.B, FrozenLinear(self.base), self.plan.scale)
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])

    def _dropped(self, x_TI: Tensor) -> Tensor | None:
        return F.dropout(x_TI, self.plan.dropout) if self.training and self.plan.dropout else None

    def _composed(self, x: Tensor) -> Tensor:
        # Autograd's own composition, where autocast chooses precisions or a bias of the base is trained.
        y = self.base(x)
        dropped = F.dropout(x.to(self.A.dtype), self.plan.dropout, self.training)
        return (y + self.plan.scale * F.linear(F.linear(dropped, self.A), self.B)).to(y.dtype)


def fold(weight_OI: Tensor, state: State, scale: float) -> Tensor:
    """W + s·B·A in fp32."""
    return torch.addmm(weight_OI.float(), state["B"].float(), state["A"].float(), alpha=scale)


def factors(state: State, scale: float, weight: Callable[[], Tensor]) -> Factors:
    """Aᵀ (I, R), s·Bᵀ (R, O), no gain."""
    del weight
    return state["A"].float().T, scale * state["B"].float().T, None


METHOD = Method(
    name="lora",
    formula="y = x Wᵀ + b + (alpha/R) · drop(x) Aᵀ Bᵀ",
    source="Hu et al. 2021, arXiv 2106.09685",
    layer=LoraLayer,
    count=lambda num_inputs, num_outputs, rank: rank * (num_inputs + num_outputs),
    count_formula="R·(I + O)",
    disk_names={"A": "lora_A.weight", "B": "lora_B.weight"},
    embedding_disk_names={"A": "lora_embedding_A", "B": "lora_embedding_B"},
    fold=fold,
    factors=factors,
    peft_type="LORA",
)
