"""VeRA: one frozen random projection for all layers, and two trained vectors a layer.

    y = x Wᵀ + c + b ⊙ (B (d ⊙ (A drop(x))))            A: (R, I), B: (O, R) frozen; b: (O,), d: (R,) trained; no scale

Kopiczko, Blankevoort, Asano 2023, "VeRA: Vector-based Random Matrix Adaptation", arXiv 2310.11454. Trained: O + R a
layer. b starts at 0, so step 0 is the base; d starts at 0.1. One A (R, I_max) and one B (O_max, R) serve all layers;
each layer uses their leading columns and rows. They are drawn as in peft 0.21 (fp32, on the CPU, A first, from one
seed), and stored with the adapter, because another set of targets would draw others.

The gradient of b comes from an (O, R) product, so that no (T, O) array is kept for the backward pass.

Dimensions: T = tokens, I = input features, O = output features, R = rank.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from graftline.adapters.base import (
    AdapterLayer,
    AttachContext,
    Factors,
    LayerPlan,
    Method,
    State,
    arithmetic,
    device_of,
    features_of,
)
from graftline.adapters.lora import FrozenLinear, add_product
from graftline.errors import AdapterError
from graftline.settings.model import Adapter

INITIAL_D = 0.1
"""Paper §3.3 and PEFT's ``d_initial``."""


def draw_projections(num_inputs: int, num_outputs: int, *, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """A (R, I) from U(±√(6/I)), then B (O, R) from U(±√(6/R)), bit for bit as peft 0.21 draws them."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    A_RI, B_OR = torch.empty(rank, num_inputs), torch.empty(num_outputs, rank)
    for projection in (A_RI, B_OR):
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(projection.shape[1]))
        projection.uniform_(-bound, bound, generator=generator)
    return A_RI, B_OR


def share(layers: Mapping[str, nn.Module], spec: Adapter) -> dict[str, Tensor]:
    """The projections for these layers, on their device."""
    if spec.rank_pattern:
        raise AdapterError("rank_pattern: all layers of VeRA share one projection and so one rank; leave it out")
    sizes = [features_of(layer) for layer in layers.values()]
    A_RI, B_OR = draw_projections(
        max(num_inputs for num_inputs, _ in sizes),
        max(num_outputs for _, num_outputs in sizes),
        rank=spec.rank,
        seed=spec.projection_seed,
    )
    device = device_of(next(iter(layers.values())))
    return {"A": A_RI.to(device), "B": B_OR.to(device)}


class VectorUpdate(torch.autograd.Function):
    """x Wᵀ + c + b ⊙ (B (d ⊙ (A x̃))) with W, c, A, B frozen; x̃ = drop(x) or x itself."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, dropped_TI: Tensor | None, b_O: Tensor, d_R: Tensor, layer: "VeraLayer"
    ) -> Tensor:
        """Returns y (T, O) in x's number type."""
        base, kind = FrozenLinear(layer.base), x_TI.dtype
        y_TO = base.product(x_TI)
        hidden_TR = (x_TI if dropped_TI is None else dropped_TI) @ layer.A.T.to(kind)
        ctx.save_for_backward(hidden_TR, b_O, d_R)
        ctx.layer, ctx.base, ctx.has_dropped = layer, base, dropped_TI is not None
        scaled_OR = layer.B * b_O[:, None]
        return add_product(y_TO, hidden_TR * d_R.to(kind), scaled_OR.T.to(kind))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, x̃, b and d."""
        hidden_TR, b_O, d_R = ctx.saved_tensors
        kind, B_OR = grad_TO.dtype, ctx.layer.B
        # ∂b_o = Σ_t g_to Σ_k B_ok d_k h_tk = Σ_k B_ok (gᵀ (d ⊙ h))_ok
        grad_b_O = ((grad_TO.T @ (hidden_TR * d_R.to(kind))) * B_OR).sum(dim=1)
        grad_scaled_TR = grad_TO @ (B_OR * b_O[:, None]).to(kind)
        grad_d_R = (grad_scaled_TR * hidden_TR).sum(dim=0, dtype=d_R.dtype)
        grad_hidden_TR, A_RI = grad_scaled_TR.mul_(d_R.to(kind)), ctx.layer.A.to(kind)
        grad_x_TI = grad_dropped_TI = None
        if ctx.needs_input_grad[0]:
            grad_x_TI = ctx.base.input_gradient(grad_TO)
            if not ctx.has_dropped:
                grad_x_TI.addmm_(grad_hidden_TR, A_RI)
        if ctx.has_dropped and ctx.needs_input_grad[1]:
            grad_dropped_TI = grad_hidden_TR @ A_RI
        return grad_x_TI, grad_dropped_TI, grad_b_O, grad_d_R, None


class VeraLayer(AdapterLayer):
    """A frozen layer with VeRA's update. ``forward`` takes (…, I) and returns (…, O)."""

    trained = ("b", "d")
    A: Tensor
    B: Tensor

    def __init__(self, base: nn.Module, plan: LayerPlan, context: AttachContext) -> None:
        super().__init__(base, plan)
        num_inputs, num_outputs = features_of(base)
        A_RI, B_OR = context.shared["A"], context.shared["B"]
        if A_RI.shape[1] < num_inputs or B_OR.shape[0] < num_outputs or A_RI.shape[0] != plan.rank:
            raise AdapterError(
                f"{plan.name}: VeRA's shared projections {tuple(A_RI.shape)} and {tuple(B_OR.shape)} are too small for "
                f"{num_inputs} inputs, {num_outputs} outputs and rank {plan.rank}; they were drawn for other targets"
            )
        # Views of one array, which is stored once with the adapter.
        self.register_buffer("A", A_RI[:, :num_inputs], persistent=False)
        self.register_buffer("B", B_OR[:num_outputs], persistent=False)
        device = device_of(base)
        self.b = nn.Parameter(torch.zeros(num_outputs, device=device))
        self.d = nn.Parameter(torch.full((plan.rank,), INITIAL_D, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output plus the update."""
        if self.bias is not None and self.bias.requires_grad:
            return self._composed(x)
        x_TI = x.reshape(-1, x.shape[-1]).to(arithmetic(x))
        dropped_TI = F.dropout(x_TI, self.plan.dropout) if self.training and self.plan.dropout else None
        y_TO = VectorUpdate.apply(x_TI, dropped_TI, self.b, self.d, self)
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])

    def _composed(self, x: Tensor) -> Tensor:
        # Autograd's own composition, where a bias of the base is trained.
        y = self.base(x)
        dropped = F.dropout(x.to(self.d.dtype), self.plan.dropout, self.training)
        return (y + self.b * F.linear(self.d * F.linear(dropped, self.A), self.B)).to(y.dtype)


def _low_rank(state: State, num_inputs: int | None = None) -> tuple[Tensor, Tensor]:
    # diag(d)·A and diag(b)·B: VeRA's update as LoRA's factors with scale 1.
    b_O, d_R = state["b"].float(), state["d"].float()
    A_RI = d_R[:, None] * state["A"].float()
    return A_RI[:, :num_inputs], b_O[:, None] * state["B"].float()[: len(b_O)]


def fold(weight_OI: Tensor, state: State, scale: float) -> Tensor:
    """W + diag(b)·B·diag(d)·A in fp32."""
    del scale
    A_RI, B_OR = _low_rank(state, weight_OI.shape[1])
    return torch.addmm(weight_OI.float(), B_OR, A_RI)


def factors(state: State, scale: float, weight: Callable[[], Tensor]) -> Factors:
    """(diag(d)·A)ᵀ (I, R) and (diag(b)·B)ᵀ (R, O); the weight tells how many inputs the layer has."""
    del scale
    A_RI, B_OR = _low_rank(state, weight().shape[1])
    return A_RI.T, B_OR.T, None


METHOD = Method(
    name="vera",
    formula="y = x Wᵀ + c + b ⊙ (B (d ⊙ (A drop(x)))), A and B frozen and shared",
    source="Kopiczko et al. 2023, arXiv 2310.11454",
    layer=VeraLayer,
    count=lambda num_inputs, num_outputs, rank: num_outputs + rank,
    count_formula="O + R",
    disk_names={"b": "vera_lambda_b", "d": "vera_lambda_d"},
    scale=lambda alpha, rank: 1.0,
    fold=fold,
    factors=factors,
    rank_tensor="d",
    rank_is_bounded=False,
    output_tensor="b",
    shared_disk_names={"A": "vera_A", "B": "vera_B"},
    share=share,
    peft_type="VERA",
)
