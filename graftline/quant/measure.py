"""How far a quantized weight is from the weight that it stands for."""

import math

import torch
from torch import Tensor

from graftline.quant.blockwise import PIECE, Quantized, dequantized_pieces


def relative_error(weight: Tensor, quantized: Quantized) -> float:
    """‖W − Q‖_F / ‖W‖_F, in pieces; 0 for a weight of zeros."""
    difference = total = 0.0
    for piece, values in zip(weight.reshape(-1).split(PIECE), dequantized_pieces(quantized), strict=True):
        exact = piece.float()
        difference += float((exact - values).square().sum(dtype=torch.float64))
        total += float(exact.square().sum(dtype=torch.float64))
    return math.sqrt(difference / total) if total else 0.0


def share_of_zeros(quantized: Quantized) -> float:
    """Share of the weights that became exactly 0."""
    zeros = sum(values.numel() - int(values.count_nonzero()) for values in dequantized_pieces(quantized))
    return zeros / math.prod(quantized.shape)


def bits_per_weight(quantized: Quantized) -> float:
    """Bits of codes and constants for each weight."""
    return 8 * quantized.num_bytes / math.prod(quantized.shape)


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has neither Inf nor NaN; takes no memory of the tensor's size."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)  # both are NaN if any value is
    return bool(low.isfinite() & high.isfinite())
