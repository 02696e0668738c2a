"""LoftQ: LoRA that starts from what quantization lost.

    min ‖W − Q − s·B·A‖:  for t = 1 … T:  Q = quantize(W − s·B·A),  s·B·A = best rank-R approximation of W − Q
    y = x Qᵀ + b + s · drop(x) Aᵀ Bᵀ

Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", arXiv 2310.08659. Trained: R·(I
+ O). The alternation runs in the init stage (`graftline.weights.quant.init`), which writes Q as the base and A, B as
initial factors; S is divided by s there, which PEFT leaves out (peft #1982), so that alpha may be anything. In training
it is LoRA that must start from those factors: Q alone is worse than plain quantization, and another adapter on Q is
wrong (METHODS.md §1.8).
"""

import dataclasses

from torch import nn

from graftline.adapters import lora
from graftline.adapters.base import Context, LayerPlan
from graftline.adapters.lora import LoraLayer
from graftline.errors import AdapterError


class PairedLayer(LoraLayer):
    """LoRA on a base that was quantized together with these initial factors (QPiSSA, LoftQ)."""

    def __init__(self, base: nn.Module, plan: LayerPlan, context: Context) -> None:
        if plan.name not in context.initial:
            raise AdapterError(
                f"{plan.name}: {context.spec.method} on a quantized base starts from the factors that the base was "
                "made "
                "with, and none were given; run the init stage with this method"
            )
        super().__init__(base, plan, context)


METHOD = dataclasses.replace(
    lora.METHOD,
    name="loftq",
    formula="y = x Qᵀ + b + (alpha/R) · drop(x) Aᵀ Bᵀ, Q and the initial A, B minimize ‖W − Q − s·B·A‖",
    source="Li et al. 2023, arXiv 2310.08659",
    layer=PairedLayer,
    is_paired=True,
    embedding_disk_names={},
)
