"""Run the universal serving graph: steps over a key-value cache that is updated in place.

Input and output cache are bound to the same buffer, so a step writes the new keys and values and copies none of the old
ones. ``run_with_iobinding`` ignores ``RunOptions.add_active_adapter`` (onnxruntime 1.31 warns), so an adapter's tensors
are bound as graph inputs.

On CUDA torch and ONNX Runtime share one stream, the session's, so that what torch writes is ordered before what the
graph reads. A session that would compute a part on the CPU is refused.

Dimensions: B = batch, T = tokens of this step, P = cache capacity in tokens, N = rows of logits, V = vocabulary.
"""

import contextlib
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor

from graftline.digest import Digest, write_json
from graftline.errors import ExportError
from graftline.limits import cpu_quota, usable_cores
from graftline.weights.reader import read_json_object

# The graph's interface, ``graph.json`` beside ``model.onnx``: its inputs, and where an adapter's tensors go.
#
# q, k and v read the same activations and are one matrix in the graph. Adapters of rank r on each are exactly one of
# rank Σr on the fused matrix:
#
#     x [Wqᵀ | Wkᵀ | Wvᵀ] + (x [Aq | Ak | Av]) · blockdiag(Bq, Bk, Bv)
#
# so the graph runs fewer and larger products and still takes any mixture of ranks. Gate and up are not fused: half of
# their wide blockdiag would be zeros, which would cost more than the product that it saves.
#
# Dimensions: I = input features, O = output features, R = rank, H = hidden size, M = bottleneck width.

GRAPH_FILE, WEIGHTS_FILE, LAYOUT_FILE = "model.onnx", "model.onnx.data", "graph.json"
FORMAT = 3

Precision = Literal["fp32", "fp16", "bf16", "int4"]
"""Type of the weights and activations. int4: weights in 4 bits (the head in 8), everything else fp32. ONNX Runtime
computes bf16 on CUDA only."""
_NUMBERS: dict[Precision, tuple[torch.dtype, int]] = {
    "fp32": (torch.float32, TensorProto.FLOAT),
    "fp16": (torch.float16, TensorProto.FLOAT16),
    "bf16": (torch.bfloat16, TensorProto.BFLOAT16),
    "int4": (torch.float32, TensorProto.FLOAT),
}

RELU_SWITCH = "bottleneck.relu"
"""Graph input of shape (1,): above 0.5 bottlenecks use ReLU, otherwise SiLU (swish)."""


HIDDEN_ROWS = "hidden_rows"
"""Graph input (Y,): of which of the B·T positions the last hidden state and the classes are wanted; by default none."""
HEAD_INPUT = "score.weight"
"""Graph input (H, L): an adapter's head for classes; by default without classes."""


@dataclass(frozen=True)
class FusedLinear:
    """Linear layers that are one matrix in the graph, side by side in this order."""

    name: str
    """Prefix of the graph inputs ``<name>.A`` (I, R), ``<name>.B`` (R, O) and ``<name>.g`` (O,)."""
    in_features: int
    modules: tuple[str, ...]
    out_features: tuple[int, ...]


@dataclass(frozen=True)
class BottleneckSlot:
    """A place for a serial bottleneck: after a sublayer, before its residual is added."""

    name: str
    """Prefix of the inputs ``<name>.D`` (H, M), ``<name>.D_bias`` (M,), ``<name>.U`` (M, H), ``<name>.U_bias`` (H,)."""
    module: str
    """Path of the sublayer's last module, whose output the bottleneck reads."""


@dataclass(frozen=True)
class GraphLayout:
    """What an exported graph computes, and its inputs."""

    base_digest: Digest
    architecture: str
    precision: Precision
    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    linears: tuple[FusedLinear, ...]
    bottlenecks: tuple[BottleneckSlot, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Number type of activations, keys, values, logits and an adapter's inputs."""
        return _NUMBERS[self.precision][0]

    @property
    def onnx_type(self) -> int:
        """`dtype` in ONNX."""
        return _NUMBERS[self.precision][1]

    @property
    def numpy_dtype(self) -> "np.dtype[Any]":
        """`dtype` in numpy, which has bfloat16 by an extension."""
        return helper.tensor_dtype_to_np_dtype(self.onnx_type)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the key-value cache for one token of one sequence."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def past_names(self) -> list[str]:
        """Graph inputs of the key-value cache, each (batch, kv heads, capacity, head_dim)."""
        return [f"past.{layer}.{part}" for layer in range(self.num_layers) for part in ("key", "value")]

    def present_names(self) -> list[str]:
        """Graph outputs of the key-value cache, in the order of `past_names`."""
        return [f"present.{layer}.{part}" for layer in range(self.num_layers) for part in ("key", "value")]

    def write(self, folder: Path) -> None:
        """Write ``graph.json``."""
        write_json(folder / LAYOUT_FILE, {"format": FORMAT} | asdict(self) | {"base_digest": str(self.base_digest)})

    @classmethod
    def read(cls, folder: Path) -> "GraphLayout":
        """Read ``graph.json``; ExportError if it is missing, damaged or of another format."""
        file = folder / LAYOUT_FILE
        if not file.is_file():
            raise ExportError(f"{folder} is not an exported graph: {LAYOUT_FILE} is missing; export the base again")
        value = read_json_object(file)
        if value.pop("format", None) != FORMAT:
            raise ExportError(f"{file} is not of format {FORMAT}; export the base again")
        try:
            return cls(**_typed(value))
        except (KeyError, TypeError) as error:
            raise ExportError(f"{file} is damaged ({error}); export the base again") from error


def _typed(value: Mapping[str, Any]) -> dict[str, Any]:
    linears = tuple(
        FusedLinear(one["name"], one["in_features"], tuple(one["modules"]), tuple(one["out_features"]))
        for one in value["linears"]
    )
    slots = tuple(BottleneckSlot(**one) for one in value["bottlenecks"])
    return dict(value) | {
        "base_digest": Digest.parse(value["base_digest"]),
        "linears": linears,
        "bottlenecks": slots,
    }


_QUIET = 3  # errors only: there is a warning for every optional input's default
_MAY_BE_ON_CPU = frozenset({"Shape", "Concat", "Greater", "MemcpyFromHost", "MemcpyToHost"})
"""Operators whose results are a few numbers (a shape, a switch)."""


@dataclass(frozen=True)
class KvCache:
    """Keys and values of B sequences: for each layer a key and a value tensor (B, kv heads, P, head_dim)."""

    tensors: tuple[Tensor, ...]
    stream: torch.cuda.Stream | None = None
    """The stream on which the tensors are used; None on a CPU."""

    @property
    def num_rows(self) -> int:
        """B."""
        return int(self.tensors[0].shape[0])

    @property
    def capacity(self) -> int:
        """P: tokens that each row can hold."""
        return int(self.tensors[0].shape[2])

    def rows(self, start: int, stop: int) -> "KvCache":
        """A view of some rows, which shares their memory."""
        return KvCache(tuple(tensor[start:stop] for tensor in self.tensors), self.stream)

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of row ``source`` to row ``target``."""
        with torch.cuda.stream(self.stream):
            for tensor in self.tensors:
                tensor[target, :, :length] = tensor[source, :, :length]

    def take_row(self, row: int, other: "KvCache", length: int) -> None:
        """Copy the first ``length`` tokens of a row from the same row of another cache."""
        with torch.cuda.stream(self.stream):
            for tensor, source in zip(self.tensors, other.tensors, strict=True):
                tensor[row, :, :length] = source[row, :, :length]


@dataclass(frozen=True)
class Step:
    """Tokens to add to the B sequences of a cache, and where logits are wanted."""

    tokens: Sequence[Sequence[int]]
    """New tokens of each sequence; shorter ones are padded on the right."""
    lengths: Sequence[int]
    """Tokens of each sequence after this step."""
    every_position: bool = False
    """Logits (B, T, V) at every position instead of (B, V) at each sequence's last new token."""

    def rows(self, num_tokens: int) -> np.ndarray:
        """The wanted positions among the B · ``num_tokens`` padded ones."""
        if self.every_position:
            return np.arange(len(self.tokens) * num_tokens)
        new_B = np.array([len(tokens) for tokens in self.tokens])
        last_B: np.ndarray = np.arange(len(new_B)) * num_tokens + new_B - 1
        return last_B


class GraphSession:
    """A loaded graph, from a folder that `graftline.export.onnx_export.export_graph` wrote.

    ``num_threads`` are those of one step (0: the runtime chooses); ``device`` is ``cpu`` or ``cuda``.

    Raises:
        ExportError: the folder holds no graph, ONNX Runtime cannot load it, or a CUDA session would compute a part on
            the CPU.
    """

    def __init__(self, folder: Path, *, num_threads: int = 0, device: str = "cpu") -> None:
        self.layout = GraphLayout.read(folder)
        self.device = device
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _QUIET
        # The runtime counts cores, but does not know a container's CPU quota.
        options.intra_op_num_threads = num_threads or (usable_cores() if cpu_quota() else 0)
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        self.stream = torch.cuda.Stream() if device == "cuda" else None
        self.turn = threading.Lock() if device == "cuda" else contextlib.nullcontext()
        """Held during a step: on one stream, steps of several threads run one after the other anyway."""
        provider, settings = provider_settings(device, self.stream.cuda_stream if self.stream else None)
        try:
            self.session = onnxruntime.InferenceSession(
                str(folder / GRAPH_FILE), options, providers=[(provider, settings)]
            )
        except Exception as error:  # ONNX Runtime's own exceptions have no nearer common root
            raise ExportError(
                f"ONNX Runtime cannot load {folder / GRAPH_FILE}: {error}; export the base again"
            ) from error
        if provider not in self.session.get_providers():
            raise ExportError(
                f"ONNX Runtime has no {provider} here; install onnxruntime-gpu's CUDA libraries or use the CPU"
            )
        if device == "cuda":
            check_placement(self.placement(), precision=self.layout.precision)

    def placement(self) -> list[tuple[str, str, str]]:
        """For each node of the graph: its execution provider, operator and name."""
        parts = self.session.get_provider_graph_assignment_info()
        return [(part.ep_name, node.op_type, node.name) for part in parts for node in part.get_nodes()]

    def new_cache(self, num_rows: int, capacity: int) -> KvCache:
        """An empty cache for ``num_rows`` sequences of at most ``capacity`` tokens."""
        layout = self.layout
        shape = (num_rows, layout.num_kv_heads, capacity, layout.head_dim)
        with torch.cuda.stream(self.stream):
            tensors = (torch.zeros(shape, dtype=layout.dtype, device=self.device) for _ in layout.past_names())
            return KvCache(tuple(tensors), self.stream)

    def runner(self, adapter: Mapping[str, Any] | None = None) -> "Runner":
        """A runner with one adapter, given as OrtValues by graph input (None: the base alone)."""
        return Runner(self, adapter or {})


def provider_settings(device: str, stream: int | None) -> tuple[str, dict[str, str]]:
    """ONNX Runtime's execution provider for a device, and its options; ``stream`` is the address of a CUDA stream."""
    if device == "cpu":
        return "CPUExecutionProvider", {}
    if not stream:
        # The default stream's address is 0, which tells ONNX Runtime to create a stream.
        raise ExportError("a CUDA session needs a stream of its own; the default stream was given")
    return "CUDAExecutionProvider", {"user_compute_stream": str(stream)}


def check_placement(placed: Sequence[tuple[str, str, str]], *, precision: str) -> None:
    """Refuse a CUDA session that would compute a part on the CPU and so copy activations back and forth at each step.

    ``placed`` is `GraphSession.placement`. Raises ExportError, which names the first node that is not on the GPU.
    """
    elsewhere = [node for node in placed if node[0] != "CUDAExecutionProvider" and node[1] not in _MAY_BE_ON_CPU]
    if not elsewhere:
        return
    provider, operator, name = next((node for node in elsewhere if node[1] == "GroupQueryAttention"), elsewhere[0])
    raise ExportError(
        f"ONNX Runtime would compute {len(elsewhere)} of {len(placed)} nodes of the {precision} graph outside the GPU, "
        f"{name} ({operator}) by its {provider}; serve with --precision fp16, which its CUDA attention takes, or with "
        "--device cpu"
    )


class Runner:
    """Runs steps with one adapter on a session. Not thread-safe."""

    def __init__(self, session: GraphSession, adapter: Mapping[str, Any]) -> None:
        self._session, self._layout = session, session.layout
        self._adapter = dict(adapter)  # keeps the buffers alive while they are bound
        self._binding = session.session.io_binding()
        # Weak, so that the cache's owner can free it; the binding holds only its address.
        self._bound: weakref.ref[KvCache] | None = None
        for name, value in self._adapter.items():
            self._binding.bind_ortvalue_input(name, value)

    def step(self, cache: KvCache, step: Step) -> np.ndarray:
        """`step_on_device`, with the logits brought to the CPU."""
        with torch.cuda.stream(self._session.stream):
            return self.step_on_device(cache, step).cpu().numpy()

    def step_on_device(self, cache: KvCache, step: Step) -> Tensor:
        """Add tokens to the sequences of ``cache``; returns fp32 logits, (B, V) or (B, T, V), on the session's device.

        On CUDA they are ready for work on the session's stream; nothing has been waited for.

        The cache's rows are the step's sequences in order. The attention operator takes more than one new token a
        sequence only if the sequences are new or B is 1.
        """
        num_rows, num_tokens = self._bind_tokens(cache, step)
        rows_N = step.rows(num_tokens)
        self._binding.bind_cpu_input("logits_rows", rows_N)
        self._bind_cache(cache)
        with self._session.turn, torch.cuda.stream(self._session.stream):
            logits_NV = self._new_output("logits", len(rows_N), self._layout.vocab_size)
            self._session.session.run_with_iobinding(self._binding)
            shape = (num_rows, num_tokens, -1) if step.every_position else (num_rows, -1)
            return logits_NV.float().reshape(shape)

    def read(self, cache: KvCache, step: Step) -> tuple[np.ndarray, np.ndarray | None]:
        """Last hidden states, and the classes' logits where the adapter has a head, in fp32 on the CPU.

        (B, H) and (B, L) at each sequence's last new token; (B, T, H) and (B, T, L) at every position. The hidden
        states are those after the final norm, which the heads are given. A runner that reads takes no other steps.
        """
        num_rows, num_tokens = self._bind_tokens(cache, step)
        rows_Y = step.rows(num_tokens)
        self._binding.bind_cpu_input("logits_rows", np.zeros(1, np.int64))
        # `bind_cpu_input` does not find inputs that have a default. The binding keeps addresses, not what lies there.
        wanted = onnxruntime.OrtValue.ortvalue_from_numpy(rows_Y)
        self._binding.bind_ortvalue_input(HIDDEN_ROWS, wanted)
        self._bind_cache(cache)
        with self._session.turn, torch.cuda.stream(self._session.stream):
            unread = self._new_output("logits", 1, self._layout.vocab_size)
            hidden_YH = self._new_output("hidden", len(rows_Y), self._layout.hidden_size)
            head = self._adapter.get(HEAD_INPUT)
            classes_YL = None if head is None else self._new_output("classes", len(rows_Y), head.shape()[1])
            self._session.session.run_with_iobinding(self._binding)
            shape = (num_rows, num_tokens, -1) if step.every_position else (num_rows, -1)
            found = (None if each is None else each.float().reshape(shape) for each in (hidden_YH, classes_YL))
            hidden, classes = (None if each is None else each.cpu().numpy() for each in found)
            del unread, wanted
        assert hidden is not None
        return hidden, classes

    def another(self) -> "Runner":
        """A runner with the same adapter, whose tensors it shares, for another thread."""
        return Runner(self._session, self._adapter)

    def _bind_tokens(self, cache: KvCache, step: Step) -> tuple[int, int]:
        num_tokens = max(len(tokens) for tokens in step.tokens)
        if max(step.lengths) > cache.capacity:
            raise ValueError(f"a sequence of {max(step.lengths)} tokens does not fit a cache of {cache.capacity}")
        ids_BT = np.zeros((len(step.tokens), num_tokens), np.int64)
        for row, tokens in enumerate(step.tokens):
            ids_BT[row, : len(tokens)] = tokens
        last_B = np.array(step.lengths, np.int32) - 1
        self._binding.bind_cpu_input("input_ids", ids_BT)
        self._binding.bind_cpu_input("last_position", last_B)
        self._binding.bind_cpu_input("total_length", np.array(max(step.lengths), np.int32))
        return len(step.tokens), num_tokens

    def _bind_cache(self, cache: KvCache) -> None:
        if self._bound_cache is cache:
            return
        names = zip(self._layout.past_names(), self._layout.present_names(), cache.tensors, strict=True)
        for past, present, tensor in names:
            place = (self._session.device, 0, self._layout.onnx_type, list(tensor.shape), tensor.data_ptr())
            self._binding.bind_input(past, *place)
            self._binding.bind_output(present, *place)
        self._bound = weakref.ref(cache)

    @property
    def _bound_cache(self) -> KvCache | None:
        """The cache of the last step, if it still exists."""
        return self._bound() if self._bound is not None else None

    def _new_output(self, name: str, num_rows: int, width: int) -> Tensor:
        layout, device = self._layout, self._session.device
        found = torch.empty((num_rows, width), dtype=layout.dtype, device=device)
        self._binding.bind_output(name, device, 0, layout.onnx_type, list(found.shape), found.data_ptr())
        return found
