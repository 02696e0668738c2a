"""The universal serving graph of a base model, built straight from its checkpoint tensors.

One graph serves every adapter: each linear computes

    y = (x Wᵀ + (x A) B) ⊙ g + b            A (I, 0…R), B (R, O), g (O,): graph inputs, by default rank 0 and ones

and each sublayer output h becomes, before its residual is added,

    h + f(h D + b_D) U + b_U                D (H, 0…M), U (M, H): graph inputs, by default width 0; f = SiLU or ReLU

so LoRA, rsLoRA, PiSSA (rank 2R), VeRA, DoRA (g = m / ‖W + s·B·A‖) and serial bottlenecks run on it (DESIGN.md §5).
Attention is ONNX Runtime's GroupQueryAttention: rotary embedding inside, sequences of different length in one batch,
and keys and values written in place where input and output cache are the same buffer.

Inputs: ``input_ids`` (B, T) padded on the right; ``last_position`` (B,), length so far − 1; ``total_length`` (), the
longest; ``logits_rows`` (N,), which of the B·T positions to compute logits for; ``past.*``; ``hidden_rows`` (Y,), by
default none, of which positions the last hidden state is wanted; ``score.weight`` (H, L), an adapter's head for
classes, by default without any. Outputs: ``logits`` (N, V), ``present.*``, ``hidden`` (Y, H), ``classes`` (Y, L).

Dimensions: B = batch, T = tokens, H = hidden size, I = input features, O = output features, V = vocabulary, R = rank,
M = bottleneck width, P = cache capacity, N = rows of logits, Y = rows of hidden states, L = classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, cast

import numpy as np
import torch
from onnx import ModelProto, TensorProto
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from graftline import logs
from graftline.errors import ExportError
from graftline.export.onnx_builder import MICROSOFT, GraphBuilder
from graftline.export.onnx_session import HEAD_INPUT, HIDDEN_ROWS, RELU_SWITCH, BottleneckSlot, FusedLinear, GraphLayout
from graftline.export.served_models import Traits, head_dim_of, traits_of
from graftline.logs import OnProgress, silent
from graftline.weights.cast import cast as cast_tensor

_INT4_BLOCK = 32
_INT8_ACTIVATIONS = 4
"""MatMulNBits' accuracy level: activations are rounded to int8 in the product. With fp32 activations (level 1) a token
took 434 ms instead of 20 on one core, at the same error, because the weights' rounding dominates."""
_SHARED_INPUTS = ("last_position", "total_length")


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
        if self._traits.is_gemma:
            stream = graph.node("Mul", [stream, self._number("embedding_scale", self.layout.hidden_size**0.5)])
        normed = self._norm(stream, "model.layers.0.input_layernorm.weight")
        for layer in range(num_layers):
            stream, normed = self._add_block(layer, stream, normed)
            on_progress(layer + 1, num_layers)
        chosen = graph.node("Gather", [normed, graph.input("logits_rows", TensorProto.INT64, ["N"])])
        self._add_head(chosen, embedding)
        graph.output("logits", self._onnx_dtype, ["N", self.layout.vocab_size])
        self._add_classes(normed)
        return graph.model("graftline serving graph")

    @cached_property
    def _traits(self) -> Traits:
        return traits_of(self.config)

    @cached_property
    def _stored(self) -> frozenset[str]:
        return frozenset(self.source.names())

    @property
    def _dtype(self) -> np.dtype[Any]:
        return self.layout.numpy_dtype

    @property
    def _onnx_dtype(self) -> int:
        return self.layout.onnx_type

    def _read(self, name: str) -> np.ndarray:
        return self._as_array(self.source.read(name), name)

    def _as_array(self, tensor: Tensor, name: str) -> np.ndarray:
        fitting = cast_tensor(tensor, self.layout.dtype, name)
        if fitting.dtype == torch.bfloat16:  # unknown to torch's numpy()
            return fitting.view(torch.int16).numpy().view(self._dtype)
        return fitting.numpy()

    def _number(self, name: str, value: float) -> str:
        return self.graph.constant(name, np.array(value, self._dtype))

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
        for kind in sorted(set(self._traits.ropes)):
            for name, table in zip(_rope_names(kind), self._rope_tables(kind), strict=True):
                graph.weight(name, table)
        switch = graph.optional_input(RELU_SWITCH, np.zeros(1, np.float32), [1])
        graph.node("Greater", [switch, graph.constant("half", np.array([0.5], np.float32))], outputs=["use_relu"])
        shape = graph.node("Shape", ["input_ids"])
        widths = layout.linears[0].out_features
        parts = dict(zip(("q", "k", "v"), widths, strict=True)) if self._traits.norms_queries else {"qkv": sum(widths)}
        for name, width in parts.items():  # (B, T, width)
            ends = [shape, self._integers(f"{name}_width", [width])]
            graph.node("Concat", ends, outputs=[f"{name}_shape"], axis=0)
        if self._traits.norms_queries:
            self._integers("qkv_sizes", widths)
            self._integers("heads_shape", [-1, layout.head_dim])

    def _rope_tables(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Cosine and sine (positions, head_dim / 2), from transformers' own frequencies for this config."""
        rope: Any
        if kind:
            rope = Gemma3RotaryEmbedding(cast("Any", self.config))
            frequencies, scale = getattr(rope, f"{kind}_inv_freq"), getattr(rope, f"{kind}_attention_scaling")
        else:
            rope = LlamaRotaryEmbedding(cast("LlamaConfig", self.config))  # it reads what all the others have
            frequencies, scale = rope.inv_freq, rope.attention_scaling
        angles = torch.outer(torch.arange(self.layout.max_positions).float(), frequencies.float())
        cos, sin = (table * float(scale) for table in (angles.cos(), angles.sin()))
        return cos.numpy().astype(self._dtype), sin.numpy().astype(self._dtype)

    def _add_block(self, layer: int, stream: str, normed: str) -> tuple[str, str]:
        """One block; returns the residual stream and its norm for the next block (or the head)."""
        qkv, o, gate, up, down = self.layout.linears[5 * layer : 5 * layer + 5]
        after_attention, after_feed_forward = self.layout.bottlenecks[2 * layer : 2 * layer + 2]
        at, before_feed_forward = f"model.layers.{layer}", "post_attention_layernorm"
        h = self._linear(o, self._attention(layer, self._linear(qkv, normed)))
        h, bias = self._bottleneck(after_attention, h)
        if self._traits.is_gemma:
            h, bias = self._norm(self.graph.node("Add", [h, bias]), f"{at}.post_attention_layernorm.weight"), ""
            before_feed_forward = "pre_feedforward_layernorm"
        stream, normed = self._add_and_norm(stream, h, bias, f"{at}.{before_feed_forward}.weight")
        gated = self.graph.node("Mul", [self._activated(self._linear(gate, normed)), self._linear(up, normed)])
        h, bias = self._bottleneck(after_feed_forward, self._linear(down, gated))
        if self._traits.is_gemma:
            h, bias = self._norm(self.graph.node("Add", [h, bias]), f"{at}.post_feedforward_layernorm.weight"), ""
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
        graph, tied = self.graph, self.config.tie_word_embeddings
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        cap = self._traits.logit_cap
        last = ("logits",) if cap is None else ()
        if self.layout.precision == "int4":
            logits = graph.node("Identity", [self._product("head", x, self._read(name), bits=8)], outputs=last)
        else:
            head = embedding if tied else graph.weight("head", self._read(name))
            logits = graph.node("Gemm", [x, head], outputs=last, transB=1)
        if cap is not None:
            limit = self._number("logit_cap", cap)
            squashed = graph.node("Tanh", [graph.node("Div", [logits, limit])])
            graph.node("Mul", [squashed, limit], outputs=["logits"])

    def _add_classes(self, normed: str) -> None:
        """Hidden states after the final norm, and an adapter's head over them."""
        graph, width = self.graph, self.layout.hidden_size
        rows = graph.optional_input(HIDDEN_ROWS, np.zeros(0, np.int64), ["Y"])
        graph.node("Gather", [normed, rows], outputs=["hidden"])
        head = graph.optional_input(HEAD_INPUT, np.zeros((width, 0), self._dtype), [width, "L"])
        graph.node("MatMul", ["hidden", head], outputs=["classes"])
        graph.output("hidden", self._onnx_dtype, ["Y", width])
        graph.output("classes", self._onnx_dtype, ["Y", "L"])

    def _attention(self, layer: int, qkv: str) -> str:
        """Rotary grouped-query attention over the cache; rows in, rows out."""
        graph, layout, traits = self.graph, self.layout, self._traits
        cache = [f"past.{layer}.key", f"past.{layer}.value"]
        for name in cache:
            graph.input(name, self._onnx_dtype, ["B", layout.num_kv_heads, "P", layout.head_dim])
        outputs = [f"attended.{layer}", f"present.{layer}.key", f"present.{layer}.value"]
        inputs = self._normed_qkv(layer, qkv) if traits.norms_queries else [self._shaped(qkv, "qkv"), "", ""]
        window, scale = traits.windows[layer], traits.attention_scale
        graph.node(
            "GroupQueryAttention",
            [*inputs, *cache, *_SHARED_INPUTS, *_rope_names(traits.ropes[layer])],
            outputs=outputs,
            domain=MICROSOFT,
            num_heads=self.config.num_attention_heads,
            kv_num_heads=layout.num_kv_heads,
            do_rotary=1,
            **({} if window is None else {"local_window_size": window}),
            **({} if scale is None else {"scale": scale}),
        )
        for name in outputs[1:]:
            graph.output(name, self._onnx_dtype, ["B", layout.num_kv_heads, "P2", layout.head_dim])
        return graph.node("Reshape", [outputs[0], "attended_shape"])

    def _normed_qkv(self, layer: int, qkv: str) -> list[str]:
        """Queries, keys and values, the first two normalized a head at a time."""
        parts = [f"{part}.{layer}" for part in ("q", "k", "v")]
        self.graph.node("Split", [qkv, "qkv_sizes"], outputs=parts, axis=-1)
        for at, part in enumerate(("q", "k")):
            heads = self.graph.node("Reshape", [parts[at], "heads_shape"])
            parts[at] = self._norm(heads, f"model.layers.{layer}.self_attn.{part}_norm.weight")
        return [self._shaped(value, name) for value, name in zip(parts, ("q", "k", "v"), strict=True)]

    def _shaped(self, rows: str, name: str) -> str:
        """Rows as (B, T, width)."""
        return self.graph.node("Reshape", [rows, f"{name}_shape"])

    def _activated(self, x: str) -> str:
        """The feed-forward's activation."""
        if self._traits.activation == "silu":
            return self._silu(x)
        return self.graph.node("Gelu", [x], approximate="tanh" if self._traits.activation == "gelu_tanh" else "none")

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
        scale, epsilon = self.graph.weight(weight, self._norm_weight(weight)), self.config.rms_norm_eps
        return self.graph.node("SimplifiedLayerNormalization", [x, scale], axis=-1, epsilon=epsilon, stash_type=1)

    def _norm_weight(self, name: str) -> np.ndarray:
        weight = self.source.read(name)
        return self._as_array(weight.float() + 1 if self._traits.is_gemma else weight, name)

    def _add_and_norm(self, stream: str, h: str, bias: str, weight: str) -> tuple[str, str]:
        """Stream + h + bias, and its RMS norm, in one operator."""
        scale = self.graph.weight(weight, self._norm_weight(weight))
        normed, total = f"{weight}.normed", f"{weight}.stream"
        self.graph.node(
            "SkipSimplifiedLayerNormalization",
            [stream, h, scale, bias] if bias else [stream, h, scale],
            outputs=[normed, "", "", total],
            domain=MICROSOFT,
            epsilon=self.config.rms_norm_eps,
        )
        return total, normed


def _rope_names(kind: str) -> tuple[str, str]:
    """Names of the tables of cosines and sines."""
    return (f"rope_cos.{kind}", f"rope_sin.{kind}") if kind else ("rope_cos", "rope_sin")
