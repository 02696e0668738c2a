"""The ``quantization_config`` of a quantized folder's config.json."""

from collections.abc import Collection
from typing import Any

from graftline.weights.quant.plan import QuantizationPlan
from graftline.weights.quant.scheme import Scheme


def quantization_config(plan: QuantizationPlan, schemes: Collection[Scheme], dtype: str) -> dict[str, Any]:
    """What loaders need to know; ``schemes`` are those of the linear layers, ``dtype`` is the source's.

    NF4 throughout: bitsandbytes' configuration, so that transformers loads the folder. Otherwise a method name of our
    own, on which transformers stops instead of filling in random weights.
    """
    if any(scheme.code != "nf4" for scheme in schemes):
        return {"quant_method": "graftline", "format": 1, **plan.as_json()}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": plan.default.double_quant,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": ["lm_head"],
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }
