"""Converting a tensor to another number type without overflow to infinity."""

import torch
from torch import Tensor

from graftline.errors import NumberTypeError


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """``tensor`` as ``dtype``; one that is not floating-point stays as it is.

    bfloat16 has the range of float32, but float16 ends at 65,504: a larger weight would become infinite. Values that
    are infinite or NaN already are not checked.

    Raises:
        NumberTypeError: a finite value does not fit; the tensor and the types that can hold it are named.
    """
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    out = tensor.to(dtype)
    if torch.finfo(dtype).max >= torch.finfo(tensor.dtype).max or is_finite(out):
        return out
    finite = tensor[torch.isfinite(tensor)]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    if not bool(torch.isinf(finite.to(dtype)).any()):
        return out
    wider = [t for t in (torch.bfloat16, torch.float32, torch.float64) if torch.finfo(t).max >= largest and t != dtype]
    raise NumberTypeError(
        f"{name} has values of up to {largest:.3g}, which {type_name(dtype)} cannot hold (at most "
        f"{torch.finfo(dtype).max:.3g}); choose {' or '.join(map(type_name, wider))}"
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has neither Inf nor NaN; takes no memory of the tensor's size."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)  # both are NaN if any value is
    return bool(low.isfinite() & high.isfinite())


def type_name(dtype: torch.dtype) -> str:
    """A number type as settings write it: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")
