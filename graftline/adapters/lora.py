"""LoRA: a low-rank update beside a frozen weight.

    y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ            A: (R, I), B: (O, R), s = alpha / R
    embedding:  y = c · (E[x] + s · Aᵀ[x] Bᵀ)    A: (R, V), B: (D, R); c: what the layer scales by (Gemma: √D), or 1

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685. Trained: R·(I + O) a layer.
A is drawn from U(−1/√I, 1/√I) (microsoft/LoRA's and PEFT's default; the paper says Gaussian), B is zero: step 0 is the
base. For an embedding the roles swap, as in PEFT: A is zero and B is drawn from N(0, 1).

The forward and backward passes are written by hand (`LowRankUpdate`): the matrix product adds the update to the layer's
output, and likewise to the gradient of x, so no second (T, O) or (T, I) array is made; and only x, which autograd would
keep anyway, is kept in full size for the backward pass. Products are computed in x's number type: in bf16 the fp32
factors, which are small, are cast, and x never is.

Dimensions: T = tokens (all leading dimensions), I = input features, O = output features, R = rank, V = vocabulary,
D = width.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from graftline.adapters.base import (
    AdapterLayer,
    AttachContext,
    DiskForm,
    Factors,
    LayerPlan,
    Method,
    State,
    arithmetic,
    dense_weight,
    device_of,
    embedding_scale,
    features_of,
    kind_of,
    to_stored,
)
from graftline.adapters.experts import from_matrices, one_for_all, shared_factor, to_matrices
from graftline.errors import AdapterError
from graftline.settings.model import Adapter
from graftline.weights.experts import ExpertStack, FrozenExpert, Groups
from graftline.weights.frozen import FrozenMatrix
from graftline.weights.grouped import aligned, grouped_linear
from graftline.weights.quant.low_rank import truncated_svd


@dataclass(frozen=True)
class FrozenLinear:
    """A frozen layer as two products: x Wᵀ + b forward, g W backward (where a quantized layer dequantizes W again)."""

    layer: nn.Module

    def product(self, x_TI: Tensor) -> Tensor:
        """The layer's output, as a new array."""
        return self.layer(x_TI)

    def input_gradient(self, grad_TO: Tensor) -> Tensor:
        """Gradient of x: g W."""
        of_layer: Callable[[Tensor], Tensor] | None = getattr(self.layer, "input_gradient", None)
        if of_layer is not None:
            return of_layer(grad_TO)
        return grad_TO @ dense_weight(self.layer, grad_TO.dtype)


def backward_factors(
    grad_TO: Tensor, input_TI: Tensor, hidden_RT: Tensor, factors: tuple[Tensor, Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h (R, T), A (R, I) and B (O, R) in s · h Bᵀ, h = A xᵀ; those of A and B in the factors' type.

    Hidden values are (R, T), here and in the forward pass: BLAS computes thin products 2 to 7 times as fast with the
    rank first (measured with MKL on one thread at T = 432, O = 1536, R = 8).
    """
    A_RI, B_OR = factors
    grad_hidden_RT = (B_OR.T.contiguous().to(grad_TO.dtype) @ grad_TO.T).mul_(scale)
    grad_A_RI = grad_hidden_RT @ input_TI
    grad_B_OR = (hidden_RT @ grad_TO).mul_(scale).T
    return grad_hidden_RT, grad_A_RI.to(A_RI.dtype), grad_B_OR.to(B_OR.dtype)


def add_product(y_TO: Tensor, left_TR: Tensor, right_RO: Tensor, scale: float | None = None) -> Tensor:
    """Y + scale · left right, in y's memory where that is sure to be right. Without a scale none is multiplied by.

    In a compiled autograd.Function it is not: where the result was changed in place, inductor of torch 2.11 makes every
    gradient zero, without an error.
    """
    alpha: dict[str, Any] = {} if scale is None else {"alpha": scale}
    if torch.compiler.is_compiling():
        return torch.addmm(y_TO, left_TR, right_RO, **alpha)
    return y_TO.addmm_(left_TR, right_RO, **alpha)


class LowRankUpdate(torch.autograd.Function):
    """x Wᵀ + b + s · x̃ Aᵀ Bᵀ with W and b frozen, x̃ = drop(x) or x itself; A and B may be more precise than x."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        dropped_TI: Tensor | None,
        A_RI: Tensor,
        B_OR: Tensor,
        base: FrozenMatrix,
        scale: float,
    ) -> Tensor:
        """Returns y (T, O) in x's number type."""
        y_TO = base.product(x_TI)
        input_TI = x_TI if dropped_TI is None else dropped_TI
        hidden_RT = A_RI.to(x_TI.dtype) @ input_TI.T
        ctx.save_for_backward(input_TI, hidden_RT, A_RI, B_OR)
        ctx.base, ctx.scale, ctx.has_dropped = base, scale, dropped_TI is not None
        return add_product(y_TO, hidden_RT.T, B_OR.T.to(y_TO.dtype), scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, x̃, A and B."""
        input_TI, hidden_RT, A_RI, B_OR = ctx.saved_tensors
        grad_hidden_RT, grad_A_RI, grad_B_OR = backward_factors(grad_TO, input_TI, hidden_RT, (A_RI, B_OR), ctx.scale)
        grad_x_TI = grad_dropped_TI = None
        if ctx.needs_input_grad[0]:
            grad_x_TI = ctx.base.input_gradient(grad_TO)
            if not ctx.has_dropped:
                grad_x_TI.addmm_(grad_hidden_RT.T, A_RI.to(grad_TO.dtype))
        if ctx.has_dropped and ctx.needs_input_grad[1]:
            grad_dropped_TI = grad_hidden_RT.T @ A_RI.to(grad_TO.dtype)
        return grad_x_TI, grad_dropped_TI, grad_A_RI, grad_B_OR, None, None


def draw_factors(layer: nn.Module, rank: int, context: AttachContext) -> tuple[nn.Parameter, nn.Parameter]:
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
    """Rows of another table by the embedding's rules (padding row without gradient, norm limit)."""
    return F.embedding(
        tokens,
        table_VD,
        padding_idx=embedding.padding_idx,
        max_norm=embedding.max_norm,
        norm_type=embedding.norm_type,
        scale_grad_by_freq=embedding.scale_grad_by_freq,
    )


class LoraLayer(AdapterLayer):
    """A frozen layer with a low-rank update. ``forward`` takes (…, I) or token ids and returns (…, O)."""

    trained = ("A", "B")

    def __init__(self, base: nn.Module, plan: LayerPlan, context: AttachContext) -> None:
        super().__init__(base, plan)
        self.A, self.B = draw_factors(base, plan.rank, context)
        if plan.name in context.initial:
            self.load_state(context.initial[plan.name])

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output plus the update."""
        if isinstance(self.base, nn.Embedding):
            y = self.base(x)
            update = self.plan.scale * (look_up(self.base, x, self.A.T).to(y.dtype) @ self.B.T.to(y.dtype))
            scale = embedding_scale(self.base)
            return (y + (update if scale is None else update * scale)).to(y.dtype)
        if self.bias is not None and self.bias.requires_grad:
            return self._composed(x)
        x_TI = x.reshape(-1, x.shape[-1]).to(arithmetic(x))
        y_TO = LowRankUpdate.apply(x_TI, self._dropped(x_TI), self.A, self.B, FrozenLinear(self.base), self.plan.scale)
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])

    def _dropped(self, x_TI: Tensor) -> Tensor | None:
        return F.dropout(x_TI, self.plan.dropout) if self.training and self.plan.dropout else None

    def _composed(self, x: Tensor) -> Tensor:
        # Autograd's own composition, where a bias of the base is trained.
        y = self.base(x)
        dropped = F.dropout(x.to(self.A.dtype), self.plan.dropout, self.training)
        return (y + self.plan.scale * F.linear(F.linear(dropped, self.A), self.B)).to(y.dtype)


class ExpertLora(AdapterLayer):
    """A block's frozen experts, each with a low-rank update of its own: A (E, R, I), B (E, O, R).

    As PEFT's ``ParamWrapper``, which adds the update to all experts' matrices before every product. Here each expert
    adds it to its own rows' output. In a file the factors are matrices, see `graftline.adapters.experts`. A factor that
    the experts share has no E; its gradient is the sum over them.
    """

    trained = ("A", "B")
    base: ExpertStack

    def __init__(self, base: nn.Module, plan: LayerPlan, context: AttachContext) -> None:
        super().__init__(base, plan)
        num_inputs, num_outputs = features_of(base)
        self.shared = shared_factor(context.spec.experts, plan.name)
        experts = {factor: () if factor == self.shared else (self.base.num_experts,) for factor in self.trained}
        A = torch.empty(*experts["A"], plan.rank, num_inputs)
        nn.init.uniform_(A, -(num_inputs**-0.5), num_inputs**-0.5, generator=context.generator)
        device = device_of(base)
        self.A = nn.Parameter(A.to(device))
        self.B = nn.Parameter(torch.zeros(*experts["B"], num_outputs, plan.rank).to(device))

    def forward(self, x_SI: Tensor, groups: Groups) -> Tensor:
        """(S, O) for rows sorted by expert."""
        x_SI = x_SI.to(arithmetic(x_SI))
        if self.base.can_group(x_SI):
            return self._grouped(x_SI, groups)
        A_E, B_E = self._of_each("A"), self._of_each("B")
        outputs = [
            LowRankUpdate.apply(x, None, A_E[e], B_E[e], FrozenExpert(self.base, e), self.plan.scale)
            for e, x in groups.split(x_SI)
        ]
        return torch.cat(outputs)

    def _grouped(self, x_SI: Tensor, groups: Groups) -> Tensor:
        """One product for all experts with each factor; with the base too if it is dense."""

        def product(x: Tensor, factor: str, padding: tuple[int, ...]) -> Tensor:
            weight = F.pad(getattr(self, factor).to(x.dtype), padding)
            return F.linear(x, weight) if factor == self.shared else grouped_linear(x, weight, groups.ends)

        more = aligned(self.plan.rank, x_SI.dtype) - self.plan.rank  # zeros
        hidden_SR = product(x_SI, "A", (0, 0, 0, more)) * self.plan.scale
        return self.base(x_SI, groups) + product(hidden_SR, "B", (0, more))

    def _of_each(self, factor: str) -> Sequence[Tensor]:
        parameter: Tensor = getattr(self, factor)
        if factor == self.shared:
            return [parameter] * self.base.num_experts
        return parameter.unbind()  # one gradient for all experts; an index each would make E

    def disk_state(self) -> dict[str, Tensor]:
        """The factors as PEFT's matrices, where a shared one is repeated for every expert."""
        state = self.state()
        if self.shared:
            state[self.shared] = state[self.shared].expand(self.base.num_experts, -1, -1)
        return to_matrices(state)

    def load_disk_state(self, state: State) -> None:
        """Take the factors from PEFT's matrices."""
        factors = from_matrices(state, self.plan.rank, self.plan.name)
        self.load_state(one_for_all(factors, self.shared, self.plan.name))


def fold(weight_OI: Tensor, state: State, scale: float) -> Tensor:
    """W + s·B·A in fp32."""
    return torch.addmm(weight_OI.float(), state["B"].float(), state["A"].float(), alpha=scale)


def factors(state: State, scale: float, weight: Callable[[], Tensor]) -> Factors:
    """Aᵀ (I, R), s·Bᵀ (R, O), no gain."""
    del weight
    return state["A"].float().T, scale * state["B"].float().T, None


LORA = Method(
    name="lora",
    formula="y = x Wᵀ + b + (alpha/R) · drop(x) Aᵀ Bᵀ",
    source="Hu et al. 2021, arXiv 2106.09685",
    layer=LoraLayer,
    count=lambda num_inputs, num_outputs, rank: rank * (num_inputs + num_outputs),
    count_formula="R·(I + O)",
    disk_names={"A": "lora_A.weight", "B": "lora_B.weight"},
    embedding_disk_names={"A": "lora_embedding_A", "B": "lora_embedding_B"},
    expert_layer=ExpertLora,
    fold=fold,
    factors=factors,
    peft_type="LORA",
)


# rsLoRA: LoRA with a scale that keeps its moments independent of the rank.
#
#     y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ            s = alpha / √R
#
# Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv 2312.03732. Trained: R·(I +
# O). With alpha / R the gradient of B falls as 1/√R and a large rank learns no more than a small one; only alpha / √R
# keeps it constant. At R = 1 both are the same.

RSLORA = dataclasses.replace(
    LORA,
    name="rslora",
    formula="y = x Wᵀ + b + (alpha/√R) · drop(x) Aᵀ Bᵀ",
    source="Kalajdzievski 2023, arXiv 2312.03732",
    scale=lambda alpha, rank: alpha / math.sqrt(rank),
)


# LoftQ: LoRA that starts from the quantization error.
#
#     min ‖W − Q − s·B·A‖:  for t = 1 … T:  Q = quantize(W − s·B·A),  s·B·A = best rank-R approximation of W − Q
#     y = x Qᵀ + b + s · drop(x) Aᵀ Bᵀ
#
# Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", arXiv 2310.08659. Trained:
# R·(I + O). The alternation runs in the init stage (`graftline.weights.quant.folder`), which writes Q as the base and
# A, B as initial factors; it divides S by s, which PEFT does not (peft #1982), so any alpha will do. In training it is
# LoRA that must start from those factors: Q alone, or with another adapter, is worse than plain quantization.


class PairedLayer(LoraLayer):
    """LoRA on a base that was quantized together with these initial factors (QPiSSA, LoftQ)."""

    def __init__(self, base: nn.Module, plan: LayerPlan, context: AttachContext) -> None:
        if plan.name not in context.initial:
            raise AdapterError(
                f"{plan.name}: {context.spec.method} on a quantized base starts from the factors that the base was "
                "made with, and none were given; run the init stage with this method"
            )
        super().__init__(base, plan, context)


LOFTQ = dataclasses.replace(
    LORA,
    name="loftq",
    formula="y = x Qᵀ + b + (alpha/R) · drop(x) Aᵀ Bᵀ, Q and the initial A, B minimize ‖W − Q − s·B·A‖",
    source="Li et al. 2023, arXiv 2310.08659",
    layer=PairedLayer,
    is_paired=True,
    embedding_disk_names={},
    expert_layer=None,
)


# PiSSA: LoRA that starts from the principal part of the weight, which is removed from the frozen weight.
#
#     W = U S Vᵀ;  A₀ = √(S_R / s) V_Rᵀ,  B₀ = U_R √(S_R / s),  W_res = W − s·B₀·A₀
#     y = x W_resᵀ + b + s · drop(x) Aᵀ Bᵀ            A, B start at A₀, B₀; alpha = R (s = 1), dropout 0 recommended
#
# Meng, Wang, Zhang 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation", arXiv 2404.02948. Trained:
# R·(I + O). S is divided by s *before* the root, so that s·B₀·A₀ is the principal part for any alpha. A₀ and B₀ are
# kept, because a second randomized decomposition would give others.
#
# On disk the adapter is the equivalent LoRA of rank 2R on the *original* base, which every tool loads correctly:
#
#     s·(B·A − B₀·A₀) = s · [B | −B₀] · [A ; A₀],  r = 2R, lora_alpha = 2·alpha
#
# and because it contains A₀ and B₀, training can be continued from the file. On a quantized base (QPiSSA) the residual
# was quantized: the base was made with A₀ and B₀, works only with adapters started from them, and nothing is converted.
#
# Dimensions: O = output features, I = input features, R = rank.


def principal_factors(
    weight_OI: Tensor, *, rank: int, scale: float, exact: bool, generator: torch.Generator
) -> dict[str, Tensor]:
    """A₀ (R, I) and B₀ (O, R) in fp32 with s·B₀·A₀ = the best rank-R approximation of W."""
    U_OR, S_R, V_RI = truncated_svd(weight_OI.float(), rank, method="exact" if exact else "fast", generator=generator)
    root_R = (S_R / scale).sqrt()
    return {"A": (root_R[:, None] * V_RI).contiguous(), "B": (U_OR * root_R).contiguous()}


class PissaLayer(LoraLayer):
    """A layer whose principal part is trained; its weight is replaced by the residual."""

    def __init__(self, base: nn.Module, plan: LayerPlan, context: AttachContext) -> None:
        initial = context.initial.get(plan.name) or principal_factors(
            dense_weight(base),
            rank=plan.rank,
            scale=plan.scale,
            exact=context.spec.svd == "exact",
            generator=context.generator,
        )
        super().__init__(base, plan, dataclasses.replace(context, initial={plan.name: initial}))
        self.register_buffer("initial_A", self.A.detach().clone(), persistent=False)
        self.register_buffer("initial_B", self.B.detach().clone(), persistent=False)

    def take_over(self) -> None:
        """Subtract the principal part from the frozen weight, once the whole adapter is known to be right."""
        weight_OI, A_RI, B_OR = dense_weight(self.base), self.get_buffer("initial_A"), self.get_buffer("initial_B")
        residual_OI = torch.addmm(weight_OI.float(), B_OR, A_RI, alpha=-self.plan.scale)
        # A new tensor, so that a tied embedding is not changed.
        residual = to_stored(residual_OI.to(weight_OI.dtype), kind_of(self.base)).contiguous()
        self.base.weight = nn.Parameter(residual, requires_grad=False)

    def disk_state(self) -> dict[str, Tensor]:
        """The equivalent LoRA of twice the rank on the original base: [A ; A₀], [B | −B₀]."""
        return {
            "A": torch.cat([self.A.detach(), self.get_buffer("initial_A")]),
            "B": torch.cat([self.B.detach(), -self.get_buffer("initial_B")], dim=1),
        }

    def load_disk_state(self, state: State) -> None:
        """Take A and B from the equivalent LoRA, whose A₀ and B₀ must be this layer's."""
        rank = self.plan.rank
        self.load_state({"A": state["A"][:rank], "B": state["B"][:, :rank]})


def initial_from_disk(state: State) -> dict[str, Tensor]:
    """A₀ and B₀ from the equivalent LoRA."""
    rank = state["A"].shape[0] // 2
    return {"A": state["A"][rank:], "B": -state["B"][:, rank:]}


def _resized(spec: Adapter, factor: float) -> Adapter:
    # Rank and alpha together, so that s = alpha / rank stays.
    return spec.replace(
        rank=int(spec.rank * factor),
        alpha=spec.alpha * factor,
        rank_pattern={key: int(rank * factor) for key, rank in spec.rank_pattern.items()},
        alpha_pattern={key: alpha * factor for key, alpha in spec.alpha_pattern.items()},
    )


PISSA = dataclasses.replace(
    LORA,
    name="pissa",
    formula="y = x (W − s·B₀A₀)ᵀ + b + (alpha/R) · drop(x) Aᵀ Bᵀ, A and B start at A₀ and B₀ = principal part of W",
    source="Meng et al. 2024, arXiv 2404.02948",
    layer=PissaLayer,
    embedding_disk_names={},
    expert_layer=None,
    disk_form=DiskForm(
        to_disk=lambda spec: _resized(spec, 2),
        from_disk=lambda spec: _resized(spec, 0.5),
        initial=initial_from_disk,
    ),
    on_quantized="qpissa",
)
PISSA_QUANTIZED = dataclasses.replace(
    LORA,
    name="qpissa",
    formula="y = x deq(Q(W − s·B₀A₀))ᵀ + b + (alpha/R) · drop(x) Aᵀ Bᵀ, A and B start at A₀ and B₀",
    source="Meng et al. 2024, arXiv 2404.02948, §4 (QPiSSA)",
    layer=PairedLayer,
    is_paired=True,
    embedding_disk_names={},
    expert_layer=None,
)
