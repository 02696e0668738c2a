"""Multi-process training: replicated, or FSDP2 for a base that does not fit one process.

`launch` starts the processes with torchrun if ``train.processes`` asks for several, `graftline.train.ray_workers` with
Ray Train.

Each process computes its own micro-batches of a step; a step has batch_size x gradient_accumulation x processes rows.
Replicated, each process holds the whole base. With FSDP2, each reads and holds its share of the base, quantized or not,
and a block is gathered when it runs (`graftline.weights.sharded`). Adapters are small: both modes replicate them and
sum their gradients once per step, so every process holds the whole adapter and can save it without gathering. The saved
adapter is compared with every process's parameters by digest.
"""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import PreTrainedModel

from graftline.digest import Digest, of_folder, of_stream
from graftline.errors import TrainError
from graftline.limits import memory_kills, why_killed
from graftline.weights.quant.linear import QuantLinear
from graftline.weights.sharded import is_sharded, shard


def num_processes() -> int:
    """Number of processes of this training, as set by torchrun or Ray Train; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes files: it is the first or the only one."""
    return rank() == 0


def rank() -> int:
    """This process's rank, from 0."""
    return int(os.environ.get("RANK", "0"))


def start_processes(kind: str) -> None:
    """Join the other processes, if any; each selects its own device before any tensor is allocated."""
    if num_processes() == 1 or dist.is_initialized():
        return
    if kind == "cuda":
        torch.cuda.set_device(local_device(kind))
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")


def wait_for_all() -> None:
    """Wait until every process has reached this call."""
    if num_processes() > 1:
        dist.barrier()


def processes_here(processes: int) -> int:
    """How many of a training's processes share this machine.

    Its launcher tells each of them; before they start they are spread evenly over torchrun's machines, mostly one.
    """
    told, nodes = os.environ.get("LOCAL_WORLD_SIZE", ""), os.environ.get("PET_NNODES", "1")
    if num_processes() > 1 and told.isdecimal():
        return max(1, int(told))
    return max(1, processes // int(nodes)) if nodes.isdecimal() and int(nodes) else 1


def local_device(kind: str) -> torch.device:
    """This process's device; several processes on one machine each have their own CUDA device."""
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device(kind)


_LOSS = "graftline_loss"
"""Name under which a sharded model has its loss, so that FSDP2 takes it for a forward function."""


def shard_base(loss: nn.Module, model: PreTrainedModel) -> None:
    """Run ``loss`` over a sharded base; one that this process still has whole is sharded first, trained parts are not.

    ``loss`` is the module whose forward runs the whole model: embedding and head are gathered for it.
    """
    if not is_sharded(model):
        kind = next(model.parameters()).device.type
        for layer in model.modules():
            if isinstance(layer, QuantLinear):
                layer.use_parameters()
        shard(model, kind=kind, whole=[parameter for parameter in model.parameters() if parameter.requires_grad])
    # FSDP2 gathers what is outside the blocks for the model's own forward only, and the loss calls body and head apart.
    setattr(model, _LOSS, loss.forward)
    register_fsdp_forward_method(model, _LOSS)
    loss.forward = getattr(model, _LOSS)


def replicate_trainable(model: nn.Module) -> None:
    """Broadcast the first process's trainable parameters to all."""
    for parameter in _trainable(model).values():
        dist.broadcast(parameter.data, src=0)


def add_gradients(model: nn.Module) -> None:
    """Sum the trainable parameters' gradients over all processes, in one all-reduce."""
    gradients = [p.grad for p in _trainable(model).values() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def verify_replicas(model: nn.Module, saved: Mapping[str, Tensor]) -> Digest:
    """Check that ``saved``, as read back from disk, equals every process's parameters; returns its digest.

    Raises:
        TrainError: a process holds different parameters.
    """
    expected = trainable_digest(saved)
    found: list[Digest | None] = [None] * num_processes()
    if num_processes() == 1:
        found = [trainable_digest(_trainable(model))]
    else:
        dist.all_gather_object(found, trainable_digest(_trainable(model)))
    wrong = [rank for rank, digest in enumerate(found) if digest != expected]
    if wrong:
        raise TrainError(
            f"the saved adapter has digest {expected}, but processes {wrong} hold another one; "
            "run again: it resumes from the checkpoint before"
        )
    return expected


def save_verified(save: Callable[[Path], object], folder: Path) -> None:
    """Save into ``folder`` from the first process; the others must produce the same files, by digest.

    Args:
        save: writes an adapter into a folder, the same bytes for the same adapter.
        folder: destination.

    Raises:
        TrainError: a process holds a different adapter than the saved one.
    """
    if num_processes() == 1:
        save(folder)
        return
    with tempfile.TemporaryDirectory() as own:
        place = folder if is_main() else Path(own)
        save(place)
        files = {name: str(digest) for name, digest in of_folder(place).items()}
    found: list[dict[str, str] | None] = [None] * num_processes()
    dist.all_gather_object(found, files)
    if wrong := [rank for rank, other in enumerate(found) if other != found[0]]:
        raise TrainError(
            f"{folder} was saved by process 0, but processes {wrong} hold another adapter; "
            "run again: it resumes from the last checkpoint"
        )


def trainable_digest(tensors: Mapping[str, Tensor]) -> Digest:
    """Digest of named tensors: names and bytes, sorted by name."""
    return of_stream(
        part
        for name, tensor in sorted(tensors.items())
        for part in (name.encode(), tensor.detach().cpu().contiguous().numpy().tobytes())
    )


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextlib.contextmanager
def written_together(folder: contextlib.AbstractContextManager[Path], temporary: Path) -> Iterator[Path]:
    """The first process creates ``folder`` and completes it once all have written their files into ``temporary``."""
    if num_processes() == 1:
        with folder as made:
            yield made
        return
    if is_main():
        with folder as made:
            dist.barrier()
            yield made
            dist.barrier()
    else:
        dist.barrier()
        yield temporary
        dist.barrier()
    dist.barrier()


# torchrun starts the processes on this machine and picks a free port. On several machines, Ray Train starts them
# (`graftline.train.ray_workers`), or you run torchrun on each machine by hand.

_KILLED = re.compile(r"exitcode\s*: -9\b")
"""How torchrun reports SIGKILL."""
_EXPLAINED = "error: "
"""Prefix of the line in which a process reports its error."""


def must_launch(processes: int) -> bool:
    """Whether this process has to launch the training processes rather than being one of them.

    Raises:
        TrainError: torchrun started a different number of processes.
    """
    running = num_processes()
    if running > 1 and running != processes:
        raise TrainError(
            f"torchrun started {running} processes, train.processes is {processes}; the rows of a step depend on it: "
            f"write train.processes: {running}, or start {processes}"
        )
    return running < processes


def launch(command: Sequence[str], *, processes: int, on_line: Callable[[str], None]) -> None:
    """Run ``python -m <command>`` in ``processes`` processes on this machine; returns when all have ended.

    Raises:
        TrainError: one failed, or this machine is one of several that train together.
    """
    # torch.distributed.run reads options from PET_* variables; this one means that torchrun must run on each machine.
    nodes = os.environ.get("PET_NNODES", "1")
    if nodes != "1":
        raise TrainError(
            f"PET_NNODES is {nodes}, and this process was not started by torchrun: each machine would train alone. Run "
            f"`torchrun -m {' '.join(command)}` on each of them, or write train.engine: ray"
        )
    options = [f"--nproc-per-node={processes}", "--standalone"]
    _run([sys.executable, "-m", "torch.distributed.run", *options, "-m", *command], on_line)


def _run(torchrun: Sequence[str], on_line: Callable[[str], None]) -> None:
    explained, kills_before, was_killed = "", memory_kills(), False
    with subprocess.Popen(
        torchrun, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            on_line(line.rstrip("\n"))
            was_killed = was_killed or bool(_KILLED.search(line))
            if line.startswith(_EXPLAINED) and not explained:
                explained = line.removeprefix(_EXPLAINED).strip()
    if process.returncode and was_killed and not explained:
        raise TrainError(f"a process of the training was ended by SIGKILL: {why_killed(kills_before)}")
    if process.returncode:
        raise TrainError(
            explained or f"torchrun ended with exit code {process.returncode}; its output above says which process"
        )
