"""Does the merged model answer as base + adapter did? Logits compared on given tokens.

    KL_t   = Σ_v p_t(v) · (log p_t(v) − log q_t(v))      p: unmerged, q: merged, in nats, mean over tokens
    ΔNLL_d = mean over d's tokens of −log q(next) + log p(next)      one number a sequence d, in nats a token

Where it is known which tokens are answers, ΔNLL is also given over them alone: over all tokens, prompts that the
adapter has forgotten how to write weigh more than the answers that it has learned.

Equality is not to be expected: the merged weights are rounded once more than the unmerged ones. The limits are fixed
before the comparison.

Dimensions: T = tokens of one sequence, V = vocabulary.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graftline.errors import MergeError
from graftline.logs import OnProgress, silent
from graftline.settings.model import Quantize
from graftline.weights.quant.folder import DequantizingReader, quantize_folder

_RESAMPLES = 10_000


@dataclass(frozen=True)
class ParityLimits:
    """What still counts as the same model."""

    max_logit_difference: float | None
    """Largest |Δlogit| over all tokens and the vocabulary; None: single logits may move as they will."""
    min_argmax_agreement: float
    """Share of tokens whose most likely next token is the same, 0 to 1."""
    max_mean_kl: float
    """Mean KL divergence, nats a token."""
    max_nll_change: float
    """How much worse the answers may be, nats a token: the 90 % interval of their ΔNLL must end at or below this
    (non-inferiority at 5 %). Answers that are better are no reason to stop."""

    @classmethod
    def for_dtype(cls, dtype: torch.dtype) -> "ParityLimits":
        """Limits for merged weights stored as ``dtype`` and both models computed in fp32.

        About ten times the largest that rounding did in ten small tasks and seeds (studies/merging.py) or to
        SmolLM2-135M (docs/merging.md), whichever is more. bfloat16 follows the small tasks alone: what it did to
        SmolLM2, whose weights lie on its grid, is more than rounding may do, and float16 is tried then.
        """
        if dtype == torch.float32:
            return cls(max_logit_difference=2e-3, min_argmax_agreement=0.999, max_mean_kl=2e-7, max_nll_change=1e-5)
        if dtype == torch.float16:
            return cls(max_logit_difference=0.5, min_argmax_agreement=0.985, max_mean_kl=2e-5, max_nll_change=2.5e-3)
        return cls(max_logit_difference=1.0, min_argmax_agreement=0.96, max_mean_kl=5e-4, max_nll_change=5e-3)


@dataclass(frozen=True)
class ParityReport:
    """Merged against unmerged, and whether that is within the limits."""

    num_sequences: int
    num_tokens: int
    max_logit_difference: float
    argmax_agreement: float
    mean_kl: float
    nll_change: float
    """Mean over sequences, nats a token; above zero: the merged model is worse."""
    nll_change_interval: tuple[float, float]
    """90 % bootstrap interval of ``nll_change``, resampled by sequence."""
    answer_nll_change: float
    """As ``nll_change``, over the tokens of answers alone (all tokens where it is not known which those are)."""
    answer_nll_change_interval: tuple[float, float]
    """90 % bootstrap interval of ``answer_nll_change``."""
    limits: ParityLimits
    failures: tuple[str, ...]
    """One sentence a limit that does not hold."""

    @property
    def passed(self) -> bool:
        """True when every limit holds."""
        return not self.failures

    def as_json(self) -> dict[str, Any]:
        """A JSON value with every figure, the limits and the verdict."""
        return asdict(self) | {"passed": self.passed}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ParityReport":
        """What `as_json` gave."""
        fields = {name: given for name, given in value.items() if name != "passed"}
        intervals = {name: tuple(given) for name, given in fields.items() if name.endswith("_interval")}
        limits, failures = ParityLimits(**value["limits"]), tuple(value["failures"])
        return cls(**fields | intervals | {"limits": limits, "failures": failures})


def record_logits(model: nn.Module, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """Next-token logits (T, V) in fp32 of every sequence, without padding; sets ``model`` to eval mode.

    Keep the sequences few: 500 tokens of a vocabulary of 50,000 take 100 MB.

    Raises:
        MergeError: there is no sequence of two tokens or more.
    """
    if not any(len(tokens) > 1 for tokens in sequences):
        raise MergeError(f"parity needs sequences of at least two tokens; got {len(sequences)} sequences without one")
    return list(_iterate_logits(model, sequences))


def compare_with_recorded(
    reference: Sequence[Tensor],
    merged: nn.Module,
    sequences: Sequence[Sequence[int]],
    *,
    limits: ParityLimits,
    answers: Sequence[Sequence[bool]] | None = None,
) -> ParityReport:
    """Compare the unmerged model's recorded logits with ``merged`` on the same sequences.

    One model is in memory at a time: record, drop the first model, load the second.

    Args:
        reference: what `record_logits` gave for the unmerged model.
        merged: a causal language model.
        sequences: the token ids that were recorded.
        limits: what still counts as the same.
        answers: for every token of every sequence whether it is part of an answer; None: it is not known.

    Raises:
        MergeError: the recording and the sequences do not fit together.
    """
    if answers is None:
        answers = [[True] * len(tokens) for tokens in sequences]
    if [len(logits_TV) for logits_TV in reference] != [len(tokens) for tokens in sequences]:
        raise MergeError("the recorded logits belong to other sequences; record them again on these")
    rows = [
        _compare_sequence(p_TV, q_TV, torch.tensor(tokens), torch.tensor(marks, dtype=torch.bool))
        for p_TV, q_TV, tokens, marks in zip(
            reference, _iterate_logits(merged, sequences), sequences, answers, strict=True
        )
    ]
    return _report(rows, limits)


@torch.no_grad()
def _iterate_logits(model: nn.Module, sequences: Iterable[Sequence[int]]) -> Iterator[Tensor]:
    model.eval()  # dropout would compare two random numbers
    device = next(model.parameters()).device
    for tokens in sequences:
        logits_TV: Tensor = model(torch.tensor([list(tokens)], device=device)).logits[0]
        yield logits_TV.float().cpu()


@dataclass(frozen=True)
class _Row:
    """One sequence's figures."""

    num_tokens: int
    max_logit_difference: float
    num_agreeing: int
    sum_kl: float
    nll_change: float | None
    answer_nll_change: float | None


def _compare_sequence(p_TV: Tensor, q_TV: Tensor, tokens_T: Tensor, is_answer_T: Tensor) -> _Row:
    if p_TV.shape != q_TV.shape:
        raise MergeError(
            f"the models' logits have shapes {tuple(p_TV.shape)} and {tuple(q_TV.shape)}: another vocabulary"
        )
    log_p_TV, log_q_TV = p_TV.log_softmax(-1), q_TV.log_softmax(-1)
    next_T1 = tokens_T[1:, None]
    gain_T = (log_p_TV[:-1].gather(1, next_T1) - log_q_TV[:-1].gather(1, next_T1))[:, 0].double()
    answer_gain_T = gain_T[is_answer_T[1:]]
    return _Row(
        num_tokens=len(tokens_T),
        max_logit_difference=float((p_TV - q_TV).abs().max()),
        num_agreeing=int((p_TV.argmax(-1) == q_TV.argmax(-1)).sum()),
        sum_kl=float((log_p_TV.exp() * (log_p_TV - log_q_TV)).double().sum()),
        nll_change=float(gain_T.mean()) if len(gain_T) else None,
        answer_nll_change=float(answer_gain_T.mean()) if len(answer_gain_T) else None,
    )


def _report(rows: Sequence[_Row], limits: ParityLimits) -> ParityReport:
    num_tokens = sum(row.num_tokens for row in rows)
    changes = np.array([row.nll_change for row in rows if row.nll_change is not None])
    answer_changes = np.array([row.answer_nll_change for row in rows if row.answer_nll_change is not None])
    if not len(answer_changes):
        raise MergeError("no token of the sequences is marked as part of an answer; give rows with supervised tokens")
    low, high = _bootstrap_interval(changes)
    answers = _bootstrap_interval(answer_changes)
    figures = {
        "max_logit_difference": max(row.max_logit_difference for row in rows),
        "argmax_agreement": sum(row.num_agreeing for row in rows) / num_tokens,
        "mean_kl": sum(row.sum_kl for row in rows) / num_tokens,
    }
    return ParityReport(
        num_sequences=len(rows),
        num_tokens=num_tokens,
        **figures,
        nll_change=float(changes.mean()),
        nll_change_interval=(low, high),
        answer_nll_change=float(answer_changes.mean()),
        answer_nll_change_interval=answers,
        limits=limits,
        failures=tuple(_failures(figures, answers, limits)),
    )


def _bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """90 % percentile interval of the mean; the seed is fixed so that a report can be repeated."""
    picks = np.random.default_rng(0).integers(0, len(values), size=(_RESAMPLES, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [0.05, 0.95])
    return float(low), float(high)


def _failures(figures: dict[str, float], answers: tuple[float, float], limits: ParityLimits) -> Iterator[str]:
    # `not (… <= …)` so that NaN fails.
    largest = limits.max_logit_difference
    if largest is not None and not figures["max_logit_difference"] <= largest:
        yield f"max |Δlogit| is {figures['max_logit_difference']:.3g}, limit {largest:.3g}"
    if not figures["argmax_agreement"] >= limits.min_argmax_agreement:
        yield f"argmax agreement is {figures['argmax_agreement']:.4f}, limit {limits.min_argmax_agreement:.4f}"
    if not figures["mean_kl"] <= limits.max_mean_kl:
        yield f"mean KL is {figures['mean_kl']:.3g} nats, limit {limits.max_mean_kl:.3g}"
    low, high = answers
    if not high <= limits.max_nll_change:
        yield (
            f"ΔNLL of the answers is within [{low:+.3g}, {high:+.3g}] nats a token (90 % interval), limit "
            f"{limits.max_nll_change:+.3g}"
        )


# Quantize a merged model again, and say how much of the adapter survived.
#
# A step between two NF4 codes is often larger than what training changed, so part of the update is rounded away and
# noise is added. With W the base's dequantized weight, W' = W + ΔW the merged one, W'' the
# requantized one:
#
#     kept  = ⟨W'' − W, ΔW⟩ / ‖ΔW‖²        the part of the update that is still there; 1: all of it
#     noise = ‖W'' − W'‖ / ‖ΔW‖            what rounding added, in units of the update
#
# Whether such a model may be used is for evidence to say: compare its logits with the unmerged model's
# (limits `REQUANTIZED_LIMITS`).

REQUANTIZED_LIMITS = ParityLimits(
    max_logit_difference=None, min_argmax_agreement=0.9, max_mean_kl=0.05, max_nll_change=0.01
)
"""What a requantized model must keep to: 0.01 nats, the margin for 4 bits; single logits may move."""


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
