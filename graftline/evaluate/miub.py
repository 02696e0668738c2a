"""MIUB: an upper bound on how much an adapter's output can depend on the frozen layer's output.

The name comes from Zhang et al. 2025 (arXiv 2501.03152), whose equations could not be read. The definition here is
ours. For a layer and a token t, let u_t be the frozen layer's output and v_t what the adapter adds, each feature
standardized over all tokens, and

    p_t = softmax(u_t), q_t = softmax(v_t)      over the O features
    J ~ p_T, K ~ q_T                            given T, uniform over the n tokens, independently

J – T – K is a Markov chain, so by the data processing inequality

    I(J; K) <= min{ I(J; T), I(K; T) } = min{ mean_t KL(p_t || p̄), mean_t KL(q_t || q̄) } =: MIUB

in nats, at most min(ln O, ln n). Both terms are reported. mean_t KL(p_t || p̄) = H(p̄) - mean_t H(p_t), so sums over
each document's tokens suffice, and documents can be resampled.

Smaller is not simply better: at step 0, v = 0, q is uniform and MIUB = 0. Compare trained adapters of the same budget,
on the same tokens, together with the norm ratio. Its bias depends on n.

Tensor names: D documents, T tokens of one document, I and O input and output features, R resamples.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from graftline.adapters.attach import adapter_layers
from graftline.adapters.base import AdapterLayer
from graftline.errors import EvaluationError
from graftline.evaluate.parts import evaluating, require_finite
from graftline.logs import OnProgress, silent

Floats = npt.NDArray[np.float64]
NUM_RESAMPLES = 1000


@dataclass(frozen=True)
class LayerMiub:
    """One adapted layer, in nats; ``norm_ratio`` is the root mean square of v over that of u."""

    name: str
    frozen_term: float
    adapter_term: float
    norm_ratio: float

    @property
    def bound(self) -> float:
        """MIUB: the smaller of the two terms."""
        return min(self.frozen_term, self.adapter_term)

    @property
    def kind(self) -> str:
        """Last part of the layer's name, such as ``q_proj``."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Miub:
    """Mean over layers with its interval (two-sided, 1 - 2 alpha, documents resampled), and every layer."""

    mean: float
    interval: tuple[float, float]
    num_tokens: int
    num_documents: int
    layers: tuple[LayerMiub, ...]

    def by_kind(self) -> dict[str, float]:
        """Mean bound of the layers of each kind."""
        kinds = sorted({layer.kind for layer in self.layers})
        return {kind: float(np.mean([layer.bound for layer in self.layers if layer.kind == kind])) for kind in kinds}

    def numbers(self) -> dict[str, float]:
        """For `Scores.numbers`: the mean with its interval, both one-sided terms and the norm ratio, and every kind."""

        def mean(values: Iterable[float]) -> float:
            return float(np.mean(list(values)))

        return {
            "miub": self.mean,
            "miub_low": self.interval[0],
            "miub_high": self.interval[1],
            "miub_frozen_term": mean(layer.frozen_term for layer in self.layers),
            "miub_adapter_term": mean(layer.adapter_term for layer in self.layers),
            "miub_norm_ratio": mean(layer.norm_ratio for layer in self.layers),
        } | {f"miub_{kind}": value for kind, value in self.by_kind().items()}


@dataclass
class _Moments:
    """Running sums over tokens of u and v: count, sum and sum of squares by feature (O)."""

    num_tokens: int = 0
    sums: list[torch.Tensor] = field(default_factory=list)
    squares: list[torch.Tensor] = field(default_factory=list)

    def add(self, *outputs_TO: torch.Tensor) -> None:
        """Add one document's u and v."""
        self.num_tokens += len(outputs_TO[0])
        sums = [output_TO.double().sum(0) for output_TO in outputs_TO]
        squares = [output_TO.double().square().sum(0) for output_TO in outputs_TO]
        self.sums = sums if not self.sums else [a + b for a, b in zip(self.sums, sums, strict=True)]
        self.squares = squares if not self.squares else [a + b for a, b in zip(self.squares, squares, strict=True)]

    def standardize(self, output_TO: torch.Tensor, which: int) -> torch.Tensor:
        """Mean 0 and variance 1 by feature; a feature without variance is 0 everywhere."""
        mean_O = self.sums[which] / self.num_tokens
        variance_O = (self.squares[which] / self.num_tokens - mean_O.square()).clamp_min(0)
        # Below this share of the mean square, the variance is rounding error of the sums.
        floor_O = self.squares[which] / self.num_tokens * 1e-12
        scale_O = torch.where(variance_O > floor_O, variance_O.rsqrt(), torch.zeros_like(variance_O))
        return (output_TO.double() - mean_O) * scale_O

    def norm_ratio(self) -> float:
        """Root mean square of v over that of u."""
        frozen, added = (float(squares.sum()) for squares in self.squares)
        return (added / frozen) ** 0.5 if frozen > 0 else 0.0


@dataclass
class _Shares:
    """For u and v, by document: summed softmax (O) and summed entropy."""

    shares: tuple[list[Floats], list[Floats]] = field(default_factory=lambda: ([], []))
    entropies: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))

    def add(self, which: int, standardized_TO: torch.Tensor) -> None:
        """Add one document."""
        log_p_TO = standardized_TO.log_softmax(-1)
        p_TO = log_p_TO.exp()
        self.shares[which].append(p_TO.sum(0).cpu().numpy())
        self.entropies[which].append(float(-(p_TO * log_p_TO).sum()))

    def term(self, which: int, weights_RD: Floats, tokens_D: Floats) -> Floats:
        """H(p̄) - mean_t H(p_t) with documents weighted, for every row of weights (R)."""
        num_tokens_R = weights_RD @ tokens_D
        mean_RO = weights_RD @ np.array(self.shares[which]) / num_tokens_R[:, None]
        entropy_R = -(mean_RO * np.log(np.clip(mean_RO, 1e-300, None))).sum(axis=1)
        return np.asarray(entropy_R - weights_RD @ np.array(self.entropies[which]) / num_tokens_R)


def measure_miub(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    *,
    alpha: float = 0.05,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    on_progress: OnProgress = silent,
) -> Miub:
    """Measure every adapted layer on fixed held-out tokens.

    Every document passes through the model twice, first for the features' means and variances. Memory: documents ×
    output features × 16 bytes per layer.

    Args:
        model: a model with an adapter (`graftline.adapters.attach`), in fp32.
        documents: token ids; the same set for all adapters that are compared.
        alpha: one-sided error of each end of the interval.
        num_resamples: bootstrap resamples of documents. Standardization is not repeated for them.
        seed: seed of the resampling.
        on_progress: called with the passes done and the total.

    Raises:
        EvaluationError: no adapter, one on experts, fewer than two documents, an empty document, or non-finite outputs.
    """
    layers = adapter_layers(model)
    if any(layer.kind == "experts" for layer in layers.values()):
        raise EvaluationError("MIUB relates layers that read every token, and experts read some; train without them")
    if not layers:
        raise EvaluationError("the model has no adapter, so there is nothing that MIUB could relate; attach one first")
    if len(documents) < 2 or not all(documents):
        raise EvaluationError(f"{len(documents)} documents; MIUB needs at least two, each of at least one token")
    moments = {name: _Moments() for name in layers}
    shares = {name: _Shares() for name in layers}
    with evaluating(model):
        for done, document in enumerate(documents, start=1):
            for name, (frozen_TO, added_TO) in _outputs(model, layers, document).items():
                moments[name].add(frozen_TO, added_TO)
            on_progress(done, 2 * len(documents))
        for done, document in enumerate(documents, start=len(documents) + 1):
            for name, outputs in _outputs(model, layers, document).items():
                for which, output_TO in enumerate(outputs):
                    shares[name].add(which, moments[name].standardize(output_TO, which))
            on_progress(done, 2 * len(documents))
    tokens_D = np.array([len(document) for document in documents], dtype=np.float64)
    return _summarize(moments, shares, tokens_D, _weights(len(documents), num_resamples, seed), alpha)


def _weights(num_documents: int, num_resamples: int, seed: int) -> Floats:
    """Weights of the documents: all 1 in the first row, then how often each resample drew them."""
    drawn = np.random.default_rng(seed).multinomial(
        num_documents, np.full(num_documents, 1 / num_documents), size=num_resamples
    )
    return np.vstack([np.ones(num_documents), drawn]).astype(np.float64)


def _summarize(
    moments: dict[str, _Moments], shares: dict[str, _Shares], tokens_D: Floats, weights_RD: Floats, alpha: float
) -> Miub:
    found, bounds = [], []
    for name, share in shares.items():
        frozen_R, added_R = (share.term(which, weights_RD, tokens_D) for which in (0, 1))
        require_finite([frozen_R[0], added_R[0]], f"layer {name}")
        found.append(LayerMiub(name, float(frozen_R[0]), float(added_R[0]), moments[name].norm_ratio()))
        bounds.append(np.minimum(frozen_R, added_R))
    mean_R = np.mean(bounds, axis=0)
    low, high = np.quantile(mean_R[1:], [alpha, 1 - alpha])
    return Miub(float(mean_R[0]), (float(low), float(high)), int(tokens_D.sum()), len(tokens_D), tuple(found))


Outputs = tuple[torch.Tensor, torch.Tensor]


def _outputs(model: PreTrainedModel, layers: dict[str, AdapterLayer], document: Sequence[int]) -> dict[str, Outputs]:
    """For each layer, what the frozen layer computes (W x without bias) and what the adapter adds: (T, O) each."""
    found: dict[str, Outputs] = {}
    with contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(_recording(layer, found, name))
        model(input_ids=torch.tensor([list(document)], device=model.device), use_cache=False, logits_to_keep=1)
    return found


@contextlib.contextmanager
def _recording(layer: AdapterLayer, found: dict[str, Outputs], name: str) -> Iterator[None]:
    def record(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        frozen = layer.base(inputs[0])
        added = output - frozen
        frozen = frozen if layer.bias is None else frozen - layer.bias
        found[name] = frozen.flatten(0, -2).float(), added.flatten(0, -2).float()

    handle = layer.register_forward_hook(record)
    try:
        yield
    finally:
        handle.remove()
