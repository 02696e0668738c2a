"""Small random models of seven architectures, and a quantized layer that is as simple as one can be."""

import copy

import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from graftline.adapters.attach import trainable_parameters

_COMMON = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED = _COMMON | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "llama-untied": LlamaConfig(**_GROUPED, tie_word_embeddings=False, attention_bias=True),
    "qwen2": Qwen2Config(**_GROUPED, tie_word_embeddings=True),
    "gemma": GemmaConfig(**_GROUPED, head_dim=8),  # embedding scaled, head tied by the class
    "gemma2": Gemma2Config(**_GROUPED, head_dim=8),
    "mistral": MistralConfig(**_GROUPED, tie_word_embeddings=False, sliding_window=None),
    "phi": PhiConfig(**_COMMON, intermediate_size=48, max_position_embeddings=64),
    "gpt2": GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
    "gpt-neox": GPTNeoXConfig(**_COMMON, intermediate_size=48, max_position_embeddings=64),
}
LINEAR_LAYERS = {  # per model, without the head: what all-linear means
    "llama": 14, "llama-untied": 14, "qwen2": 14, "gemma": 14, "gemma2": 14, "mistral": 14,
    "phi": 12, "gpt2": 8, "gpt-neox": 8,
}  # fmt: skip


def disturb(model: nn.Module, *, seed: int = 1) -> None:
    """Change what is trained a little, as a training would; an adapter that was just attached does nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def make_model(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of about 30 k parameters with biases and norms away from their initial values."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(5.0)
    return model.eval()


_EXPERTS = _GROUPED | {"num_experts_per_tok": 2}
EXPERTS: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(**_EXPERTS, num_local_experts=4),
    "qwen3-moe": Qwen3MoeConfig(**_EXPERTS, num_experts=4, moe_intermediate_size=24, head_dim=8, mlp_only_layers=[1]),
    "gpt-oss": GptOssConfig(
        **_EXPERTS, num_local_experts=4, head_dim=8, sliding_window=4, rope_parameters={"rope_type": "default"}
    ),
}
"""Families with experts; of two blocks of Qwen3-MoE one is dense."""


def make_experts(name: str) -> PreTrainedModel:
    """A random model of `EXPERTS` as transformers makes it; biases and norms away from their initial values."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(EXPERTS[name]))  # saving in 16 bits changes it
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(5.0)
    return model.eval()


def make_tokens(*, seed: int = 0) -> Tensor:
    """Token numbers (2, 7)."""
    return torch.randint(0, 96, (2, 7), generator=torch.Generator().manual_seed(seed))


class RoundedLinear(nn.Module):
    """Stands in for a quantizer's layer: int8 codes and one scale a row; nothing of full precision is kept."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = source.in_features, source.out_features
        weight_OI = source.weight.detach().float()
        scale_O1 = weight_OI.abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("codes", torch.round(weight_OI / scale_O1).to(torch.int8))
        self.register_buffer("scale", scale_O1)
        self.bias = None if source.bias is None else nn.Parameter(source.bias.detach().clone(), requires_grad=False)

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.codes * self.scale).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dense_weight(x.dtype), self.bias)


def quantize(model: PreTrainedModel) -> PreTrainedModel:
    """Replace every nn.Linear but the head by a `RoundedLinear`."""
    head = model.get_output_embeddings()
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    for name, module in linears:
        model.set_submodule(name, RoundedLinear(module))
    return model
