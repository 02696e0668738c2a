"""What an initialization did to each layer, as data."""

from dataclasses import asdict, dataclass
from typing import Any

from graftline.digest import Digest

REPORT_FILE = "quantization.json"


@dataclass(frozen=True)
class LayerReport:
    """One quantized weight. Errors are relative Frobenius norms, ‖W − …‖ / ‖W‖.

    error: what is left with the initial adapter, ‖W − Q − sBA‖. error_alone: without it, ‖W − Q‖. error_plain: of
    plain quantization of W, ‖W − q(W)‖. step_errors: ``error`` after each step of LoftQ or QPiSSA; the best was kept.
    bits_per_weight counts codes and constants. zeros: share of weights that became exactly 0.
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


@dataclass(frozen=True)
class InitReport:
    """digest: of the new base. pair: of the initial factors that belong to it, None when there are none.

    peak_bytes_bound: what was promised beforehand for tensors in memory.
    """

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
        """The report as it lies in `quantization.json`."""
        return {
            "digest": str(self.digest),
            "pair": None if self.pair is None else str(self.pair),
            "bits_per_weight": self.bits_per_weight,
            "peak_bytes_bound": self.peak_bytes_bound,
            "layers": [asdict(layer) for layer in self.layers],
        }


def layer_from_json(value: dict[str, Any]) -> LayerReport:
    """The inverse of ``asdict``."""
    return LayerReport(**(value | {"step_errors": tuple(value["step_errors"])}))
