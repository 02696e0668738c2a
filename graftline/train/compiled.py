"""Compiles decoder blocks with torch, each as one region inside its activation checkpoint.

Norms, rotary embedding, activation and the adapters' small sums then take a few kernels instead of dozens. All blocks
share one compiled function with a dynamic sequence length. Evaluation runs uncompiled, and so does everything that
cannot be compiled, for which the log gives the reason. Before the first step the compiled gradients of one block are
compared with the plain ones.
"""

import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import _StopRecomputationError
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from graftline.settings.model import Compile
from graftline.weights.experts import expert_stacks

_LOG = logging.getLogger(__name__)
_COMPILE_SECONDS, _WORTH = 60.0, 20.0
"""The first compilation takes 20 to 90 s; it pays off if the training takes about 20 times as long."""
_FLOPS = 350e12
"""FLOP/s of an H200 without compilation, at 6 FLOPs per weight and token (docs/training.md); a slower GPU needs the
compiler more."""
_MOST_VARIANTS = 64
"""Maximum number of compiled variants (row counts, with and without bounds); the rest runs uncompiled."""


def is_worth_it(choice: Compile, *, device: str, num_parameters: int, num_tokens: int) -> bool:
    """Whether to compile the blocks for this many tokens; `auto`: on a GPU, if the training takes long enough."""
    if choice != "auto":
        return choice == "always"
    return device == "cuda" and 6.0 * num_parameters * num_tokens / _FLOPS > _WORTH * _COMPILE_SECONDS


class CompiledBlocks:
    """Runs the blocks compiled, or uncompiled once compilation has failed."""

    def __init__(self, plain: Callable[..., Any], compiled: Callable[..., Any]) -> None:
        self._plain, self._compiled = plain, compiled
        self._is_checked = False
        self.why_not: str | None = None
        """Why the blocks run uncompiled after all; None while they run compiled."""

    def __call__(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """One block's forward."""
        if self.why_not is None:
            try:
                self._check_once(block, args, kwargs)
                return self._compiled(block, *args, **kwargs)
            except (torch.OutOfMemoryError, _StopRecomputationError):
                raise  # The second ends a checkpoint's recomputation once backward has what it needs.
            except Exception as error:  # noqa: BLE001 # compiler bugs raise any type; our own errors recur below
                self.give_up(error)
        return self._plain(block, *args, **kwargs)

    def _check_once(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compare the first block's gradients with those of the plain block: a compiler may get them wrong silently.

        Norms are compared, and widely: dropout draws other numbers, and sums are rounded in another order.
        """
        if self._is_checked or not torch.is_grad_enabled():
            return
        trained = {name: p for name, p in block.named_parameters() if p.requires_grad}
        if not trained:
            return  # a later block has an adapter
        self._is_checked = True
        plain, compiled = (_gradient_norms(run, block, args, kwargs, trained) for run in (self._plain, self._compiled))
        for name, expected, found in zip(trained, plain, compiled, strict=True):
            if abs(found - expected) > 0.5 * expected or not math.isfinite(found):
                raise RuntimeError(
                    f"compiled, the gradient of {name} has a norm of {found:.3g} instead of {expected:.3g}; torch "
                    f"{torch.__version__} compiles this model wrongly: a newer one may not"
                )

    def give_up(self, error: Exception) -> None:
        """Run uncompiled from now on."""
        self.why_not = " ".join(str(error).split())[:300] or type(error).__name__
        _LOG.warning("the decoder's blocks run uncompiled, slower but to the same result: %s", self.why_not)


def _gradient_norms(
    run: Callable[..., Any],
    block: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    trained: Mapping[str, nn.Parameter],
) -> list[float]:
    """Norm of each trained parameter's gradient of the mean square of the block's output, which stays as it is."""
    inputs = [_apart(value) for value in args]
    with (
        torch.random.fork_rng(_devices_of(block)),
        torch.enable_grad(),
        saved_tensors_hooks(_same, _same),  # not those of the checkpoint around the block, which counts them
    ):
        output = run(block, *inputs, **{name: _apart(value) for name, value in kwargs.items()})
        first = output[0] if isinstance(output, tuple) else output
        loss = first.float().square().mean()
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    norms = [torch.zeros((), device=loss.device) if g is None else g.float().norm() for g in found]
    return torch.stack(norms).tolist()


def _apart(value: Any) -> Any:
    """A tensor without its history, as much to be differentiated as before."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _devices_of(block: nn.Module) -> list[torch.device]:
    return list({p.device for p in block.parameters() if p.device.type == "cuda"})


def compile_blocks(model: PreTrainedModel, *, backend: str | Callable[..., Any] = "inductor") -> CompiledBlocks | None:
    """Compile the forward of the model's blocks in place; compilation happens when a block is first called.

    Returns:
        None if the model has no blocks that support activation checkpointing, or has experts.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        _LOG.warning("%s does not say what its blocks are; it runs uncompiled", type(model).__name__)
        return None
    if expert_stacks(model):
        _LOG.warning("%s has experts, whose rows differ from step to step; it runs uncompiled", type(model).__name__)
        return None
    import torch._dynamo  # takes seconds to import

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
