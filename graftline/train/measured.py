"""How much memory a training took, by part: tensors are counted, and what is left of the peak is the step's."""

from torch import Tensor, nn
from torch.optim import Optimizer

from graftline.weights.quant.linear import QuantLinear

STEP_PARTS = ("gradients", "activations", "logits", "transient")
"""Parts of the plan that come and go in a step; only their sum can be measured."""
_CONSTANTS = ("absmax", "nested_absmax", "nested_offset")


def measured_parts(model: nn.Module, *, optimizer_bytes: int, peak_bytes: int) -> dict[str, int]:
    """Bytes by part of a model as it was trained.

    Args:
        model: with its adapter.
        optimizer_bytes: of the optimizer's states, as `state_bytes` counts them.
        peak_bytes: most that the training had at once.

    Returns:
        Weights, quantization constants, adapters, optimizer, and as ``step`` what is left of the peak.
    """
    parameters = list(model.parameters())
    trained = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
    everything = sum(tensor.nbytes for tensor in (*parameters, *model.buffers()))
    constants = sum(
        tensor.nbytes
        for layer in model.modules()
        if isinstance(layer, QuantLinear)
        for name, tensor in layer.named_buffers(recurse=False)
        if name in _CONSTANTS
    )
    parts = {
        "weights": everything - trained - constants,
        "quantization constants": constants,
        "adapters": trained,
        "optimizer": optimizer_bytes,
    }
    return parts | {"step": max(0, peak_bytes - sum(parts.values()))}


def state_bytes(optimizer: Optimizer | None) -> int:
    """Bytes of an optimizer's states; 0 where it has made no step."""
    if optimizer is None:
        return 0
    states = optimizer.state.values()
    return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))
