"""The quantization of each layer's weight: made, measured, and reported as data."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from graftline.digest import Digest
from graftline.weights.quant.blockwise import QuantizedWeight, dequantize, dequantized_pieces, piece_size
from graftline.weights.quant.compensated import quantize_compensated
from graftline.weights.quant.kernels import quantize_here
from graftline.weights.quant.low_rank import FactorSettings, Method, QuantizedPair, make_pair
from graftline.weights.quant.scheme import Scheme
from graftline.weights.quant.weighted import FullMetric

REPORT_FILE = "quantization.json"


@dataclass(frozen=True)
class LayerReport:
    """A quantized weight. Errors are relative Frobenius norms, ‖W − …‖ / ‖W‖.

    error: with the initial adapter, ‖W − Q − sBA‖. error_alone: without it, ‖W − Q‖. error_plain: of plain
    quantization, ‖W − q(W)‖. step_errors: ``error`` after each step of LoftQ or QPiSSA; the best was kept.
    bits_per_weight counts codes and constants. zeros: share of weights that became exactly 0. output_error,
    output_error_plain: of the layer's output on the calibration rows, with the initial adapter and of plain
    quantization, where they weighted the error or guided the rounding; then step_errors are of the output.
    """

    module: str
    code: str
    num_weights: int
    bits_per_weight: float
    error: float
    error_alone: float
    error_plain: float
    zeros: float
    rank: int
    step_errors: tuple[float, ...]
    output_error: float | None = None
    output_error_plain: float | None = None

    def as_json(self) -> dict[str, Any]:
        """As data, without what was not measured."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class InitReport:
    """digest: of the new base. pair: of its initial factors, if any. peak_bytes_bound: the bound on the memory used."""

    digest: Digest
    pair: Digest | None
    layers: tuple[LayerReport, ...]
    peak_bytes_bound: int

    @property
    def bits_per_weight(self) -> float:
        """Mean over the quantized weights."""
        total = sum(layer.num_weights for layer in self.layers)
        return sum(layer.bits_per_weight * layer.num_weights for layer in self.layers) / total if total else 0.0

    def as_json(self) -> dict[str, Any]:
        """The content of `quantization.json`."""
        return {
            "digest": str(self.digest),
            "pair": None if self.pair is None else str(self.pair),
            "bits_per_weight": self.bits_per_weight,
            "peak_bytes_bound": self.peak_bytes_bound,
            "layers": [layer.as_json() for layer in self.layers],
        }


def layer_from_json(value: dict[str, Any]) -> LayerReport:
    """The inverse of `LayerReport.as_json`."""
    return LayerReport(**(value | {"step_errors": tuple(value["step_errors"])}))


@dataclass(frozen=True)
class Distance:
    """error: ‖W − Q‖_F / ‖W‖_F, 0 for a weight of zeros. zeros: share of the weights that became exactly 0."""

    error: float
    zeros: float


def measure(weight: Tensor, quantized: QuantizedWeight) -> Distance:
    """Compare a weight with its quantization, in pieces and one pass."""
    difference = total = 0.0
    num_nonzero = 0
    for piece, values in zip(weight.reshape(-1).split(piece_size(weight)), dequantized_pieces(quantized), strict=True):
        exact = piece.float()
        num_nonzero += _count_nonzero(values)
        values.sub_(exact)
        # Sums of a piece's squares in fp32, which are added in double precision.
        difference += float(torch.dot(values, values))
        total += float(torch.dot(exact, exact))
    error = math.sqrt(difference / total) if total else 0.0
    return Distance(error, 1 - num_nonzero / math.prod(quantized.shape))


def share_of_zeros(quantized: QuantizedWeight) -> float:
    """Share of the weights that became exactly 0."""
    num_nonzero = sum(map(_count_nonzero, dequantized_pieces(quantized)))
    return 1 - num_nonzero / math.prod(quantized.shape)


def _count_nonzero(values: Tensor) -> int:
    # torch.count_nonzero branches on each value, four times slower if every second one is 0, as at 2 bits.
    return int(values.ne(0).sum())


def bits_per_weight(quantized: QuantizedWeight) -> float:
    """Bits of codes and constants for each weight."""
    return 8 * quantized.num_bytes / math.prod(quantized.shape)


@dataclass(frozen=True)
class InitializedLayer:
    """factors: A (R, I) and B (O, R), or None if the layer's adapter starts from zero."""

    quantized: QuantizedWeight
    factors: tuple[Tensor, Tensor] | None
    report: LayerReport


def initialize_plain(module: str, W_OI: Tensor, scheme: Scheme) -> InitializedLayer:
    """Quantize a weight whose adapter starts from zero (QLoRA)."""
    quantized = quantize_here(W_OI, scheme)
    return InitializedLayer(quantized, None, _report_alone(module, W_OI, quantized))


def initialize_compensated(
    module: str, W_OI: Tensor, scheme: Scheme, metric: FullMetric, base_OI: Tensor | None
) -> InitializedLayer:
    """Quantize a weight with the errors of its columns made up for by others (`compensated`)."""
    quantized, plain = quantize_compensated(W_OI, scheme, metric, base_OI), quantize_here(W_OI, scheme)
    report = replace(
        _report_alone(module, W_OI, quantized),
        error_plain=measure(W_OI, plain).error,
        output_error=_output_error(W_OI, quantized, metric),
        output_error_plain=_output_error(W_OI, plain, metric),
    )
    return InitializedLayer(quantized, None, report)


def _report_alone(module: str, W_OI: Tensor, quantized: QuantizedWeight) -> LayerReport:
    distance = measure(W_OI, quantized)
    return LayerReport(
        module=module,
        code=quantized.scheme.code,
        num_weights=W_OI.numel(),
        bits_per_weight=bits_per_weight(quantized),
        error=distance.error,
        error_alone=distance.error,
        error_plain=distance.error,
        zeros=distance.zeros,
        rank=0,
        step_errors=(),
    )


def _output_error(W_OI: Tensor, quantized: QuantizedWeight, metric: FullMetric) -> float:
    """‖(W − Q) Sᵀ‖ / ‖W Sᵀ‖."""
    exact_OI = W_OI.float()
    rest_OI = dequantize(quantized).sub_(exact_OI)
    return float(metric.scale(rest_OI).norm()) / (float(metric.scale(exact_OI).norm()) or 1.0)


def initialize_paired(
    module: str, W_OI: Tensor, scheme: Scheme, factors: FactorSettings, *, method: Method, steps: int, seed: int
) -> InitializedLayer:
    """Quantize a weight together with the factors that an adapter on it starts from (LoftQ, QPiSSA)."""
    generator = torch.Generator().manual_seed(seed)
    pair = make_pair(W_OI, scheme, factors, method=method, steps=steps, generator=generator)
    if pair.error_plain is None:
        pair = replace(pair, error_plain=measure(W_OI, quantize_here(W_OI, scheme)).error)
    return report_pair(module, W_OI, pair)


def report_pair(module: str, W_OI: Tensor, pair: QuantizedPair) -> InitializedLayer:
    """A pair with its report; ``pair.error_plain`` must be known."""
    assert pair.error_plain is not None
    report = LayerReport(
        module=module,
        code=pair.quantized.scheme.code,
        num_weights=W_OI.numel(),
        bits_per_weight=bits_per_weight(pair.quantized),
        error=pair.error,
        error_alone=pair.error_alone,
        error_plain=pair.error_plain,
        zeros=share_of_zeros(pair.quantized),
        rank=len(pair.A_RI),
        step_errors=pair.step_errors,
        output_error=pair.output_error,
        output_error_plain=pair.output_error_plain,
    )
    return InitializedLayer(pair.quantized, (pair.A_RI, pair.B_OR), report)
