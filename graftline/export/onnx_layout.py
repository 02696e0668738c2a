"""What the universal serving graph looks like from outside: its inputs, and where an adapter's tensors go.

Written as ``graph.json`` beside ``model.onnx``; the adapter exporter and the server read it and nothing else.

q, k and v read the same activations and are one matrix in the graph. An adapter of rank r on each is one of rank Σr on
the fused matrix, exactly:

    x [Wqᵀ | Wkᵀ | Wvᵀ] + (x [Aq | Ak | Av]) · blockdiag(Bq, Bk, Bv)

so the graph runs fewer and larger products and still takes any mixture of ranks. Gate and up are not fused: half of
their wide blockdiag would be zeros, which cost an unmerged adapter more than one product more costs everyone.

Dimensions: I = input features, O = output features, R = rank, H = hidden size, M = bottleneck width.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from graftline.digest import Digest, write_json
from graftline.errors import ExportError
from graftline.weights.reader import read_json_object

GRAPH_FILE, WEIGHTS_FILE, LAYOUT_FILE = "model.onnx", "model.onnx.data", "graph.json"
FORMAT = 2

Precision = Literal["fp32", "fp16", "int4"]
"""Type of the weights and activations. int4: weights in 4 bits (the head in 8), everything else fp32."""

RELU_SWITCH = "bottleneck.relu"
"""Graph input of shape (1,): above 0.5, bottlenecks use ReLU; otherwise SiLU (swish)."""


@dataclass(frozen=True)
class FusedLinear:
    """Linear layers of the model that are one matrix in the graph, side by side in this order."""

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
    """One exported graph."""

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
    def kv_bytes_per_token(self) -> int:
        """Memory of the key-value cache, bytes a token and sequence."""
        element_bytes = 2 if self.precision == "fp16" else 4
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * element_bytes

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
        """Read ``graph.json``.

        Raises:
            ExportError: it is missing, damaged or of another format.
        """
        file = folder / LAYOUT_FILE
        if not file.is_file():
            raise ExportError(f"{folder} is no exported graph: {LAYOUT_FILE} is missing; export the base again")
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
