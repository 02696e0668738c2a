"""A base of which each of several processes holds a share (torch's FSDP2), read from its files share by share.

Every frozen tensor is cut along its first dimension, by rows, into as many pieces as there are processes; the codes and
constants of a quantized weight are tensors like the others. A block's tensors are gathered when it runs, and freed
afterwards; those outside the blocks (embedding, last norm, head) stay gathered for a whole step. What is trained is
ignored: each process holds all of it.
"""

from collections.abc import Callable, Collection

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from graftline.errors import TrainError

ReadRows = Callable[[str, int, int], Tensor]
"""(name of a parameter, first row, the row after the last) → these rows, on the process's device."""


def shard(model: PreTrainedModel, *, kind: str, whole: Collection[nn.Parameter] = ()) -> None:
    """Cut the model's parameters over all processes, block by block, except those in ``whole``.

    Parameters may be on ``meta``; `read_shares` reads them then. ``kind``: cpu or cuda.

    Raises:
        TrainError: the model's class does not say what its blocks are.
    """
    mesh, ignored = init_device_mesh(kind, (dist.get_world_size(),)), set(whole)
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, ignored_params=ignored)
    fully_shard(model, mesh=mesh, ignored_params=ignored)


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's blocks; TrainError if the model's class does not name them."""
    names = set(model._no_split_modules or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise TrainError(f"{type(model).__name__} does not say what its blocks are; train it without train.sharding")
    return blocks


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called on this model."""
    return isinstance(model, FSDPModule)


def free_gathered(model: nn.Module) -> None:
    """Free what a forward pass without a backward pass left gathered; nothing for a model that is not sharded."""
    if isinstance(model, FSDPModule):
        model.reshard()


def read_shares(model: nn.Module, read: ReadRows) -> None:
    """Give each sharded parameter on ``meta`` this process's rows; tied ones stay tied."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for last, parameter in module._parameters.items():
            if isinstance(parameter, DTensor) and parameter.is_meta:
                if parameter not in made:
                    made[parameter] = _share(parameter, names[parameter], read)
                module._parameters[last] = made[parameter]


def _share(parameter: DTensor, name: str, read: ReadRows) -> nn.Parameter:
    start, stop = rows_of(parameter.shape[0], dist.get_rank(), dist.get_world_size())
    local = DTensor.from_local(
        read(name, start, stop),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return nn.Parameter(local, requires_grad=False)


def rows_of(num_rows: int, rank: int, processes: int) -> tuple[int, int]:
    """First row, and the row after the last, of a process's share: equal ones, the last may be shorter or empty."""
    size = -(-num_rows // processes)
    return min(rank * size, num_rows), min((rank + 1) * size, num_rows)


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered if it is sharded: all processes must call this, in the same order."""
    if isinstance(tensor, DTensor):
        gathered: Tensor = tensor.full_tensor()
        return gathered
    return tensor


def held_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor in this process: of its share if it is sharded."""
    return tensor.to_local().nbytes if isinstance(tensor, DTensor) else tensor.nbytes
