"""Whether the server that a pipeline names will be able to serve its base and its adapter: told before training."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from graftline.adapters.attach import plan_layers
from graftline.errors import ConfigError
from graftline.export.served_models import ADAPTED_LAYERS, refusals
from graftline.export.targets import NOT_IN_VLLM, Compatibility, check_planned
from graftline.settings.channels import Channel
from graftline.settings.model import Adapter, Pipeline
from graftline.weights.model_folder import has_experts


def layer_names(config: PreTrainedConfig, spec: Adapter) -> tuple[str, ...]:
    """Paths of the layers that an adapter is put on; AdapterError if a target matches nothing."""
    with torch.device("meta"):
        return tuple(plan_layers(AutoModelForCausalLM.from_config(config), spec))


def own_server(config: PreTrainedConfig, spec: Adapter, layers: Iterable[str]) -> Compatibility:
    """Whether `graftline serve` will be able to serve an adapter that is not trained yet, and its base."""
    reasons = [f"it does not compute {reason}" for reason in refusals(config)]
    if spec.method == "full":
        reasons.append("full fine-tuning makes another base; merge it and serve the merged model")
    outside = [name for name in layers if ".layers." not in name or name.rpartition(".")[2] not in ADAPTED_LAYERS]
    if outside and spec.method != "full" and not reasons:
        reasons.append(f"it takes no adapter on {', '.join(outside[:3])}; leave these layers out of adapter.targets")
    if spec.modules_to_save or spec.bias != "none":
        reasons.append("it takes no tensors that are trained whole (adapter.modules_to_save, adapter.bias)")
    command = "graftline serve --base NAME=BASE --adapter NAME=FOLDER"
    return Compatibility("graftline", tuple(reasons), (), "" if reasons else command)


def check_served(pipeline: Pipeline, config: PreTrainedConfig, *, channel: Channel | None = None) -> None:
    """Refuse a base, or an adapter for it, that the server in ``base.served_by`` cannot serve.

    Args:
        pipeline: its base and its adapter.
        config: of the base.
        channel: the one that it releases into; its ``served_by`` counts where the base names no server.

    Raises:
        ConfigError: it cannot; every reason is given, and what else could serve it.
        AdapterError: a target of the adapter matches nothing.
    """
    wanted, key, spec = pipeline.base.served_by, "base.served_by", pipeline.adapter
    if wanted is None and channel is not None:
        wanted, key = channel.served_by, f"channels.{pipeline.release.channel}.served_by"
    if wanted is None:
        return
    layers = layer_names(config, spec)
    if wanted == "vllm":
        method = pipeline.quantize.method
        found = check_planned(spec, layers, is_quantized=method != "none", target="vllm")
        if method in NOT_IN_VLLM:
            reasons = (*found.reasons, f"it has no code for {method} weights; take quantize.method: nf4")
            found = replace(found, reasons=reasons)
        elif method != "none" and has_experts(config):
            reasons = (
                *found.reasons,
                "it does not read experts as they are quantized here; take quantize.method: none",
            )
            found = replace(found, reasons=reasons)
        other = f"leave {key} out and serve the merged model (package.merged: true)"
    else:
        found = own_server(config, spec, layers)
        other = f"serve with vLLM (served_by: vllm), or leave {key} out and serve the merged model"
    if not found.loads:
        name = "graftline serve" if wanted == "graftline" else "vLLM"
        raise ConfigError(f"{key}: {wanted} was given; {name} cannot serve this: {'; '.join(found.reasons)}; {other}")
