"""One product for all experts that have rows, in place of one each: torch's grouped product.

    y_S = x_S W_eᵀ for the rows of expert e; rows are sorted by expert, and those of experts up to e end at ends_E[e]

``torch.nn.functional.grouped_mm``, which transformers' own experts use too (transformers/integrations/moe.py). It wants
every row of every matrix to begin at a multiple of 16 bytes. On a GPU it is one kernel in bf16. On a CPU torch itself
loops, which saves what starting a product costs in Python and no arithmetic; there the loop here stays, whose results
are to the bit what they always were (docs/decisions/0080-experts.md has figures). Each device is tried once, against
the loop.

Dimensions: E = experts, S = rows, O = output features, I = input features.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

_LOG = logging.getLogger(__name__)

PLACES = {("cuda", torch.bfloat16)}
"""Kinds of devices and number types in which grouped products may be used."""
_PROBE_COUNTS = (5, 0, 16, 3)
"""Rows of each expert in the probe; one has none."""


def aligned(features: int, dtype: torch.dtype) -> int:
    """The next number of features whose rows take a multiple of 16 bytes."""
    multiple = 16 // dtype.itemsize
    return -(-features // multiple) * multiple


def can_group(x: Tensor) -> bool:
    """Whether grouped products are for this input's device and number type, and are right there.

    Never for tensors without values, with which memory is planned: the loop's is planned, which is no less.
    """
    if isinstance(x, FakeTensor) or (x.device.type, x.dtype) not in PLACES:
        return False
    return _are_right(x.device, x.dtype)


def grouped_linear(x_SI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """(S, O): each expert's rows times its matrix. ``ends_E`` is int32, on the same device."""
    y_SO: Tensor = _Grouped.apply(x_SI, weight_EOI, ends_E)
    return y_SO


def _product(x_SI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    return F.grouped_mm(x_SI, weight_EOI.transpose(1, 2), offs=ends_E)


def _input_gradient(grad_SO: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    return F.grouped_mm(grad_SO, weight_EOI, offs=ends_E)


def _weight_gradient(grad_SO: Tensor, x_SI: Tensor, ends_E: Tensor) -> Tensor:
    return F.grouped_mm(grad_SO.T, x_SI, offs=ends_E)


class _Grouped(torch.autograd.Function):
    """Keeps x only where the matrices are trained."""

    @staticmethod
    def forward(ctx: Any, x_SI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_SI if weight_EOI.requires_grad else None, weight_EOI, ends_E)
        return _product(x_SI, weight_EOI, ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_SI, weight_EOI, ends_E = ctx.saved_tensors
        grad_SO = grad_SO.contiguous()
        of_x = _input_gradient(grad_SO, weight_EOI, ends_E) if ctx.needs_input_grad[0] else None
        of_weight = _weight_gradient(grad_SO, x_SI, ends_E) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, None


@functools.cache
def _are_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the three products work here and give what the loop gives; the log says if not."""
    reason = _difference(device, dtype)
    if reason:
        _LOG.warning("no grouped products on %s in %s: %s; experts are multiplied one by one", device, dtype, reason)
    return not reason


@torch.no_grad()
def _difference(device: torch.device, dtype: torch.dtype) -> str:
    """What is wrong with grouped products on a device; empty if nothing is."""
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has none"
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (
        torch.randn(shape, generator=generator).to(device, dtype) for shape in ((24, 32), (4, 16, 32), (24, 16))
    )
    ends = torch.tensor(_PROBE_COUNTS).cumsum(0).to(device, torch.int32)
    rows = list(zip(x.split(_PROBE_COUNTS), grad.split(_PROBE_COUNTS), weight, strict=True))
    checks: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
        "the product": (lambda: _product(x, weight, ends), torch.cat([x @ w.T for x, _, w in rows])),
        "the gradient of x": (lambda: _input_gradient(grad, weight, ends), torch.cat([g @ w for _, g, w in rows])),
        "the gradient of W": (lambda: _weight_gradient(grad, x, ends), torch.stack([g.T @ x for x, g, _ in rows])),
    }
    for name, (compute, expected) in checks.items():
        try:
            found = compute()
        except RuntimeError as error:  # a device or number type that it does not know
            return f"{name} fails ({str(error).splitlines()[0]})"
        allowed = 4 * torch.finfo(dtype).eps * float(expected.abs().max())
        if found.shape != expected.shape or not float((found - expected).abs().max()) <= allowed:
            return f"{name} is not the loop's"
    return ""
