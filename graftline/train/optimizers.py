"""Optimizers for adapter parameters: the learning rate, weight decay and states of each group.

| parameters                                         | learning rate                | weight decay |
|----------------------------------------------------|------------------------------|--------------|
| matrices                                           | lr                           | as set       |
| a low-rank update's B                              | lr · lr_ratio_b (LoRA+)      | as set       |
| vectors: VeRA's d and b, DoRA's magnitude, biases  | lr · lr_ratio_vectors        | none         |

LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B learns best at 16 times A's learning rate. VeRA (2310.11454) trains its
vectors at ten times LoRA's rate or more. Vectors get no decay: it would pull them to zero, away from the norm of a
weight row (DoRA's magnitude) or their initial value (VeRA's d).

The 8-bit and paged optimizers are from bitsandbytes (Dettmers et al. 2021, arXiv 2110.02861; QLoRA §3). On a CPU the
8-bit ones work, and paged ones use ordinary memory, with the same results.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graftline.errors import TrainError
from graftline.settings.model import Train

_LOG = logging.getLogger(__name__)
_BETAS, _EPS = (0.9, 0.999), 1e-8
_PAGED_STATES = ("state1", "state2")
_SMALLEST_PAGED = 100_000
"""bitsandbytes pages only buffers of at least this many elements."""


def _of_bitsandbytes(name: str) -> Callable[..., torch.optim.Optimizer]:
    def make(groups: list[dict[str, Any]], **given: Any) -> torch.optim.Optimizer:
        try:
            from bitsandbytes.optim import adamw  # not available on macOS, and loads the CUDA libraries
        except ImportError as error:
            raise TrainError(
                f"train.optimizer names an optimizer of bitsandbytes, which cannot be imported here ({error}); "
                "write adamw, or install bitsandbytes"
            ) from error
        made: torch.optim.Optimizer = getattr(adamw, name)(groups, **given)
        return made

    return make


FACTORIES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda groups, **given: torch.optim.AdamW(groups, fused=True, **given),
    "adamw_8bit": _of_bitsandbytes("AdamW8bit"),
    "paged_adamw_8bit": _of_bitsandbytes("PagedAdamW8bit"),
    "paged_adamw_32bit": _of_bitsandbytes("PagedAdamW32bit"),
}


def make_optimizer(parameters: Mapping[str, nn.Parameter], settings: Train) -> torch.optim.Optimizer:
    """AdamW over the named trainable parameters, in the groups of the table above.

    8-bit states take one byte per element from 4096 elements on; smaller tensors keep fp32 states (bitsandbytes' rule).
    """
    groups = [
        {
            "params": [parameter for name, parameter in parameters.items() if _group_of(name, parameter) == group],
            "lr": settings.learning_rate * ratio,
            "weight_decay": decay,
        }
        for group, ratio, decay in (
            ("matrix", 1.0, settings.weight_decay),
            ("b", settings.lr_ratio_b, settings.weight_decay),
            ("vector", settings.lr_ratio_vectors, 0.0),
        )
    ]
    used = [group for group in groups if group["params"]]
    if settings.optimizer.startswith("paged") and all(p.device.type == "cpu" for p in parameters.values()):
        _LOG.warning("%s: a CPU has no paged memory; the states lie in ordinary memory", settings.optimizer)
    return FACTORIES[settings.optimizer](used, lr=settings.learning_rate, betas=_BETAS, eps=_EPS)


def _group_of(name: str, parameter: nn.Parameter) -> str:
    if parameter.dim() < 2:
        return "vector"
    # graftline's and PEFT's names for B
    return "b" if name.endswith(".B") or "lora_B" in name else "matrix"


def restore_paging(optimizer: torch.optim.Optimizer) -> int:
    """Move states loaded from a checkpoint back into paged memory; returns how many were moved.

    bitsandbytes loads them as ordinary CUDA tensors (its issues 782 and 1381), so a resumed training would lose the
    memory savings of paging.
    """
    if not getattr(optimizer, "is_paged", False):
        return 0
    moved = 0
    for parameter, state in optimizer.state.items():
        for key, value in _pageable(state):
            buffer: Tensor = optimizer.get_state_buffer(parameter, dtype=value.dtype)  # type: ignore[attr-defined]
            state[key] = buffer.copy_(value)
            moved += 1
    return moved


def _pageable(state: Mapping[str, Any]) -> Iterable[tuple[str, Tensor]]:
    for key in _PAGED_STATES:
        value = state.get(key)
        if value is not None and value.is_cuda and value.numel() >= _SMALLEST_PAGED:
            yield key, value
