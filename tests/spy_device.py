"""A stand-in for a GPU on a machine without one: tensors that say they lie on another device, and compute on the CPU.

As on CUDA, an operation on tensors of two devices is refused, unless the one on the CPU is a single number or an index,
or the operation is a copy. The device is called ``meta``, because torch asks no driver about that one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

ELSEWHERE = torch.device("meta")
_COPIES = ("aten::copy_", "aten::_to_copy")
_INDEXED = ("aten::index.Tensor", "aten::index_put", "aten::index_put_")


class SpyTensor(Tensor):
    """A tensor on the other device; its values are in ``held``, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "SpyTensor":
        made: SpyTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=ELSEWHERE,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Everywhere(TorchDispatchMode):
    """Makes what is asked for on the other device there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def other_device() -> Iterator[None]:
    """While this is entered, ``meta`` is a device whose tensors have values."""
    with torch.no_grad(), _Everywhere():
        yield


def on_other_device(tensor: Tensor) -> Tensor:
    """A copy of a tensor there."""
    return SpyTensor(tensor.detach().clone())


def back(tensor: Tensor) -> Tensor:
    """The values of a tensor from there."""
    assert isinstance(tensor, SpyTensor), "this tensor lies on the CPU"
    return tensor.held


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    wrappers = {id(value.held): value for value in given if isinstance(value, SpyTensor)}
    name = func.name()
    asked = kwargs.get("device")
    if wrappers and not name.startswith(_COPIES):
        if name.startswith(_INDEXED):
            given = given[:1]
        strange = [value for value in given if not isinstance(value, SpyTensor) and value.dim()]
        if strange or not any(isinstance(value, SpyTensor) for value in given):
            raise RuntimeError(f"tensors on two devices: {name}, {[tuple(value.shape) for value in given]}")
    plain_args, plain_kwargs = tree_map(lambda v: v.held if isinstance(v, SpyTensor) else v, (args, kwargs))
    if asked is not None:
        plain_kwargs["device"] = torch.device("cpu")
    found = func(*plain_args, **plain_kwargs)
    stays = wrappers if asked is None else asked is not None and torch.device(asked) == ELSEWHERE
    if name.startswith("aten::copy_"):
        stays = isinstance(args[0], SpyTensor)

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in wrappers:
            return wrappers[id(value)]
        return SpyTensor(value.clone() if name.startswith("aten::_to_copy") else value) if stays else value

    return tree_map(wrap, found)
