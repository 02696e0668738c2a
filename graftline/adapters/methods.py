"""The table of adapter methods. A new method is a file and a line here; the conformance suite then tests it."""

import difflib

from graftline.adapters import bottleneck, dora, lora, vera
from graftline.adapters.base import Method
from graftline.errors import AdapterError

# Full fine-tuning: the weights themselves are trained.
#
#     W ← W − η·∂L/∂W            of every weight, or of the modules that ``targets`` names
#
# The baseline of the survey, and the most expensive training: 16 bytes a parameter with Adam in fp32 and mixed
# precision. Trained: I·O a linear layer; tied weights count once and stay tied.
#
# On disk it is a file of whole tensors under PEFT's key prefix, which replace the base's. PEFT has no such method and
# refuses the file because of its ``peft_type``. Only a dense base can be trained.

FULL = Method(
    name="full",
    formula="W ← W − η·∂L/∂W",
    source="the baseline of every paper here",
    layer=None,
    count=lambda num_inputs, num_outputs, rank: num_inputs * num_outputs,
    count_formula="I·O (and biases, norms)",
    disk_names={},
    scale=lambda alpha, rank: 1.0,
)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        FULL,
        bottleneck.HOULSBY,
        bottleneck.PFEIFFER,
        lora.LORA,
        lora.RSLORA,
        dora.METHOD,
        lora.PISSA,
        lora.PISSA_QUANTIZED,
        vera.METHOD,
        lora.LOFTQ,
    )
}


def find_method(name: str) -> Method:
    """The method of that name; AdapterError, with the nearest name, if there is none."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise AdapterError(f"there is no adapter method {name!r}; {hint}known: {', '.join(METHODS)}")
    return METHODS[name]
