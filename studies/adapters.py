"""What each adapter method costs in a layer: a training step's forward and backward, ours over peft's same method.

The decoder's first layers with each method's adapter on all linear layers, on shared base weights in one process. CPU
seconds on one thread; all variants take turns, ratios are of one round. What a training costs: `studies.training`; what
an adapter costs when it is served: `studies.serving`.
"""

import copy
import statistics
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from graftline.adapters.attach import attach
from graftline.settings.model import Adapter
from studies.harness import Json, Setting, cpu_seconds, ratio, turns
from studies.training import ADAPTERS, BATCH

TOKENS = 27
OURS = {name: adapter for name, adapter in ADAPTERS.items() if name != "qlora"} | {
    "vera-8": Adapter(method="vera", rank=8),
    "houlsby": Adapter(method="houlsby", rank=36),  # SmolLM2's width / 16
    "pfeiffer": Adapter(method="pfeiffer", rank=36),
    "full": Adapter(method="full"),
}
PEERS: dict[str, Any] = {
    "lora": peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    "rslora": peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_rslora=True),
    "dora": peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_dora=True),
    "vera": peft.VeraConfig(r=64, target_modules="all-linear"),
}


def layers(setting: Setting) -> Json:
    """A step of each method."""
    base = _first_layers(setting)
    models: dict[str, Any] = {"frozen base": _frozen(_sharing_weights(base))}
    for name, adapter in OURS.items():
        models[name] = copy.deepcopy(base) if name == "full" else _sharing_weights(base)
        attach(models[name], adapter, seed=0)
    for name, config in PEERS.items():
        models[f"peft {name}"] = peft.get_peft_model(_sharing_weights(base), config).base_model.model
    shape = (setting.size(BATCH, 2), setting.size(TOKENS, 4))
    tokens = torch.randint(0, base.config.vocab_size, shape, generator=torch.Generator().manual_seed(setting.seed))
    sides = {name: _timed(_step, model, tokens) for name, model in models.items()}
    seconds = turns(sides, setting.turns(15), seed=setting.seed)
    return {
        "num_layers": len(base.model.layers),
        "num_tokens": tokens.numel(),
        "milliseconds": {name: round(1000 * statistics.median(times), 1) for name, times in seconds.items()},
        "to_our_lora": {name: ratio(times, seconds["lora"]) for name, times in seconds.items()},
        "peft_to_ours": {name: ratio(seconds[f"peft {name}"], seconds[name]) for name in PEERS},
    }


def _first_layers(setting: Setting) -> Any:
    base = AutoModelForCausalLM.from_pretrained(setting.base(), dtype=torch.float32)
    base.model.layers = base.model.layers[: setting.size(3, 1)]
    return base


def _sharing_weights(base: PreTrainedModel) -> PreTrainedModel:
    """A second model over the same weights."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


def _frozen(model: PreTrainedModel) -> PreTrainedModel:
    """No adapter, but gradients flow to the embeddings' output, as they do where an adapter sits in the first layer."""
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return model


def _timed(run: Callable[[Any, Tensor], None], model: Any, tokens: Tensor) -> Callable[[], float]:
    return lambda: cpu_seconds(lambda: run(model, tokens))


def _step(model: Any, tokens: Tensor) -> None:
    model.train()
    model.model(tokens).last_hidden_state.square().mean().backward()
    nn.Module.zero_grad(model, set_to_none=True)


PARTS = {"layers": layers}
