"""Decoder blocks compiled by torch, each as one region inside its checkpoint.

Norms, rotary embedding, activation and the adapters' small sums are then a few kernels instead of dozens. All blocks
share one compiled function with the sequence length left open. Evaluation, and everything that cannot be compiled,
runs as it always did, and the log says why.
"""

import logging
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import _StopRecomputationError
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from graftline.settings.model import Compile

_LOG = logging.getLogger(__name__)
_COMPILE_SECONDS, _WORTH = 60.0, 20.0
"""A first compilation takes 20 to 90 s; it is worth it where the training is some 20 times as long."""
_FLOPS = 350e12
"""What an H200 does of the 6 operations a weight and token, not compiled (docs/training.md); a slower card needs the
compiler more."""
_MOST_VARIANTS = 64
"""Compiled variants (numbers of rows, with and without bounds) before the rest runs uncompiled."""


def is_worth_it(choice: Compile, *, device: str, num_parameters: int, num_tokens: int) -> bool:
    """Whether a training of so many tokens compiles its blocks; `auto`: on a GPU, if it lasts long enough."""
    if choice != "auto":
        return choice == "always"
    return device == "cuda" and 6.0 * num_parameters * num_tokens / _FLOPS > _WORTH * _COMPILE_SECONDS


class CompiledBlocks:
    """What `compile_blocks` has done."""

    def __init__(self, plain: Callable[..., Any], compiled: Callable[..., Any]) -> None:
        self._plain, self._compiled = plain, compiled
        self.why_not: str | None = None
        """Why blocks run uncompiled after all; None: they do not."""

    def __call__(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """One block's forward."""
        if self.why_not is None:
            try:
                return self._compiled(block, *args, **kwargs)
            except (torch.OutOfMemoryError, _StopRecomputationError):
                raise  # The second ends a checkpoint's recomputation as soon as it has what backward needs.
            except Exception as error:  # noqa: BLE001 # the compiler's own bugs come as any; ours comes again below
                self.give_up(error)
        return self._plain(block, *args, **kwargs)

    def give_up(self, error: Exception) -> None:
        """Run uncompiled from here on."""
        self.why_not = " ".join(str(error).split())[:300] or type(error).__name__
        _LOG.warning("the decoder's blocks run uncompiled, slower but to the same result: %s", self.why_not)


def compile_blocks(model: PreTrainedModel, *, backend: str | Callable[..., Any] = "inductor") -> CompiledBlocks | None:
    """Compile the forward of the model's blocks, in place; `torch.compile` works when a block is first called.

    Returns:
        None where the model has no blocks that can be checkpointed.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        _LOG.warning("%s does not say what its blocks are; it runs uncompiled", type(model).__name__)
        return None
    import torch._dynamo  # seconds: only here

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_VARIANTS)
    plain = type(blocks[0]).forward.__wrapped__  # type: ignore[attr-defined] # without the checkpoint around it
    compiled = CompiledBlocks(plain, torch.compile(plain, backend=backend, dynamic=True, fullgraph=True))
    for block in blocks:
        if type(block) is type(blocks[0]):
            block.forward = MethodType(partial(_forward, compiled), block)
    return compiled


def _forward(compiled: CompiledBlocks, block: Any, *args: Any, **kwargs: Any) -> Any:
    if not block.training:
        return compiled._plain(block, *args, **kwargs)
    if block.gradient_checkpointing:
        return block._gradient_checkpointing_func(partial(compiled, block, **kwargs), *args)
    return compiled(block, *args, **kwargs)
