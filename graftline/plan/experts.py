"""What cannot be done with a base that has experts: told before anything is spent."""

from transformers import PreTrainedConfig

from graftline.errors import ConfigError
from graftline.plan.served import layer_names
from graftline.settings.model import Pipeline
from graftline.weights.model_folder import has_experts


def check_experts(pipeline: Pipeline, config: PreTrainedConfig) -> None:
    """Refuse settings that a base with experts cannot have, and the setting for experts with every other base.

    Args:
        pipeline: the settings.
        config: of the base.

    Raises:
        ConfigError: every such setting is named, with what to write instead.
        AdapterError: the adapter's targets, method or dropout are not for experts.
    """
    if not has_experts(config):
        if pipeline.adapter.experts != "each":
            raise ConfigError(
                f"adapter.experts: {pipeline.adapter.experts} was given, and the base, a "
                f"{', '.join(config.architectures or ())}, has no experts that can be adapted; leave it out"
            )
        return
    layer_names(config, pipeline.adapter)
    reasons = []
    if pipeline.train.sharding:
        reasons.append("train.sharding: true was given; experts are not divided over processes: write false")
    if pipeline.quantize.weighting != "none":
        reasons.append(
            f"quantize.init has the weighting {pipeline.quantize.weighting}; each expert reads other rows, so the "
            "inputs of some may be unknown: write `weighting: none`"
        )
    if pipeline.package.merged and pipeline.package.requantize:
        reasons.append(
            "package.requantize: true was given; no other software loads experts that are quantized one by one: write "
            "false, and quantize the merged model with the engine that serves it"
        )
    if reasons:
        raise ConfigError(
            f"the base is a {', '.join(config.architectures or ())}, which has experts: {'; '.join(reasons)}"
        )
