"""Does the merged model answer as base + adapter did? Compares logits on given tokens.

    KL_t   = Σ_v p_t(v) · (log p_t(v) − log q_t(v))      p: unmerged, q: merged, in nats, mean over tokens
    ΔNLL_d = mean over d's tokens of −log q(next) + log p(next)      one number a sequence d, in nats a token

ΔNLL is also computed over the answers' tokens alone: over all tokens, prompts, which the adapter has forgotten how to
write, would outweigh the answers that it has learned.

The two are not expected to be equal, because the merged weights are rounded once more. The limits are fixed beforehand.

One model is in memory at a time. Of the first its head stays, and what the head was given for each sequence: at a
vocabulary of 150,000 that is 30 times less than its logits. Both models' logits are then compared in chunks.

Dimensions: T = tokens of one sequence, C = tokens of a chunk, H = hidden size, V = vocabulary.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from graftline.errors import MergeError
from graftline.logs import OnProgress, silent
from graftline.settings.model import Quantize
from graftline.weights.head import hidden_states, logits_of, without_decoder
from graftline.weights.quant.folder import Calibration, DequantizingReader, quantize_folder

_RESAMPLES = 10_000
_CHUNK_BYTES = 64 << 20
"""Size of one model's logits; about six arrays of that size exist at once."""


@dataclass(frozen=True)
class ParityLimits:
    """What still counts as the same model."""

    max_logit_difference: float | None
    """Largest |Δlogit| over all tokens and the vocabulary; None: no limit."""
    min_argmax_agreement: float
    """Share of positions with the same most likely token, 0 to 1."""
    max_mean_kl: float
    """Mean KL divergence, nats a token."""
    max_nll_change: float
    """How much worse the answers may be, nats a token: the 90 % interval of their ΔNLL must end at or below this
    (non-inferiority at 5 %). Answers may become better."""

    @classmethod
    def for_dtype(cls, dtype: torch.dtype) -> "ParityLimits":
        """Limits for merged weights stored as ``dtype``, with both models computed in fp32.

        About ten times the largest effect of rounding in ten small tasks and seeds (studies/merging.py) or on
        SmolLM2-135M (docs/merging.md), whichever is larger. For bfloat16 the small tasks alone: on SmolLM2, whose
        weights are bfloat16 numbers, it does too much, and float16 is tried instead.
        """
        if dtype == torch.float32:
            return cls(max_logit_difference=2e-3, min_argmax_agreement=0.999, max_mean_kl=2e-7, max_nll_change=1e-5)
        if dtype == torch.float16:
            return cls(max_logit_difference=0.5, min_argmax_agreement=0.985, max_mean_kl=2e-5, max_nll_change=2.5e-3)
        return cls(max_logit_difference=1.0, min_argmax_agreement=0.96, max_mean_kl=5e-4, max_nll_change=5e-3)


@dataclass(frozen=True)
class ParityReport:
    """The comparison of the merged with the unmerged model."""

    num_sequences: int
    num_tokens: int
    max_logit_difference: float
    argmax_agreement: float
    mean_kl: float
    nll_change: float
    """Mean over sequences, nats a token; positive: the merged model is worse."""
    nll_change_interval: tuple[float, float]
    """90 % bootstrap interval of ``nll_change``, resampled by sequence."""
    answer_nll_change: float
    """As ``nll_change``, over the answers' tokens alone."""
    answer_nll_change_interval: tuple[float, float]
    """90 % bootstrap interval of ``answer_nll_change``."""
    limits: ParityLimits
    failures: tuple[str, ...]
    """A sentence for each limit that is exceeded."""

    @property
    def passed(self) -> bool:
        """Whether every limit holds."""
        return not self.failures

    def as_json(self) -> dict[str, Any]:
        """A JSON value with all figures, the limits and whether they hold."""
        return asdict(self) | {"passed": self.passed}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ParityReport":
        """What `as_json` gave."""
        fields = {name: given for name, given in value.items() if name != "passed"}
        intervals = {name: tuple(given) for name, given in fields.items() if name.endswith("_interval")}
        limits, failures = ParityLimits(**value["limits"]), tuple(value["failures"])
        return cls(**fields | intervals | {"limits": limits, "failures": failures})


@dataclass(frozen=True)
class Recorded:
    """A model's answers to some sequences: its head's inputs (T, H) for each, and the head."""

    hidden: list[Tensor]
    """In main memory."""
    head: PreTrainedModel
    """The model without its decoder (`graftline.weights.head.without_decoder`)."""


def record(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> Recorded:
    """A model's answers to every sequence; of the model itself only the head is kept.

    Raises:
        MergeError: no sequence has two tokens.
    """
    if not any(len(tokens) > 1 for tokens in sequences):
        raise MergeError(f"parity needs sequences of at least two tokens; got {len(sequences)} sequences without one")
    hidden = [states_TH.cpu() for states_TH in _run(model, sequences)]
    return Recorded(hidden, without_decoder(model))


@torch.no_grad()
def compare_with_recorded(
    reference: Recorded,
    merged: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    *,
    limits: ParityLimits,
    answers: Sequence[Sequence[bool]],
) -> ParityReport:
    """Compare the unmerged model, as `record` left it, with a merged model on the same sequences.

    ``answers`` says of every token whether it is part of an answer.

    Raises:
        MergeError: the records and the sequences do not belong together.
    """
    if [len(hidden_TH) for hidden_TH in reference.hidden] != [len(tokens) for tokens in sequences]:
        raise MergeError("the recorded answers belong to other sequences; record them again on these")
    rows = []
    pairs = zip(reference.hidden, _run(merged, sequences), sequences, answers, strict=True)
    for before_TH, after_TH, tokens, marks in pairs:
        chunks = _logits_of_both(reference.head, before_TH, merged, after_TH)
        rows.append(_compare_sequence(chunks, torch.tensor(tokens), torch.tensor(marks, dtype=torch.bool)))
    return _report(rows, limits)


@torch.no_grad()
def _run(model: PreTrainedModel, sequences: Iterable[Sequence[int]]) -> Iterator[Tensor]:
    """The head's inputs (T, H) for each sequence, without padding."""
    model.eval()  # dropout would compare two random numbers
    for tokens in sequences:
        ids = torch.tensor([list(tokens)], dtype=torch.long, device=model.device)
        # An empty sequence has no answers, and not every model accepts one.
        yield hidden_states(model, input_ids=ids)[0] if tokens else torch.empty(0, 0)


def _logits_of_both(
    before: PreTrainedModel, before_TH: Tensor, after: PreTrainedModel, after_TH: Tensor
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The first token of each chunk, and both models' logits (C, V) of it, on the second's device."""
    words = [int(model.config.get_text_config().vocab_size) for model in (before, after)]
    if words[0] != words[1]:
        raise MergeError(f"the models' logits have {words[0]} and {words[1]} columns: another vocabulary")
    before_TH = before_TH.to(before.device)
    pairs = zip(
        logits_of(before, before_TH, chunk_bytes=_CHUNK_BYTES),
        logits_of(after, after_TH, chunk_bytes=_CHUNK_BYTES),
        strict=True,
    )
    for (first, p_CV), (_, q_CV) in pairs:
        yield first, p_CV, q_CV.to(p_CV.device)


@dataclass(frozen=True)
class _Row:
    """The figures of one sequence."""

    num_tokens: int
    max_logit_difference: float
    num_agreeing: int
    sum_kl: float
    nll_change: float | None
    answer_nll_change: float | None


def _compare_sequence(chunks: Iterable[tuple[int, Tensor, Tensor]], tokens_T: Tensor, is_answer_T: Tensor) -> _Row:
    largest, num_agreeing, sum_kl = 0.0, 0, 0.0
    gain_T = torch.zeros(max(0, len(tokens_T) - 1), dtype=torch.float64)
    for first, p_CV, q_CV in chunks:
        log_p_CV, log_q_CV = p_CV.log_softmax(-1), q_CV.log_softmax(-1)
        next_C1 = tokens_T[first + 1 : first + 1 + len(p_CV), None].to(p_CV.device)
        gain = log_p_CV[: len(next_C1)].gather(1, next_C1) - log_q_CV[: len(next_C1)].gather(1, next_C1)
        gain_T[first : first + len(next_C1)] = gain[:, 0].double().cpu()
        difference = float((p_CV - q_CV).abs().max())
        largest = difference if not difference <= largest else largest  # NaN stays
        num_agreeing += int((p_CV.argmax(-1) == q_CV.argmax(-1)).sum())
        sum_kl += float((log_p_CV.exp() * (log_p_CV - log_q_CV)).double().sum())
    answer_gain_T = gain_T[is_answer_T[1:]]
    return _Row(
        num_tokens=len(tokens_T),
        max_logit_difference=largest,
        num_agreeing=num_agreeing,
        sum_kl=sum_kl,
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
    """90 % percentile interval of the mean; the fixed seed makes reports reproducible."""
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


# Quantizing a merged model again, and how much of the adapter survives it.
#
# A step between two NF4 codes is often larger than training's change, so part of the update is rounded away and noise
# is added. With W the base's dequantized weight, W' = W + ΔW the merged and W'' the requantized one:
#
#     kept  = ⟨W'' − W, ΔW⟩ / ‖ΔW‖²        the part of the update that survives; 1: all of it
#     noise = ‖W'' − W'‖ / ‖ΔW‖            what rounding added, relative to the update

REQUANTIZED_LIMITS = ParityLimits(
    max_logit_difference=None, min_argmax_agreement=0.9, max_mean_kl=0.05, max_nll_change=0.01
)
"""Limits of a requantized model: 0.01 nats, the margin for 4 bits, and none on single logits."""


@dataclass(frozen=True)
class LayerLoss:
    """What requantizing did to one layer."""

    name: str
    kept: float
    noise: float
    update: float
    """‖ΔW‖ / ‖W‖."""


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
        """The share of the update that is lost, mean over layers; negative if rounding enlarged it."""
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
    merged: Path,
    out: Path,
    *,
    base: Path,
    quantize: Quantize,
    rows: Sequence[Sequence[int]] | None = None,
    on_progress: OnProgress = silent,
) -> RequantizeReport:
    """Write ``merged`` (`graftline.merge.fold.merge_folder`) as a quantized folder; compare its layers with ``base``.

    transformers loads an NF4 folder as a bitsandbytes 4-bit model.

    Args:
        merged: the dense folder to quantize.
        out: the folder to make.
        base: the folder that the adapter was folded into.
        quantize: how; ``init`` is ignored.
        rows: token ids of calibration rows, on which rounding errors are compensated; None: to the nearest code.
        on_progress: called with (tensors done, all tensors).

    Raises:
        MergeError: nothing differs between ``merged`` and ``base``.
        QuantizeError, CheckpointError: as `graftline.weights.quant.folder.quantize_folder`.
    """
    calibration = None if rows is None else Calibration(rows, base)
    quantize_folder(merged, out, quantize=quantize, calibration=calibration, on_progress=on_progress)
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
    """None if the adapter changed nothing."""
    update_OI = merged_OI - base_OI
    square = float(update_OI.square().sum(dtype=torch.float64))
    if square == 0:
        return None
    kept = float(((rounded_OI - base_OI) * update_OI).sum(dtype=torch.float64)) / square
    noise = float((rounded_OI - merged_OI).square().sum(dtype=torch.float64) / square) ** 0.5
    return LayerLoss(name, kept, noise, (square / float(base_OI.square().sum(dtype=torch.float64))) ** 0.5)
