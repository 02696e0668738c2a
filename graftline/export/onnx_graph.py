"""The universal serving graph of a base model, built straight from its checkpoint tensors.

One graph serves every adapter: each linear computes

    y = (x Wᵀ + (x A) B) ⊙ g + b            A (I, 0…R), B (R, O), g (O,): graph inputs, by default rank 0 and ones

and each sublayer output h becomes, before its residual is added,

    h + f(h D + b_D) U + b_U                D (H, 0…M), U (M, H): graph inputs, by default width 0; f = SiLU or ReLU

so LoRA, rsLoRA, PiSSA (rank 2R), VeRA, DoRA (g = m / ‖W + s·B·A‖) and serial bottlenecks run on it (DESIGN.md §5).
Attention is ONNX Runtime's GroupQueryAttention: rotary embedding inside, sequences of different length in one batch,
and keys and values written in place where input and output cache are the same buffer.

Inputs: ``input_ids`` (B, T) padded on the right; ``last_position`` (B,), length so far − 1; ``total_length`` (), the
longest; ``logits_rows`` (N,), which of the B·T positions to compute logits for; ``past.*``. Outputs: ``logits`` (N, V),
``present.*``.

Dimensions: B = batch, T = tokens, H = hidden size, I = input features, O = output features, V = vocabulary, R = rank,
M = bottleneck width, P = cache capacity, N = rows of logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import IO, Any, Protocol, cast

import numpy as np
import onnx
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from graftline import logs
from graftline.errors import ExportError
from graftline.export.onnx_session import RELU_SWITCH, BottleneckSlot, FusedLinear, GraphLayout
from graftline.logs import OnProgress, silent
from graftline.weights.cast import cast as cast_tensor

MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's contributed operators."""
_PAGE_BYTES = 4096
_OPSET, _IR_VERSION = 21, 10

Dim = int | str


class GraphBuilder:
    """An ONNX graph under construction, whose large weights are streamed to one external file.

    Memory holds one weight at a time. Each starts on a page, so that the runtime can map it. Names are never random, so
    the same checkpoint gives the same bytes.
    """

    def __init__(self, weights: IO[bytes], location: str) -> None:
        self._weights, self._location = weights, location
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._count = 0

    def node(
        self,
        operator: str,
        inputs: Sequence[str],
        *,
        outputs: Sequence[str] = (),
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Add a node; returns its first output, named here unless ``outputs`` are given."""
        self._count += 1
        names = list(outputs) or [f"{operator}_{self._count}"]
        self._nodes.append(
            helper.make_node(operator, list(inputs), names, f"n{self._count}_{operator}", domain=domain, **attributes)
        )
        return names[0]

    def weight(self, name: str, array: np.ndarray) -> str:
        """Add a constant, whose bytes go to the external file."""
        array = np.ascontiguousarray(array)
        self._weights.write(b"\0" * (-self._weights.tell() % _PAGE_BYTES))
        tensor = TensorProto(name=name, dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(array.dtype))
        tensor.data_location = TensorProto.EXTERNAL
        place = {"location": self._location, "offset": self._weights.tell(), "length": array.nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        self._weights.write(array.data)
        self._initializers.append(tensor)
        return name

    def constant(self, name: str, array: np.ndarray) -> str:
        """Add a small constant inside the graph."""
        self._initializers.append(numpy_helper.from_array(array, name))
        return name

    def input(self, name: str, dtype: int, shape: Sequence[Dim]) -> str:
        """Add a required graph input."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def optional_input(self, name: str, default: np.ndarray, shape: Sequence[Dim]) -> str:
        """Add a graph input with a default value (an initializer of the same name)."""
        self.constant(name, default)
        return self.input(name, helper.np_dtype_to_tensor_dtype(default.dtype), shape)

    def output(self, name: str, dtype: int, shape: Sequence[Dim]) -> None:
        """Declare a graph output."""
        self._outputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))

    def model(self, name: str) -> onnx.ModelProto:
        """The finished model; its weights are those written to the external file."""
        graph = helper.make_graph(self._nodes, name, self._inputs, self._outputs, self._initializers)
        opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="graftline")


SUPPORTED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")
_SILU = ("silu", "swish")  # two names of one function
_HEAD_SIZE_STEP = 16
"""GroupQueryAttention with rotary embedding (onnxruntime 1.31) refuses other sizes, but only at the first step."""
_INT4_BLOCK = 32
_INT8_ACTIVATIONS = 4
"""MatMulNBits' accuracy level: activations are rounded to int8 in the product. With fp32 activations (level 1) a token
took 434 ms instead of 20 on one core, at the same error, because the weights' rounding dominates."""
_SHARED_INPUTS = ("last_position", "total_length", "rope_cos", "rope_sin")


class TensorSource(Protocol):
    """Reads weights one at a time."""

    def names(self) -> list[str]:
        """Names of all tensors."""

    def read(self, name: str) -> Tensor:
        """The dense tensor."""


def plan_linears(config: PreTrainedConfig) -> tuple[FusedLinear, ...]:
    """The graph's matrices in the order of a forward pass, five a block."""
    head_dim = head_dim_of(config)
    num_q, num_kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    linears = []
    for layer in range(config.num_hidden_layers):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        qkv = tuple(f"{attention}.{part}_proj" for part in ("q", "k", "v"))
        linears += [
            FusedLinear(f"layers.{layer}.qkv", hidden, qkv, (num_q, num_kv, num_kv)),
            FusedLinear(f"layers.{layer}.o", num_q, (f"{attention}.o_proj",), (hidden,)),
            FusedLinear(f"layers.{layer}.gate", hidden, (f"{mlp}.gate_proj",), (inner,)),
            FusedLinear(f"layers.{layer}.up", hidden, (f"{mlp}.up_proj",), (inner,)),
            FusedLinear(f"layers.{layer}.down", inner, (f"{mlp}.down_proj",), (hidden,)),
        ]
    return tuple(linears)


def plan_bottlenecks(config: PreTrainedConfig) -> tuple[BottleneckSlot, ...]:
    """Two slots a block: after attention's output projection and after the feed-forward's."""
    return tuple(
        BottleneckSlot(f"layers.{layer}.{name}_bottleneck", f"model.layers.{layer}.{module}")
        for layer in range(config.num_hidden_layers)
        for name, module in (("attention", "self_attn.o_proj"), ("feed_forward", "mlp.down_proj"))
    )


def head_dim_of(config: PreTrainedConfig) -> int:
    """Width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def architecture_of(config: PreTrainedConfig) -> str:
    """Name of the model class that a config is for."""
    return (config.architectures or ["unknown"])[0]


def check_supported(config: PreTrainedConfig) -> None:
    """Refuse models that the graph would compute wrongly, or ONNX Runtime not at all.

    Raises:
        ExportError: another architecture, activation or head size, sliding windows, or a rotary embedding that depends
            on the length or covers a part of each head. Every reason is named.
    """
    architecture = architecture_of(config)
    if architecture not in SUPPORTED:
        raise ExportError(f"no serving graph for {architecture}; supported are {', '.join(SUPPORTED)}")
    reasons = []
    if config.hidden_act not in _SILU:
        reasons.append(f"the activation {config.hidden_act!r}; {' or '.join(_SILU)} is supported")
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        reasons.append(f"sliding window attention ({config.sliding_window} tokens)")
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") not in _FIXED_ROPE:
        reasons.append(f"rope_type {rope['rope_type']!r}; supported are {', '.join(_FIXED_ROPE)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        reasons.append(
            f"rotary embedding of a part of each head (partial_rotary_factor {rope['partial_rotary_factor']})"
        )
    if head_dim_of(config) % _HEAD_SIZE_STEP:
        reasons.append(
            f"heads of size {head_dim_of(config)}; ONNX Runtime's attention takes multiples of {_HEAD_SIZE_STEP}"
        )
    if reasons:
        raise ExportError(
            f"no serving graph for {'; nor for '.join(reasons)}; serve this base with vLLM (graftline serve "
            "--print-vllm), or with transformers"
        )


@dataclass(frozen=True)
class GraphWriter:
    """Adds a model to a graph under construction."""

    graph: GraphBuilder
    source: TensorSource
    config: PreTrainedConfig
    layout: GraphLayout

    def write(self, on_progress: OnProgress = silent) -> ModelProto:
        """The whole model: embedding, blocks, final norm, head."""
        graph, num_layers = self.graph, self.layout.num_layers
        self._add_shared()
        embedding = graph.weight("embedding", self._read("model.embed_tokens.weight"))
        stream = graph.node("Reshape", [graph.node("Gather", [embedding, "input_ids"]), "rows_shape"])
        normed = self._norm(stream, "model.layers.0.input_layernorm.weight")
        for layer in range(num_layers):
            stream, normed = self._add_block(layer, stream, normed)
            on_progress(layer + 1, num_layers)
        chosen = graph.node("Gather", [normed, graph.input("logits_rows", TensorProto.INT64, ["N"])])
        self._add_head(chosen, embedding)
        graph.output("logits", self._onnx_dtype, ["N", self.layout.vocab_size])
        return graph.model("graftline serving graph")

    @cached_property
    def _stored(self) -> frozenset[str]:
        return frozenset(self.source.names())

    @property
    def _dtype(self) -> np.dtype[Any]:
        return np.dtype(self.layout.numpy_dtype)

    @property
    def _onnx_dtype(self) -> int:
        return helper.np_dtype_to_tensor_dtype(self._dtype)

    def _read(self, name: str) -> np.ndarray:
        return cast_tensor(self.source.read(name), self.layout.dtype, name).numpy()

    def _integers(self, name: str, values: Sequence[int]) -> str:
        return self.graph.constant(name, np.array(values, np.int64))

    def _add_shared(self) -> None:
        """Inputs and constants that all blocks use."""
        graph, layout = self.graph, self.layout
        graph.input("input_ids", TensorProto.INT64, ["B", "T"])
        graph.input("last_position", TensorProto.INT32, ["B"])
        graph.input("total_length", TensorProto.INT32, [])
        self._integers("rows_shape", [-1, layout.hidden_size])
        self._integers("attended_shape", [-1, layout.linears[1].in_features])
        for name, table in zip(("rope_cos", "rope_sin"), self._rope_tables(), strict=True):
            graph.weight(name, table)
        switch = graph.optional_input(RELU_SWITCH, np.zeros(1, np.float32), [1])
        graph.node("Greater", [switch, graph.constant("half", np.array([0.5], np.float32))], outputs=["use_relu"])
        # (B, T, width of q, k and v), from the shape of input_ids
        qkv_width = self._integers("qkv_width", [sum(layout.linears[0].out_features)])
        graph.node("Concat", [graph.node("Shape", ["input_ids"]), qkv_width], outputs=["qkv_shape"], axis=0)

    def _rope_tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Cosine and sine (positions, head_dim / 2), from transformers' own frequencies for this config."""
        rope = LlamaRotaryEmbedding(cast("LlamaConfig", self.config))  # it reads what all supported configs have
        angles = torch.outer(torch.arange(self.layout.max_positions).float(), rope.inv_freq.float())
        scale = float(rope.attention_scaling)
        return (angles.cos() * scale).numpy().astype(self._dtype), (angles.sin() * scale).numpy().astype(self._dtype)

    def _add_block(self, layer: int, stream: str, normed: str) -> tuple[str, str]:
        """One block; returns the residual stream and its norm for the next block (or the head)."""
        qkv, o, gate, up, down = self.layout.linears[5 * layer : 5 * layer + 5]
        after_attention, after_feed_forward = self.layout.bottlenecks[2 * layer : 2 * layer + 2]
        h = self._linear(o, self._attention(layer, self._linear(qkv, normed)))
        h, bias = self._bottleneck(after_attention, h)
        stream, normed = self._add_and_norm(stream, h, bias, f"model.layers.{layer}.post_attention_layernorm.weight")
        gated = self.graph.node("Mul", [self._silu(self._linear(gate, normed)), self._linear(up, normed)])
        h, bias = self._bottleneck(after_feed_forward, self._linear(down, gated))
        is_last = layer + 1 == self.layout.num_layers
        following = "model.norm.weight" if is_last else f"model.layers.{layer + 1}.input_layernorm.weight"
        return self._add_and_norm(stream, h, bias, following)

    def _linear(self, linear: FusedLinear, x: str) -> str:
        """(x Wᵀ + (x A) B) ⊙ g + b over rows x (·, I)."""
        graph, name, width = self.graph, linear.name, sum(linear.out_features)
        weight_OI = np.concatenate([self._read(f"{module}.weight") for module in linear.modules])
        if weight_OI.shape != (width, linear.in_features):
            raise ExportError(
                f"{linear.modules} have weights {weight_OI.shape}, expected {(width, linear.in_features)}"
            )
        y = self._product(f"{name}.weight", x, weight_OI, bits=4)
        A = graph.optional_input(f"{name}.A", np.zeros((linear.in_features, 0), self._dtype), [linear.in_features, "R"])
        B = graph.optional_input(f"{name}.B", np.zeros((0, width), self._dtype), ["R", width])
        g = graph.optional_input(f"{name}.g", np.ones(width, self._dtype), [width])
        y = graph.node("Mul", [graph.node("Gemm", [graph.node("MatMul", [x, A]), B, y]), g])
        bias_O = self._fused_bias(linear)
        return y if bias_O is None else graph.node("Add", [y, graph.weight(f"{name}.bias", bias_O)])

    def _fused_bias(self, linear: FusedLinear) -> np.ndarray | None:
        names = [f"{module}.bias" for module in linear.modules]
        if self._stored.isdisjoint(names):
            return None
        sizes = zip(names, linear.out_features, strict=True)
        parts = [self._read(name) if name in self._stored else np.zeros(size, self._dtype) for name, size in sizes]
        return np.concatenate(parts)

    def _product(self, name: str, x: str, weight_OI: np.ndarray, *, bits: int) -> str:
        """X Wᵀ; at int4 with W in blocks of 32 along I, by ONNX Runtime's own quantizer."""
        if self.layout.precision != "int4":
            return self.graph.node("MatMul", [x, self.graph.weight(name, weight_OI.T)])
        num_outputs, num_inputs = weight_OI.shape
        with logs.untouched():  # importing it configures the root logger
            from onnxruntime.quantization.matmul_nbits_quantizer import (
                DefaultWeightOnlyQuantConfig,
                DefaultWeightOnlyQuantizer,
            )
        settings = DefaultWeightOnlyQuantConfig(block_size=_INT4_BLOCK, is_symmetric=True, bits=bits)
        codes, scales, _ = DefaultWeightOnlyQuantizer(settings).qbits_block_quant(np.ascontiguousarray(weight_OI.T))
        scales = scales.reshape(num_outputs, -1)
        return self.graph.node(
            "MatMulNBits",
            [x, self.graph.weight(f"{name}.codes", codes), self.graph.weight(f"{name}.scales", scales)],
            domain=MICROSOFT,
            K=num_inputs,
            N=num_outputs,
            bits=bits,
            block_size=_INT4_BLOCK,
            accuracy_level=_INT8_ACTIVATIONS,
        )

    def _add_head(self, x: str, embedding: str) -> None:
        """Logits. A tied fp32 head is the embedding's own tensor, not a copy; at int4 it gets 8 bits."""
        tied = self.config.tie_word_embeddings
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        if self.layout.precision == "int4":
            logits = self._product("head", x, self._read(name), bits=8)
            self.graph.node("Identity", [logits], outputs=["logits"])
        else:
            head = embedding if tied else self.graph.weight("head", self._read(name))
            self.graph.node("Gemm", [x, head], outputs=["logits"], transB=1)

    def _attention(self, layer: int, qkv: str) -> str:
        """Rotary grouped-query attention over the cache; rows in, rows out."""
        graph, layout = self.graph, self.layout
        cache = [f"past.{layer}.key", f"past.{layer}.value"]
        for name in cache:
            graph.input(name, self._onnx_dtype, ["B", layout.num_kv_heads, "P", layout.head_dim])
        outputs = [f"attended.{layer}", f"present.{layer}.key", f"present.{layer}.value"]
        graph.node(
            "GroupQueryAttention",
            [graph.node("Reshape", [qkv, "qkv_shape"]), "", "", *cache, *_SHARED_INPUTS],
            outputs=outputs,
            domain=MICROSOFT,
            num_heads=self.config.num_attention_heads,
            kv_num_heads=layout.num_kv_heads,
            do_rotary=1,
        )
        for name in outputs[1:]:
            graph.output(name, self._onnx_dtype, ["B", layout.num_kv_heads, "P2", layout.head_dim])
        return graph.node("Reshape", [outputs[0], "attended_shape"])

    def _silu(self, x: str) -> str:
        # QuickGelu(x) = x · sigmoid(alpha · x): SiLU in one operator.
        return self.graph.node("QuickGelu", [x], domain=MICROSOFT, alpha=1.0)

    def _bottleneck(self, slot: BottleneckSlot, h: str) -> tuple[str, str]:
        """H + f(h D + b_D) U over rows h (·, H), and b_U, which the next operator adds."""
        graph, name, hidden = self.graph, slot.name, self.layout.hidden_size
        D = graph.optional_input(f"{name}.D", np.zeros((hidden, 0), self._dtype), [hidden, "M"])
        D_bias = graph.optional_input(f"{name}.D_bias", np.zeros(0, self._dtype), ["M"])
        U = graph.optional_input(f"{name}.U", np.zeros((0, hidden), self._dtype), ["M", hidden])
        U_bias = graph.optional_input(f"{name}.U_bias", np.zeros(hidden, self._dtype), [hidden])
        z = graph.node("Gemm", [h, D, D_bias])
        f = graph.node("Where", ["use_relu", graph.node("Relu", [z]), self._silu(z)])
        return graph.node("Gemm", [f, U, h]), U_bias

    def _norm(self, x: str, weight: str) -> str:
        scale = self.graph.weight(weight, self._read(weight))
        epsilon = self.config.rms_norm_eps
        return self.graph.node("SimplifiedLayerNormalization", [x, scale], axis=-1, epsilon=epsilon, stash_type=1)

    def _add_and_norm(self, stream: str, h: str, bias: str, weight: str) -> tuple[str, str]:
        """Stream + h + bias, and its RMS norm, in one operator."""
        scale = self.graph.weight(weight, self._read(weight))
        normed, total = f"{weight}.normed", f"{weight}.stream"
        self.graph.node(
            "SkipSimplifiedLayerNormalization",
            [stream, h, scale, bias],
            outputs=[normed, "", "", total],
            domain=MICROSOFT,
            epsilon=self.config.rms_norm_eps,
        )
        return total, normed
