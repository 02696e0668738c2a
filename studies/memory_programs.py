"""One training step of other programs, as their published code does it, for graftline.plan.trace to run.

Only what lives and for how long is theirs; nothing is computed. Sources:

    transformers  Trainer's loss until 4.45: all logits, their fp32 copy, a copy without the last position; peft's LoRA
                  in fp32 under bf16 autocast
    torchtune     CEWithChunkedOutputLoss (eight chunks of bf16 logits, upcast inside a compiled kernel), LoRALinear,
                  everything bf16; in full training each gradient is used and freed in the backward pass
    Unsloth       unsloth/kernels/fast_lora.py (LoRA_MLP, LoRA_QKV, LoRA_W; gradients written over saved tensors),
                  rms_layernorm.py and rope_embedding.py (in place), a block's input in host memory while the others run
                  (Unsloth_Offloaded_Gradient_Checkpointer), cut cross-entropy (no logits), FlashAttention-2's backward
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from graftline.plan.trace import Ledger, StepShape

_CHUNKS = 8
_BF16 = torch.bfloat16


class PlainLora(nn.Module):
    """peft's and torchtune's LoRA layer: y = W x + B (A x), each product its own operation."""

    def __init__(self, base: nn.Module, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        inputs, outputs = int(base.in_features), int(base.out_features)  # type: ignore[arg-type]
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.empty(rank, inputs, dtype=dtype))
        self.B = nn.Parameter(torch.empty(outputs, rank, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """X (B, T, I) -> (B, T, O)."""
        y: Tensor = self.base(x)
        return y + F.linear(F.linear(x.to(self.A.dtype), self.A), self.B) * 2.0


def _body(model: PreTrainedModel, shape: StepShape) -> Tensor:
    model.train()
    if shape.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    ids = torch.zeros(shape.rows, shape.tokens, dtype=torch.long)
    hidden: Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden


def run_transformers(model: PreTrainedModel, shape: StepShape, ledger: Ledger) -> None:
    """Forward, loss on whole logits, backward."""
    ledger.enter("activations")
    with torch.autocast("cpu", _BF16):
        hidden = _body(model, shape)
        ledger.enter("logits")
        loss = _whole_loss(model.get_output_embeddings(), hidden)
    ledger.enter("transient")
    loss.backward()


def _whole_loss(head: nn.Module, hidden: Tensor) -> Tensor:
    logits = head(hidden).float()
    shifted = logits[..., :-1, :].contiguous()
    labels = torch.zeros(shifted.shape[:-1], dtype=torch.long).view(-1)
    return F.cross_entropy(shifted.view(-1, shifted.shape[-1]), labels)


def run_torchtune(model: PreTrainedModel, shape: StepShape, ledger: Ledger) -> None:
    """Forward in bf16, all chunks of logits, the loss chunk by chunk, backward."""
    head = model.get_output_embeddings()
    if all(parameter.requires_grad for parameter in model.parameters()):
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(_use_and_free)
    ledger.enter("activations")
    hidden = _body(model, shape)
    ledger.enter("logits")
    chunks = [head(chunk) for chunk in hidden.tensor_split(_CHUNKS, dim=1)]
    loss = torch.stack([_FusedCrossEntropy.apply(chunk) for chunk in chunks]).sum()
    ledger.enter("transient")
    loss.backward()


def _use_and_free(parameter: Tensor) -> None:
    parameter.grad = None


class _FusedCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return torch.zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


class UnslothBlock(nn.Module):
    """A decoder block of these sizes; T tokens of all rows together."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.hidden, self.inner, self.heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
        self.kv = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)

    def forward(self, x: Tensor) -> Tensor:
        """X (T, hidden) -> the same."""
        q, k, v = _Qkv.apply(_Norm.apply(x), self)
        x = x + _Output.apply(_Attention.apply(q, k, v, self.heads), self)
        return x + _Mlp.apply(_Norm.apply(x), self)


def run_unsloth(config: PretrainedConfig, tokens: int, ledger: Ledger) -> None:
    """Two blocks of any number: what the others keep lies in host memory."""
    block = UnslothBlock(config)
    ledger.enter("activations")
    x = torch.empty(tokens, config.hidden_size, dtype=_BF16, requires_grad=True)
    for _ in range(2):
        x = _Offloaded.apply(x, block)
    loss = _CutLoss.apply(_Norm.apply(x))
    ledger.enter("transient")
    loss.backward()


class _Offloaded(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: UnslothBlock) -> Tensor:
        ctx.block, ctx.shape = block, x.shape  # x itself goes to the host
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        x = torch.empty(ctx.shape, dtype=_BF16).requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x)
        torch.autograd.backward(y, grads[0])
        return x.grad, None


def _dequantized(outputs: int, inputs: int) -> Tensor:
    return torch.empty(outputs, inputs, dtype=_BF16)


class _Norm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, torch.empty(len(x), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]  # written over


class _Qkv(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: UnslothBlock) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x)
        ctx.block = block
        return tuple(x @ _dequantized(size, block.hidden).T for size in (block.hidden, block.kv, block.kv))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        for grad in grads:
            x.addmm_(grad, _dequantized(grad.shape[1], ctx.block.hidden))
        return x, None


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, torch.empty(len(q), heads, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, _, sums = ctx.saved_tensors
        accumulated = torch.empty_like(q, dtype=torch.float32)
        expanded = [torch.empty_like(q) for _ in range(2)]  # keys' and values' gradients, one for each query head
        rows = torch.empty_like(sums)
        out = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None
        del accumulated, expanded, rows
        return out


class _Output(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: UnslothBlock) -> Tensor:
        ctx.save_for_backward(x)
        return x @ _dequantized(block.hidden, block.hidden).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grads[0] @ _dequantized(x.shape[1], x.shape[1]), None


class _Mlp(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: UnslothBlock) -> Tensor:
        gate, up = (x @ _dequantized(block.inner, block.hidden).T for _ in range(2))
        ctx.save_for_backward(x, gate, up)
        ctx.block = block
        return torch.empty_like(gate) @ _dequantized(block.hidden, block.inner).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        x, gate, up = ctx.saved_tensors
        inner = grads[0] @ _dequantized(ctx.block.hidden, ctx.block.inner)  # written over gate, up and itself
        for grad in (up, gate):
            x.addmm_(grad, _dequantized(ctx.block.inner, ctx.block.hidden))
        del inner
        return x, None


class _CutLoss(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, torch.empty(len(hidden), dtype=torch.float32))
        return torch.zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])
