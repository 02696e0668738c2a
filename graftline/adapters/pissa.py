"""PiSSA: LoRA that starts from the principal part of the weight, which the frozen rest lacks.

    W = U S Vᵀ;  A₀ = √(S_R / s) V_Rᵀ,  B₀ = U_R √(S_R / s),  W_res = W − s·B₀·A₀
    y = x W_resᵀ + b + s · drop(x) Aᵀ Bᵀ            A, B start at A₀, B₀; alpha = R (s = 1), dropout 0 recommended

Meng, Wang, Zhang 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation", arXiv 2404.02948. Trained:
R·(I + O). S is divided by s *before* the root, so that s·B₀·A₀ is the principal part whatever alpha is. A₀ and B₀ are
kept: a randomized decomposition, run again, gives others (METHODS.md §7.8).

On disk the adapter is the equivalent LoRA of rank 2R on the *original* base, which every tool loads right:

    s·(B·A − B₀·A₀) = s · [B | −B₀] · [A ; A₀],  r = 2R, lora_alpha = 2·alpha

and because A₀ and B₀ are in it, training can go on from the file. On a quantized base the residual is what was
quantized (QPiSSA): that base was made with A₀ and B₀, is used with adapters started from them only, and nothing is
converted.

Dimensions: O = output features, I = input features, R = rank.
"""

import dataclasses

import torch
from torch import Tensor, nn

from graftline.adapters import lora
from graftline.adapters.base import Context, DiskForm, LayerPlan, State, dense_weight, kind_of, to_stored
from graftline.adapters.loftq import PairedLayer
from graftline.adapters.lora import LoraLayer
from graftline.settings.model import Adapter
from graftline.weights.linalg import truncated_svd


def principal_factors(
    weight_OI: Tensor, *, rank: int, scale: float, exact: bool, generator: torch.Generator
) -> dict[str, Tensor]:
    """A₀ (R, I) and B₀ (O, R) in fp32 with s·B₀·A₀ = the best rank-R approximation of W."""
    U_OR, S_R, V_RI = truncated_svd(weight_OI.float(), rank, method="exact" if exact else "fast", generator=generator)
    root_R = (S_R / scale).sqrt()
    return {"A": (root_R[:, None] * V_RI).contiguous(), "B": (U_OR * root_R).contiguous()}


class PissaLayer(LoraLayer):
    """A layer whose principal part is trained; its weight is replaced by the residual."""

    def __init__(self, base: nn.Module, plan: LayerPlan, context: Context) -> None:
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
        """Take the principal part out of the frozen weight. Not before the whole adapter is known to be right."""
        weight_OI, A_RI, B_OR = dense_weight(self.base), self.get_buffer("initial_A"), self.get_buffer("initial_B")
        residual_OI = torch.addmm(weight_OI.float(), B_OR, A_RI, alpha=-self.plan.scale)
        # A new tensor: a head that shares its weight with the embedding must leave the embedding as it is.
        residual = to_stored(residual_OI.to(weight_OI.dtype), kind_of(self.base)).contiguous()
        self.base.weight = nn.Parameter(residual, requires_grad=False)

    def disk_state(self) -> dict[str, Tensor]:
        """The equivalent LoRA of twice the rank on the original base: [A ; A₀], [B | −B₀]."""
        return {
            "A": torch.cat([self.A.detach(), self.get_buffer("initial_A")]),
            "B": torch.cat([self.B.detach(), -self.get_buffer("initial_B")], dim=1),
        }

    def load_disk_state(self, state: State) -> None:
        """Take A and B from the equivalent LoRA; A₀ and B₀ must be those that this layer was made with."""
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


METHOD = dataclasses.replace(
    lora.METHOD,
    name="pissa",
    formula="y = x (W − s·B₀A₀)ᵀ + b + (alpha/R) · drop(x) Aᵀ Bᵀ, A and B start at A₀ and B₀ = principal part of W",
    source="Meng et al. 2024, arXiv 2404.02948",
    layer=PissaLayer,
    embedding_disk_names={},
    disk_form=DiskForm(
        to_disk=lambda spec: _resized(spec, 2),
        from_disk=lambda spec: _resized(spec, 0.5),
        initial=initial_from_disk,
    ),
    on_quantized="qpissa",
)
QUANTIZED = dataclasses.replace(
    lora.METHOD,
    name="qpissa",
    formula="y = x deq(Q(W − s·B₀A₀))ᵀ + b + (alpha/R) · drop(x) Aᵀ Bᵀ, A and B start at A₀ and B₀",
    source="Meng et al. 2024, arXiv 2404.02948, §4 (QPiSSA)",
    layer=PairedLayer,
    is_paired=True,
    embedding_disk_names={},
)
