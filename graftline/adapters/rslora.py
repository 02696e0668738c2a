"""rsLoRA: LoRA with a scale that keeps its moments independent of the rank.

    y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ            s = alpha / √R

Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv 2312.03732. Trained: R·(I +
O). With alpha / R the gradient of B falls as 1/√R and a large rank learns no more than a small one; alpha / √R is the
one scaling that keeps it constant. At R = 1 both are the same.
"""

import dataclasses
import math

from graftline.adapters import lora

METHOD = dataclasses.replace(
    lora.METHOD,
    name="rslora",
    formula="y = x Wᵀ + b + (alpha/√R) · drop(x) Aᵀ Bᵀ",
    source="Kalajdzievski 2023, arXiv 2312.03732",
    scale=lambda alpha, rank: alpha / math.sqrt(rank),
)
