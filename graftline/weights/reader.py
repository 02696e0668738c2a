"""Read a model folder one tensor at a time.

Bytes are read, not mapped: pages of a map count as the process's memory until the kernel takes them back, and a file
cut short under a map ends the process with SIGBUS. So the memory of a streamed job is what its tensors take.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftline.errors import CheckpointError
from graftline.weights.header import TensorInfo, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class CheckpointReader:
    """A model folder as it is stored: ``model.safetensors``, or shards and ``model.safetensors.index.json``.

    Every header is checked when the reader is made; tensors are read when they are asked for. The index says which
    shards there are; which tensors there are the shards say themselves. `graftline.weights.model_reader` gives them the
    model's own names and knows which must be there.

    Raises:
        CheckpointError: no weights, weights only as pickle files (never loaded: they can run code), a shard that is
            missing or damaged, a tensor in two shards.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.absent: dict[str, str] = {}
        """Tensors that the index names and no shard holds, by name the shard: a head that is tied, or damage."""
        # Where both are there transformers reads the single file.
        if (folder / SINGLE_FILE).is_file():
            tensors = {tensor.name: tensor for tensor in read_header(folder / SINGLE_FILE)}
        elif (folder / INDEX_FILE).is_file():
            weight_map = _read_index(folder)
            tensors = _read_shards(folder, weight_map)
            self.absent = {name: shard for name, shard in weight_map.items() if name not in tensors}
        else:
            raise _no_weights(folder)
        self._tensors = tensors

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor.

        Raises:
            CheckpointError: the folder has no tensor of that name.
        """
        if name not in self._tensors:
            raise CheckpointError(f"{self.folder} has no tensor {name!r}; it holds {len(self._tensors)} others")
        return self._tensors[name]

    def read(self, name: str) -> Tensor:
        """Read one tensor into memory of its own (CPU, stored dtype and shape)."""
        return read_tensor(self.info(name))

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self._tensors.values())

    @property
    def largest_bytes(self) -> int:
        """Bytes of the largest tensor."""
        return max((tensor.num_bytes for tensor in self._tensors.values()), default=0)


def read_tensor(info: TensorInfo) -> Tensor:
    """Read the tensor that an entry of a header describes."""
    raw = torch.empty(info.num_bytes, dtype=torch.uint8)
    try:
        with info.file.open("rb", buffering=0) as stream:
            stream.seek(info.offset)
            _fill(raw.numpy().data, stream, info)
    except OSError as error:
        raise CheckpointError(f"cannot read {info.name!r} from {info.file}: {error.strerror or error}") from error
    return raw.view(info.dtype).reshape(info.shape) if info.num_bytes else torch.empty(info.shape, dtype=info.dtype)


def read_json_object(file: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder.

    Raises:
        CheckpointError: the file is missing, not JSON or not an object.
    """
    try:
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}; a model folder has this file") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON ({error}); fetch the model folder again") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{file} holds {type(value).__name__}, a JSON object was expected; fetch the model folder again"
        )
    return value


def _read_index(folder: Path) -> dict[str, str]:
    """The shard of each tensor, every shard's name checked."""
    index_file = folder / INDEX_FILE
    weight_map = read_json_object(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(
            f"{index_file} has no weight_map from tensor names to file names; fetch the model folder again"
        )
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index_file} names the shard {shard!r}; the name of a .safetensors file beside it was expected"
            )
        if not (folder / shard).is_file():
            raise CheckpointError(
                f"{folder} lacks the shard {shard} that {INDEX_FILE} names; fetch the model folder again"
            )
    return weight_map


def _read_shards(folder: Path, weight_map: dict[str, str]) -> dict[str, TensorInfo]:
    """Tensors of all shards; of one that two shards hold, that in the shard which the index names."""
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        for tensor in read_header(folder / shard):
            if weight_map.get(tensor.name, shard) != shard and tensor.name in tensors:
                continue
            before = tensors.get(tensor.name)
            if before is not None and weight_map.get(tensor.name) != shard:
                raise CheckpointError(
                    f"{folder} holds {tensor.name!r} in {before.file.name} and in {shard}, and {INDEX_FILE} does not "
                    "say which counts; fetch the model folder again"
                )
            tensors[tensor.name] = tensor
    return tensors


def _fill(buffer: memoryview, stream: Any, info: TensorInfo) -> None:
    done = 0
    while done < len(buffer):
        count = stream.readinto(buffer[done:])
        if not count:
            raise CheckpointError(
                f"{info.file} ended inside tensor {info.name!r}: it was cut short while it was read; fetch it again"
            )
        done += count


def _no_weights(folder: Path) -> CheckpointError:
    if not folder.is_dir():
        return CheckpointError(
            f"{folder} is not a folder; a model folder with {SINGLE_FILE} or {INDEX_FILE} was expected"
        )
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        return CheckpointError(
            f"{folder} holds its weights only as {pickles[0]}: pickle files can run code and are never loaded; "
            "convert them to safetensors where you trust them (save_pretrained writes it)"
        )
    return CheckpointError(
        f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; a model folder in safetensors format was expected"
    )
