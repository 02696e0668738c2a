"""The ``quantization_config`` of a quantized folder's config.json."""

from typing import Any

from graftline.weights.quant.plan import QuantizationPlan
from graftline.weights.quant.scheme import Scheme


def quantization_config(plan: QuantizationPlan, schemes: dict[str, Scheme | None], dtype: str) -> dict[str, Any]:
    """What loaders need to know; ``schemes`` maps each linear layer to its scheme, ``dtype`` is the source's.

    Only NF4 and dense layers: bitsandbytes' configuration, so that transformers loads the folder. Otherwise a method
    name of our own, on which transformers stops instead of filling in random weights.
    """
    used = {scheme for scheme in schemes.values() if scheme is not None}
    if any(scheme.code != "nf4" for scheme in used) or len({scheme.double_quant for scheme in used}) > 1:
        return {"quant_method": "graftline", "format": 1, **plan.as_json()}
    dense = [module for module, scheme in schemes.items() if scheme is None]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": next(iter(used)).double_quant,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": ["lm_head", *dense],
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }
