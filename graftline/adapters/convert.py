"""Convert an adapter, exactly, to a kind that a server can load.

    PiSSA   → LoRA of rank 2R on the original base: s·[B | −B₀]·[A ; A₀], which is its form on disk
    VeRA    → LoRA: B' = diag(b)·B, A' = diag(d)·A
    rsLoRA, and scales that differ by layer → LoRA with one scale: each scale goes into its B

DoRA has no low-rank form, because it scales whole rows of W.

Dimensions: O = output features, I = input features, R = rank.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

import torch

from graftline.adapters.base import Method, State
from graftline.adapters.methods import find_method
from graftline.adapters.weights import AdapterWeights
from graftline.errors import AdapterError

ShapeOf = Callable[[str], tuple[int, int]]
"""Path of a layer → (O, I) of its weight."""


def to_lora(weights: AdapterWeights, *, shape_of: ShapeOf) -> AdapterWeights:
    """The adapter as plain LoRA with scale 1 for all layers, which any tool that supports LoRA computes alike.

    A layer whose rank exceeds its width gets the same update at the width's rank (B·A at R > O is I·(B·A)).
    ``shape_of`` is needed because VeRA's factors alone do not tell how many inputs a layer has.

    Raises:
        AdapterError: the method has no such form.
    """
    method = weights.method
    if method.factors is None or method.name == "dora":
        reason = method.fold_refusal or "it scales whole rows of the weight, which no low-rank update does; merge it"
        raise AdapterError(f"{method.name} cannot become LoRA, because {reason}")
    states = {name: _lora_state(weights, name, shape_of(name)) for name in weights.modules()}
    return _as_lora(weights, states)


def _lora_state(weights: AdapterWeights, name: str, shape: tuple[int, int]) -> State:
    num_outputs, num_inputs = shape
    # Only DoRA needs the weight itself; the others at most its shape.
    A_IR, B_RO, _ = weights.serving_factors(name, lambda: torch.empty(num_outputs, num_inputs, device="meta"))
    A_RI, B_OR = A_IR.T.contiguous(), B_RO.T.contiguous()
    rank = A_RI.shape[0]
    if rank > num_outputs <= num_inputs:
        return {"A": B_OR @ A_RI, "B": torch.eye(num_outputs)}
    if rank > num_inputs:
        return {"A": torch.eye(num_inputs), "B": B_OR @ A_RI}
    return {"A": A_RI, "B": B_OR}


def _as_lora(weights: AdapterWeights, states: Mapping[str, State]) -> AdapterWeights:
    lora: Method = find_method("lora")
    ranks = {name: int(state["A"].shape[0]) for name, state in states.items()}
    largest = max(ranks.values())
    patterns = {re.escape(name): rank for name, rank in ranks.items() if rank != largest}
    spec = weights.spec.replace(
        method=lora.name,
        rank=largest,
        alpha=float(largest),
        rank_pattern=patterns,
        alpha_pattern={pattern: float(rank) for pattern, rank in patterns.items()},
    )
    return dataclasses.replace(weights, states=states, spec=spec, method=lora, shared={})
