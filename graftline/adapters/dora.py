"""DoRA: a low-rank update of a weight's direction, and a trained norm for each of its rows.

    W' = m ⊙ V / ‖V‖,  V = W + s·B·A            ‖·‖: one norm an output row (O,), not differentiated; m starts at ‖W‖
    y  = g ⊙ (x Wᵀ + s · x Aᵀ Bᵀ) + b,  g = m / ‖V‖            (the bias is not scaled)
    with dropout:  y = x Wᵀ + b + (g − 1) ⊙ x̃ Wᵀ + g ⊙ s · x̃ Aᵀ Bᵀ,  x̃ = drop(x)

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, §4.3 for the detached norm. Trained:
R·(I + O) + O a layer. The paper's norm is column-wise because its W is transposed; here it is over the inputs. On a
quantized base ‖V‖ and m are those of the dequantized weight.

The norm is computed without V or B·A, from three small products (fp32):

    ‖V‖² = ‖W‖² + 2s Σ_k B_ok (W Aᵀ)_ok + s² Σ_k B_ok (B (A Aᵀ))_ok

with ‖W‖² kept from the start: O·I·R multiplications a step; materializing V would also need two (O, I) arrays. In
evaluation the norm is computed once and kept until one of its tensors changes.

Dimensions: T = tokens, I = input features, O = output features, R = rank.
"""

import itertools
import weakref
from collections.abc import Callable
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
    dense_weight,
    device_of,
    is_quantized,
)
from graftline.adapters.lora import FrozenLinear, add_product, backward_factors, draw_factors, look_up

_MAX_CAST_ELEMENTS = 1 << 24
"""Rows of a half-precision weight are squared in fp32 in pieces of at most 64 MiB."""
_SMALLEST_NORM = 1e-12


def row_norms(weight_OI: Tensor, squares_O: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float) -> Tensor:
    """‖W + s·B·A‖ of each row (O,), without B·A. ``squares_O``: ‖W‖² of each row, fp32.

    The product with a half-precision W is computed in its type: it is the small correction of an exact ‖W‖².
    """
    products_OR = (weight_OI @ A_RI.T.to(weight_OI.dtype)).to(A_RI.dtype)
    # 2s W Aᵀ + s² B (A Aᵀ), then row by row times B.
    products_OR = torch.addmm(products_OR, B_OR, A_RI @ A_RI.T, beta=2 * scale, alpha=scale * scale)
    return (squares_O + (B_OR * products_OR).sum(dim=1)).clamp_min(_SMALLEST_NORM**2).sqrt()


def row_squares(weight_OI: Tensor) -> Tensor:
    """‖W‖² of each row in fp32 (O,)."""
    rows = max(1, _MAX_CAST_ELEMENTS // weight_OI.shape[1])
    return torch.cat([piece.float().square().sum(dim=1) for piece in weight_OI.split(rows)])


class _Snapshot:
    """The present state of some tensors, to tell later whether one has changed its value or its device."""

    def __init__(self, tensors: list[Tensor]) -> None:
        # torch does not count changes of tensors made in inference mode, so nothing is known of them later.
        is_counted = not any(tensor.is_inference() for tensor in tensors)
        self._seen = [(weakref.ref(t), t._version, t.device) for t in tensors] if is_counted else None

    def holds(self, tensors: list[Tensor]) -> bool:
        """Whether these are the same tensors, unchanged."""
        if self._seen is None or len(self._seen) != len(tensors):
            return False
        return all(
            seen() is tensor and version == tensor._version and device == tensor.device
            for (seen, version, device), tensor in zip(self._seen, tensors, strict=True)
        )


def scale_rows(x_TO: Tensor, gain_O: Tensor) -> Tensor:
    """G ⊙ x in x's number type, multiplied in fp32 in one pass: a gain near 1 must not be rounded to bf16."""
    if torch.compiler.is_compiling():  # which makes one pass of this by itself
        return (x_TO * gain_O).to(x_TO.dtype)
    return torch.mul(x_TO, gain_O, out=torch.empty_like(x_TO))


class ScaledUpdate(torch.autograd.Function):
    """g ⊙ (x Wᵀ + s · x Aᵀ Bᵀ) + b with W and ‖V‖ constant; g = m / ‖V‖."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        A_RI: Tensor,
        B_OR: Tensor,
        m_O: Tensor,
        bias_O: Tensor | None,
        constant: tuple[Tensor, Tensor, "DoraLayer"],
    ) -> Tensor:
        """Returns y (T, O) in the precision of x; ``constant`` are W, ‖V‖ and the layer that they are of."""
        weight_OI, norm_O, layer = constant
        hidden_RT = A_RI.to(x_TI.dtype) @ x_TI.T
        update_TO = x_TI @ weight_OI.T.to(x_TI.dtype)
        update_TO = add_product(update_TO, hidden_RT.T, B_OR.T.to(x_TI.dtype), layer.plan.scale)
        gain_O = m_O / norm_O
        ctx.save_for_backward(x_TI, hidden_RT, update_TO, A_RI, B_OR, gain_O, norm_O)
        ctx.layer = layer
        y_TO = scale_rows(update_TO, gain_O)
        if bias_O is not None:
            y_TO += bias_O
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, A, B, m and the bias."""
        x_TI, hidden_RT, update_TO, A_RI, B_OR, gain_O, norm_O = ctx.saved_tensors
        scale = ctx.layer.plan.scale
        grad_m_O = (grad_TO * update_TO).sum(dim=0, dtype=gain_O.dtype) / norm_O
        grad_bias_O = grad_TO.sum(dim=0, dtype=gain_O.dtype) if ctx.needs_input_grad[4] else None
        inner_TO = scale_rows(grad_TO, gain_O)
        grad_hidden_RT, grad_A_RI, grad_B_OR = backward_factors(inner_TO, x_TI, hidden_RT, (A_RI, B_OR), scale)
        grad_x_TI = None
        if ctx.needs_input_grad[0]:
            grad_x_TI = (
                FrozenLinear(ctx.layer.base).input_gradient(inner_TO).addmm_(grad_hidden_RT.T, A_RI.to(x_TI.dtype))
            )
        return grad_x_TI, grad_A_RI, grad_B_OR, grad_m_O, grad_bias_O, None


class DoraLayer(AdapterLayer):
    """A frozen layer whose weight gets a new direction and length. Takes (…, I) or token ids, returns (…, O)."""

    trained = ("A", "B", "m")

    def __init__(self, base: nn.Module, plan: LayerPlan, context: AttachContext) -> None:
        super().__init__(base, plan)
        self.A, self.B = draw_factors(base, plan.rank, context)
        self._squares_O = row_squares(dense_weight(base))
        self.m = nn.Parameter(self._squares_O.clamp_min(_SMALLEST_NORM**2).sqrt().to(device_of(base)))
        self._squares_of = _Snapshot(self._frozen())
        self._kept_norm: tuple[_Snapshot, Tensor] | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DoraLayer":
        super()._apply(fn, recurse)
        self._squares_O = self._squares_O.to(device_of(self.base))  # compiled code cannot see that it lies elsewhere
        return self

    def _frozen(self) -> list[Tensor]:
        """The tensors that make up the base's weight."""
        named = itertools.chain(self.base.named_parameters(), self.base.named_buffers())
        return [tensor for name, tensor in named if name != "bias"]

    def norm(self, weight_OI: Tensor) -> Tensor:
        """‖W + s·B·A‖ of each row (O,), without gradient; cached in evaluation until one of its tensors changes."""
        if torch.compiler.is_compiling():  # a compiler cannot see versions; it is used in training, on a base at rest
            return row_norms(weight_OI, self._squares_O, self.A.detach(), self.B.detach(), self.plan.scale)
        frozen = self._frozen()
        made_of = [*frozen, self.A, self.B]
        if not self.training and self._kept_norm is not None and self._kept_norm[0].holds(made_of):
            return self._kept_norm[1]
        if not self._squares_of.holds(frozen):  # the base was replaced or moved
            self._squares_O, self._squares_of = row_squares(weight_OI), _Snapshot(frozen)
        norm_O = row_norms(weight_OI, self._squares_O.to(self.A), self.A.detach(), self.B.detach(), self.plan.scale)
        self._kept_norm = None if self.training else (_Snapshot(made_of), norm_O)
        return norm_O

    def forward(self, x: Tensor) -> Tensor:
        """The output of the layer with its new weight."""
        if isinstance(self.base, nn.Embedding):
            y = self.base(x)
            gain_O = self.m / self.norm(dense_weight(self.base))
            update = self.plan.scale * (look_up(self.base, x, self.A.T).to(y.dtype) @ self.B.T.to(y.dtype))
            return (gain_O * (y + update)).to(y.dtype)
        x_TI = x.reshape(-1, x.shape[-1]).to(arithmetic(x))
        if self.training and self.plan.dropout:
            # base(x) + (g − 1)(x̃ Wᵀ) + g s x̃ Aᵀ Bᵀ  =  base(x − x̃) + g (x̃ Wᵀ + s x̃ Aᵀ Bᵀ)
            dropped_TI = F.dropout(x_TI, self.plan.dropout)
            y_TO = self.base(x_TI - dropped_TI)
            y_TO = y_TO + self._update(dropped_TI, None).to(y_TO.dtype)
        else:
            y_TO = self._update(x_TI, self.bias)
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])

    def _update(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        with torch.autocast(x_TI.device.type, enabled=False):  # it would choose types again inside
            with torch.no_grad():
                weight_OI = dense_weight(self.base, x_TI.dtype if is_quantized(self.base) else None)
                norm_O = self.norm(weight_OI)
            return ScaledUpdate.apply(x_TI, self.A, self.B, self.m, bias_O, (weight_OI, norm_O, self))


def fold(weight_OI: Tensor, state: State, scale: float) -> Tensor:
    """M ⊙ V / ‖V‖ with V = W + s·B·A, in fp32."""
    direction_OI = torch.addmm(weight_OI.float(), state["B"].float(), state["A"].float(), alpha=scale)
    gain_O = state["m"].float() / torch.linalg.vector_norm(direction_OI, dim=1).clamp_min(_SMALLEST_NORM)
    return direction_OI.mul_(gain_O[:, None])


def factors(state: State, scale: float, weight: Callable[[], Tensor]) -> Factors:
    """Aᵀ (I, R), s·Bᵀ (R, O) and g = m / ‖V‖."""
    A_RI, B_OR, weight_OI = state["A"].float(), state["B"].float(), weight().float()
    norm_O = row_norms(weight_OI, row_squares(weight_OI), A_RI, B_OR, scale)
    return A_RI.T, scale * B_OR.T, state["m"].float() / norm_O


METHOD = Method(
    name="dora",
    formula="y = g ⊙ (x Wᵀ + (alpha/R) · x Aᵀ Bᵀ) + b, g = m / ‖W + (alpha/R)·B·A‖",
    source="Liu et al. 2024, arXiv 2402.09353",
    layer=DoraLayer,
    count=lambda num_inputs, num_outputs, rank: rank * (num_inputs + num_outputs) + num_outputs,
    count_formula="R·(I + O) + O",
    disk_names={"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"},
    embedding_disk_names={"A": "lora_embedding_A", "B": "lora_embedding_B", "m": "lora_magnitude_vector"},
    fold=fold,
    factors=factors,
    peft_type="LORA",
)
