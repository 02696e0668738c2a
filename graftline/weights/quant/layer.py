"""One linear layer's weight through an initialization: what is written for it, and what is reported."""

from dataclasses import dataclass

import torch
from torch import Tensor

from graftline.weights.quant.blockwise import Quantized, quantize
from graftline.weights.quant.factors import Factors, Method, make_pair
from graftline.weights.quant.measure import bits_per_weight, measure, share_of_zeros
from graftline.weights.quant.report import LayerReport
from graftline.weights.quant.scheme import Scheme


@dataclass(frozen=True)
class InitializedLayer:
    """factors: A (R, I) and B (O, R), or None where the layer gets no adapter made with it."""

    quantized: Quantized
    factors: tuple[Tensor, Tensor] | None
    report: LayerReport


def initialize_plain(module: str, W_OI: Tensor, scheme: Scheme) -> InitializedLayer:
    """Quantize a weight; an adapter on it starts from zero (QLoRA)."""
    quantized = quantize(W_OI, scheme)
    distance = measure(W_OI, quantized)
    report = LayerReport(
        module=module,
        code=scheme.code,
        num_weights=W_OI.numel(),
        bits_per_weight=bits_per_weight(quantized),
        error=distance.error,
        error_alone=distance.error,
        error_plain=distance.error,
        zeros=distance.zeros,
        rank=0,
        step_errors=(),
    )
    return InitializedLayer(quantized, None, report)


def initialize_paired(
    module: str, W_OI: Tensor, scheme: Scheme, factors: Factors, *, method: Method, steps: int, seed: int
) -> InitializedLayer:
    """Quantize a weight together with the factors that an adapter on it starts from (LoftQ, QPiSSA)."""
    generator = torch.Generator().manual_seed(seed)
    pair = make_pair(W_OI, scheme, factors, method=method, steps=steps, generator=generator)
    plain = pair.error_plain
    report = LayerReport(
        module=module,
        code=scheme.code,
        num_weights=W_OI.numel(),
        bits_per_weight=bits_per_weight(pair.quantized),
        error=pair.error,
        error_alone=pair.error_alone,
        error_plain=measure(W_OI, quantize(W_OI, scheme)).error if plain is None else plain,
        zeros=share_of_zeros(pair.quantized),
        rank=factors.rank,
        step_errors=pair.step_errors,
    )
    return InitializedLayer(pair.quantized, (pair.A_RI, pair.B_OR), report)
