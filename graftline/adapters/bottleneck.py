"""Serial bottleneck adapters: a small residual network after a sublayer.

    h = x Wᵀ + b;  y = h + U f(D drop(h) + b_D) + b_U            D: (M, H), U: (H, M); M = rank, H = model width

Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv 1902.00751: one after attention and one
after the feed-forward network, f = swish. Pfeiffer et al. 2020, "AdapterFusion", arXiv 2005.00247: one after the
feed-forward network only, f = ReLU. Trained: 2·M·H + M + H a block; a width of H/16 is usual.

The papers place the block before a layer norm that follows the sublayer. Today's decoders normalize before it, so here
the block is on the output of the sublayer's last linear layer, before the residual is added (and, in GPT-2, before the
dropout). U and b_U start at 0, so step 0 is exactly the base (with the libraries' N(0, 0.02) it is not).

f is not linear, so the block cannot be folded into W. PEFT has no such method and cannot load the files.

Dimensions: H = output features of the linear layer, M = width of the bottleneck.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftline.adapters.base import AdapterLayer, AttachContext, LayerPlan, Method, device_of, features_of

ATTENTION_OUTPUTS = ("self_attn.o_proj", "self_attn.dense", "attn.c_proj", "attention.dense")
"""Last linear layer of attention: Llama, Qwen2, Mistral; Phi; GPT-2; GPT-NeoX."""
FEED_FORWARD_OUTPUTS = ("mlp.down_proj", "mlp.fc2", "mlp.c_proj", "mlp.dense_4h_to_h")
"""Last linear layer of the feed-forward network, likewise."""
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"swish": F.silu, "relu": F.relu}


class Bottleneck(NamedTuple):
    """A block for a serving graph: ``h + f(h·down + down_bias)·up + up_bias``."""

    down: Tensor
    """(H, M)"""
    down_bias: Tensor
    up: Tensor
    """(M, H)"""
    up_bias: Tensor
    activation: str


class BottleneckLayer(AdapterLayer):
    """A frozen linear layer followed by a bottleneck. ``forward`` takes (…, I) and returns (…, H)."""

    trained = ("D", "bias_D", "U", "bias_U")

    def __init__(self, base: nn.Module, plan: LayerPlan, context: AttachContext, *, activation: str) -> None:
        super().__init__(base, plan)
        _, width = features_of(base)
        D_MH = torch.empty(plan.rank, width)
        nn.init.kaiming_uniform_(D_MH, a=math.sqrt(5), generator=context.generator)
        device = device_of(base)
        self.D = nn.Parameter(D_MH.to(device))
        self.bias_D = nn.Parameter(torch.zeros(plan.rank, device=device))
        self.U = nn.Parameter(torch.zeros(width, plan.rank, device=device))
        self.bias_U = nn.Parameter(torch.zeros(width, device=device))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output plus the block's."""
        h = self.base(x)
        D, bias_D, U, bias_U = (tensor.to(h.dtype) for tensor in (self.D, self.bias_D, self.U, self.bias_U))
        dropped = F.dropout(h, self.plan.dropout, self.training)
        return h + F.linear(ACTIVATIONS[self.activation](F.linear(dropped, D, bias_D)), U, bias_U)


def _houlsby_layer(base: nn.Module, plan: LayerPlan, context: AttachContext) -> BottleneckLayer:
    return BottleneckLayer(base, plan, context, activation="swish")


def _pfeiffer_layer(base: nn.Module, plan: LayerPlan, context: AttachContext) -> BottleneckLayer:
    return BottleneckLayer(base, plan, context, activation="relu")


HOULSBY = Method(
    name="houlsby",
    formula="y = h + U swish(D drop(h) + b_D) + b_U, behind attention and the feed-forward network",
    source="Houlsby et al. 2019, arXiv 1902.00751",
    layer=_houlsby_layer,
    count=lambda num_inputs, num_outputs, rank: 2 * rank * num_outputs + rank + num_outputs,
    count_formula="2·M·H + M + H",
    disk_names={
        "D": "bottleneck_down.weight",
        "bias_D": "bottleneck_down.bias",
        "U": "bottleneck_up.weight",
        "bias_U": "bottleneck_up.bias",
    },
    scale=lambda alpha, rank: 1.0,
    fold_refusal="its activation makes it no linear map; serve it beside the base (the ONNX graph does)",
    rank_tensor="D",
    output_tensor="U",
    sublayers=(*ATTENTION_OUTPUTS, *FEED_FORWARD_OUTPUTS),
)
PFEIFFER = dataclasses.replace(
    HOULSBY,
    name="pfeiffer",
    formula="y = h + U relu(D drop(h) + b_D) + b_U, behind the feed-forward network",
    source="Pfeiffer et al. 2020, arXiv 2005.00247",
    layer=_pfeiffer_layer,
    sublayers=FEED_FORWARD_OUTPUTS,
)
ACTIVATION_OF = {"houlsby": "swish", "pfeiffer": "relu"}
"""What f is in each placement."""
