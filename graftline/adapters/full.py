"""Full fine-tuning: the weights themselves are trained.

    W ← W − η·∂L/∂W            of every weight, or of the modules that ``targets`` names

The yardstick of the survey, and the upper end of what training costs: 16 bytes a parameter with Adam in fp32 and mixed
precision (METHODS.md §5). Trained: I·O a linear layer; tied weights count once and stay tied.

On disk it is a file of whole tensors under PEFT's key prefix; they replace the base's tensors. PEFT has no such method
and refuses the file by its ``peft_type``. Only a dense base can be trained.
"""

from graftline.adapters.base import Method

METHOD = Method(
    name="full",
    formula="W ← W − η·∂L/∂W",
    source="the baseline of every paper here",
    layer=None,
    count=lambda num_inputs, num_outputs, rank: num_inputs * num_outputs,
    count_formula="I·O (and biases, norms)",
    disk_names={},
    scale=lambda alpha, rank: 1.0,
)
