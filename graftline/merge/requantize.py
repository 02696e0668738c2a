"""Quantize a merged model again, and say how much of the adapter survived.

A step between two NF4 codes is often larger than what training changed, so part of the update is rounded away and noise
is added (METHODS.md §1.4). With W the base's dequantized weight, W' = W + ΔW the merged one, W'' the requantized one:

    kept  = ⟨W'' − W, ΔW⟩ / ‖ΔW‖²        the part of the update that is still there; 1: all of it
    noise = ‖W'' − W'‖ / ‖ΔW‖            what rounding added, in units of the update

Whether such a model may be used is for evidence to say: compare its logits with the unmerged model's
(`graftline.merge.parity`, limits `REQUANTIZED_LIMITS`).
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from graftline.errors import MergeError
from graftline.merge.parity import ParityLimits
from graftline.progress import OnProgress, silent
from graftline.settings.model import Quantize
from graftline.weights.quant.folder import DequantizingReader, quantize_folder

REQUANTIZED_LIMITS = ParityLimits(
    max_logit_difference=None, min_argmax_agreement=0.9, max_mean_kl=0.05, max_nll_change=0.01
)
"""What a requantized model must keep to: METHODS.md §6's margin for 4 bits, 0.01 nats; single logits may move."""


@dataclass(frozen=True)
class LayerLoss:
    """What requantizing did to one layer."""

    name: str
    kept: float
    noise: float
    update: float
    """‖ΔW‖ / ‖W‖: how large the update is."""


@dataclass(frozen=True)
class RequantizeReport:
    """What requantizing did to every layer that the adapter changed."""

    layers: tuple[LayerLoss, ...]

    @property
    def kept(self) -> float:
        """Mean over layers."""
        return sum(layer.kept for layer in self.layers) / len(self.layers)

    @property
    def vanished(self) -> float:
        """The share of the update that is gone, mean over layers; below 0 where rounding made it larger."""
        return 1 - self.kept

    @property
    def noise(self) -> float:
        """Mean over layers."""
        return sum(layer.noise for layer in self.layers) / len(self.layers)

    def as_json(self) -> dict[str, Any]:
        """A JSON value."""
        return {
            "kept": self.kept,
            "vanished": self.vanished,
            "noise": self.noise,
            "layers": [asdict(layer) for layer in self.layers],
        }


def requantize_folder(
    merged: Path, out: Path, *, base: Path, quantize: Quantize, on_progress: OnProgress = silent
) -> RequantizeReport:
    """Write ``merged`` as a quantized folder ``out``, and compare layer by layer with the base.

    Args:
        merged: what `graftline.merge.fold.merge_folder` made of ``base`` and an adapter.
        out: the folder to make; transformers loads it as a bitsandbytes 4-bit model where the method is NF4.
        base: the folder that the adapter was trained on, dense or quantized.
        quantize: how to quantize; without an adapter's first values, whatever ``init`` says.
        on_progress: called with (tensors written and compared, all).

    Raises:
        MergeError: nothing differs between ``merged`` and ``base``.
        QuantizeError, CheckpointError: as `graftline.weights.quant.folder.quantize_folder`.
    """
    quantize_folder(merged, out, quantize=quantize, on_progress=on_progress)
    before, exact, after = (DequantizingReader(folder) for folder in (base, merged, out))
    layers = []
    for name in (name for name in after.names() if after.is_quantized(name)):
        loss = _compare(name.removesuffix(".weight"), *(reader.read(name).float() for reader in (before, exact, after)))
        if loss is not None:
            layers.append(loss)
    if not layers:
        raise MergeError(f"{merged} and {base} hold the same weights; give a merged model and its base")
    return RequantizeReport(tuple(layers))


def _compare(name: str, base_OI: torch.Tensor, merged_OI: torch.Tensor, rounded_OI: torch.Tensor) -> LayerLoss | None:
    """None where the adapter changed nothing."""
    update_OI = merged_OI - base_OI
    square = float(update_OI.square().sum(dtype=torch.float64))
    if square == 0:
        return None
    kept = float(((rounded_OI - base_OI) * update_OI).sum(dtype=torch.float64)) / square
    noise = float((rounded_OI - merged_OI).square().sum(dtype=torch.float64) / square) ** 0.5
    return LayerLoss(name, kept, noise, (square / float(base_OI.square().sum(dtype=torch.float64))) ** 0.5)
