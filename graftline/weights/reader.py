"""Read a model folder one tensor at a time.

Bytes are read, not memory-mapped: mapped pages count as the process's memory, and a file that is truncated under a map
kills the process with SIGBUS.
"""

import json
import math
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from graftline.errors import CheckpointError

# safetensors' format (https://github.com/huggingface/safetensors#format): 8 bytes N (little-endian), N bytes of JSON
# that map each tensor's name to ``{"dtype", "shape", "data_offsets": [begin, end]}``, then the data. The offsets count
# from the end of the header and cover the data without gaps or overlaps. Files are not trusted, so this is checked.

# As in the reference implementation: a longer header is an attack or damage.
_MAX_HEADER_BYTES = 100_000_000

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.float8_e4m3fn: "F8_E4M3"}
"""FP8 is written for other software (`graftline.export.compressed`) and never read back."""
_SMALL_FLOATS = ("F8_", "F6_", "F4")


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor's type, shape and place. ``offset`` is in bytes from the start of ``file``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    num_bytes: int

    @property
    def dtype_name(self) -> str:
        """The dtype as safetensors spells it, for example ``BF16``."""
        return DTYPE_NAMES[self.dtype]


def read_header(file: Path) -> list[TensorInfo]:
    """Tensors of a safetensors file, in the order of their bytes.

    Raises:
        CheckpointError: the file is missing, truncated or too long, or its header is wrong.
    """
    header, data_offset, num_data_bytes = _read_json(file)
    header.pop("__metadata__", None)
    tensors = sorted(
        (_tensor(file, name, entry, data_offset) for name, entry in header.items()),
        key=lambda t: (t.offset, t.num_bytes),
    )
    position = data_offset
    for tensor in tensors:
        if tensor.offset != position:
            kind = "overlaps the tensor before it" if tensor.offset < position else "leaves a hole before it"
            raise _bad(file, f"tensor {tensor.name!r} {kind} (starts at byte {tensor.offset}, expected {position})")
        position += tensor.num_bytes
    if position - data_offset != num_data_bytes:
        raise _bad(
            file, f"its header describes {position - data_offset} bytes of data, the file holds {num_data_bytes}"
        )
    return tensors


def _read_json(file: Path) -> tuple[dict[str, Any], int, int]:
    """The header as a JSON object, the offset of the data, and its number of bytes."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise _bad(file, f"it holds {size} bytes, a safetensors file has at least 8")
            (num_header_bytes,) = struct.unpack("<Q", prefix)
            if num_header_bytes > min(size - 8, _MAX_HEADER_BYTES):
                raise _bad(file, f"its header claims {num_header_bytes} bytes, {size - 8} are there")
            raw = stream.read(num_header_bytes)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {file}: {error.strerror or error}; a safetensors file was expected there"
        ) from error
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _bad(file, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _bad(file, "its header is not a JSON object")
    return header, 8 + num_header_bytes, size - 8 - num_header_bytes


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, refusing a name that occurs twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _tensor(file: Path, name: str, entry: Any, data_offset: int) -> TensorInfo:
    """One entry of the header, every field checked."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _bad(file, f"the entry of tensor {name!r} does not have exactly dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if isinstance(entry["dtype"], str) and entry["dtype"].startswith(_SMALL_FLOATS):
        raise CheckpointError(
            f"{file} stores tensor {name!r} as {entry['dtype']}, the number type of a quantized model; take the model "
            "that it was made from, in 16 or 32 bits"
        )
    if dtype is None:
        raise _bad(file, f"tensor {name!r} has dtype {entry['dtype']!r}; known are {', '.join(DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise _bad(
            file,
            f"tensor {name!r} has shape {shape!r} and data_offsets {offsets!r}; whole numbers from 0 up were expected",
        )
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise _bad(file, f"tensor {name!r} of shape {shape} and dtype {entry['dtype']} has {end - begin} bytes")
    return TensorInfo(name, dtype, tuple(shape), file, data_offset + begin, end - begin)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _bad(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{file} is not a valid safetensors file: {reason}; fetch or write it again")


SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class CheckpointReader:
    """A model folder as it is stored: ``model.safetensors``, or shards and ``model.safetensors.index.json``.

    All headers are checked first; tensors are read on request. The index names the shards, and the shards their
    tensors. `graftline.weights.model_folder` knows the model's names for them, and which ones must be there.

    Raises:
        CheckpointError: no weights, weights only as pickle files (never loaded: they can run code), a missing or
            damaged shard, or a tensor in two shards.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.absent: dict[str, str] = {}
        """Tensors that the index names but no shard holds, with their shard: a tied head, or damage."""
        # If both exist, transformers reads the single file.
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
        """Dtype, shape and place of a tensor; CheckpointError if there is none of that name."""
        if name not in self._tensors:
            raise CheckpointError(f"{self.folder} has no tensor {name!r}; it holds {len(self._tensors)} others")
        return self._tensors[name]

    def read(self, name: str) -> Tensor:
        """Read a tensor (on the CPU, in its stored dtype and shape)."""
        return read_tensor(self.info(name))

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read the rows from ``start`` to ``stop`` of a tensor, as `read`; nothing else of it is in memory."""
        info = self.info(name)
        row = info.num_bytes // max(1, info.shape[0])
        shape = (stop - start, *info.shape[1:])
        return read_tensor(replace(info, shape=shape, offset=info.offset + start * row, num_bytes=(stop - start) * row))

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
    """A JSON object from a file of a model folder; CheckpointError if it is missing, not JSON or not an object."""
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
    """The shard of each tensor; the shards' names are checked."""
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
    """Tensors of all shards; a tensor in two shards is taken from the one that the index names."""
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


_LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Architecture:
    """Names inside a causal language model class of transformers, to tell linear layers from embeddings and norms.

    linears: last components of the linear layers inside the blocks. blocks: path of the list of blocks.
    conv1d: the linears are transformers' Conv1D, whose weight is stored (in, out). scales_embedding: embeddings are
    multiplied by a factor that is not in the table. stored_head: the head's name in files, where the class has another.
    buffers: parts of the names of tensors in old files that the class
    computes from its configuration (rotary frequencies, causal masks). renamed: parts of names in files, with their
    name here; experts are called as in Qwen3-MoE. experts: how files
    hold them, a matrix each or all in one tensor; empty: there are none.
    """

    name: str
    linears: tuple[str, ...]
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    conv1d: bool = False
    scales_embedding: bool = False
    stored_head: str = ""
    buffers: tuple[str, ...] = (".rotary_emb.",)
    renamed: tuple[tuple[str, str], ...] = ()
    experts: Literal["", "each", "whole"] = ""

    @property
    def root(self) -> str:
        """Name of the part with everything but the head: ``model`` or ``transformer``."""
        return self.blocks.partition(".")[0]

    def is_buffer(self, name: str) -> bool:
        """Whether a stored tensor is one that the class computes."""
        return any(part in f".{name}." for part in self.buffers)

    def name_of(self, stored: str) -> str:
        """The class's name of a tensor in a file."""
        first, _, rest = _replace(stored, self.renamed).partition(".")
        return f"{self.head if self.stored_head and first == self.stored_head else first}.{rest}"

    def stored_name(self, name: str) -> str:
        """The name in files, which other software reads, of one of the class's tensors."""
        first, _, rest = _replace(name, [(ours, stored) for stored, ours in self.renamed]).partition(".")
        return f"{self.stored_head if self.stored_head and first == self.head else first}.{rest}"

    def block_of(self, name: str) -> int | None:
        """Number of the block that a tensor or module belongs to; None outside the blocks."""
        match = re.match(re.escape(self.blocks) + r"\.(\d+)\.", name)
        return int(match.group(1)) if match else None

    def is_linear_weight(self, name: str) -> bool:
        """Whether a tensor is the weight of a linear layer inside a block (the head and embeddings are not)."""
        return self.block_of(name) is not None and name.endswith(tuple(f".{linear}.weight" for linear in self.linears))


def _replace(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    name += "$"  # the end, for parts that are only meant there
    for part, other in pairs:
        name = name.replace(part, other)
    return name.removesuffix("$")


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_WHOLE_STACKS = tuple((f".experts.{name}$", f".experts.{name}.weight$") for name in ("gate_up_proj", "down_proj"))

ARCHITECTURES = {
    arch.name: arch
    for arch in (
        Architecture("LlamaForCausalLM", _LLAMA_LINEARS),
        Architecture("MistralForCausalLM", _LLAMA_LINEARS),
        Architecture("Qwen2ForCausalLM", _LLAMA_LINEARS),
        Architecture("Qwen3ForCausalLM", _LLAMA_LINEARS),
        Architecture("GemmaForCausalLM", _LLAMA_LINEARS, scales_embedding=True),
        Architecture("Gemma2ForCausalLM", _LLAMA_LINEARS, scales_embedding=True),
        Architecture("Gemma3ForCausalLM", _LLAMA_LINEARS, scales_embedding=True),
        Architecture("SmolLM3ForCausalLM", _LLAMA_LINEARS),
        Architecture("Olmo2ForCausalLM", _LLAMA_LINEARS),
        Architecture("GraniteForCausalLM", _LLAMA_LINEARS),
        Architecture(
            "MixtralForCausalLM",
            _LLAMA_LINEARS,
            renamed=(
                (".block_sparse_moe.", ".mlp."),
                (".w1.", ".gate_proj."),
                (".w2.", ".down_proj."),
                (".w3.", ".up_proj."),
            ),
            experts="each",
        ),
        Architecture("Qwen3MoeForCausalLM", _LLAMA_LINEARS, experts="each"),
        # Its experts stay dense in a quantized base.
        Architecture("GptOssForCausalLM", _ATTENTION, renamed=_WHOLE_STACKS, experts="whole"),
        Architecture("Phi3ForCausalLM", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
        Architecture(
            "GPTNeoXForCausalLM",
            ("query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h"),
            "gpt_neox.layers",
            "gpt_neox.embed_in",
            stored_head="embed_out",
            buffers=(".attention.bias.", ".attention.masked_bias.", ".rotary_emb."),
        ),
        Architecture(
            "GPT2LMHeadModel",
            ("c_attn", "c_proj", "c_fc"),
            "transformer.h",
            "transformer.wte",
            conv1d=True,
            buffers=(".attn.bias.", ".attn.masked_bias."),
        ),
    )
}


def read_architecture(folder: Path) -> Architecture:
    """The architecture that a folder's config.json names.

    If it names none, or the model without its head, it is the causal language model of its ``model_type``, as in
    transformers.

    Raises:
        CheckpointError: no config.json, or it does not name exactly one supported architecture.
    """
    config = read_json_object(folder / "config.json")
    given, kind = config.get("architectures"), config.get("model_type")
    if isinstance(kind, str) and (not given or given == [MODEL_MAPPING_NAMES.get(kind)]):
        given = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)]
    if not isinstance(given, list) or len(given) != 1 or given[0] not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise CheckpointError(
            f"{folder / 'config.json'} names the architectures {given!r}; exactly one of {known} was expected"
        )
    return ARCHITECTURES[given[0]]
