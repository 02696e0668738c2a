"""Export a base model as a serving graph: once a base, checked against transformers, cached by the base's digest."""

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from filelock import FileLock
from transformers import PreTrainedConfig, PreTrainedModel

from graftline.digest import Digest, of_json
from graftline.errors import ExportError
from graftline.export.onnx_builder import GraphBuilder
from graftline.export.onnx_graph import (
    GraphWriter,
    architecture_of,
    check_supported,
    head_dim_of,
    plan_bottlenecks,
    plan_linears,
)
from graftline.export.onnx_layout import FORMAT, GRAPH_FILE, WEIGHTS_FILE, GraphLayout, Precision
from graftline.export.onnx_session import GraphSession, Step
from graftline.progress import OnProgress, silent
from graftline.weights.config import read_config
from graftline.weights.identity import read_identity
from graftline.weights.quant.folder import DequantizingReader
from graftline.weights.quant.load import load_model
from graftline.weights.reader import read_json_object
from graftline.weights.sidecars import copy_sidecars
from graftline.weights.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

_PROBE_TEXT = "Water boils at one hundred degrees at sea level, and a plant that gets no light for weeks turns pale."

_SAYS_WHO_WROTE_IT = frozenset({"_name_or_path", "transformers_version"})
"""What a configuration says about itself and not about the model."""


@dataclass(frozen=True)
class Agreement:
    """How next-token distributions of a graph agree with a model's, over the positions of a probe."""

    max_logit_difference: float
    mean_kl: float
    """KL(model‖graph), nats."""
    top1: float
    """Share of positions at which both have the same most likely token."""

    def __str__(self) -> str:
        return f"max |Δlogit| {self.max_logit_difference:.2g}, mean KL {self.mean_kl:.2g} nats, top-1 {self.top1:.0%}"


@dataclass(frozen=True)
class Bounds:
    """What an exported graph has to keep."""

    max_mean_kl: float
    min_top1: float
    max_logit_difference: float = float("inf")

    def __str__(self) -> str:
        logit = "" if np.isinf(self.max_logit_difference) else f"max |Δlogit| {self.max_logit_difference:.2g}, "
        return f"{logit}mean KL {self.max_mean_kl:.2g} nats, top-1 {self.min_top1:.0%}"

    def hold_for(self, found: Agreement) -> bool:
        """Whether ``found`` is within them; what is not a number is not."""
        return (
            found.max_logit_difference <= self.max_logit_difference
            and found.mean_kl <= self.max_mean_kl
            and found.top1 >= self.min_top1
        )


BOUNDS: dict[Precision, Bounds] = {
    "fp32": Bounds(max_mean_kl=1e-6, min_top1=0.95, max_logit_difference=1e-3),
    "fp16": Bounds(max_mean_kl=1e-3, min_top1=0.9),
    "int4": Bounds(max_mean_kl=1.5, min_top1=0.2),
}
"""Measured on SmolLM2-135M, which is small and so sensitive, on 995 tokens of text: mean KL 2e-11 (fp32), 2e-5 (fp16),
0.31 (int4); top-1 100, 99.7 and 66 %; over the 22 tokens of the probe int4 had 0.59 and 36 %. A logit's difference says
little: fp16's largest was 0.1 and int4's 13."""


def export_graph(
    base: Path, out: Path, *, precision: Precision = "fp32", on_progress: OnProgress = silent
) -> GraphLayout:
    """Write the serving graph of the model folder ``base`` (dense or 4-bit, which is dequantized) to ``out``.

    ``out`` holds the graph, its weights, ``graph.json`` and the tokenizer's files, and appears when it is complete.

    Raises:
        ExportError: ``out`` exists, the model is not supported, or the graph's logits are not transformers'.
        NumberTypeError: a weight does not fit the precision.
    """
    reader = DequantizingReader(base)
    config = reader.config
    check_supported(config)
    layout = _layout(config, base, precision)
    with _folder_in_making(out) as folder:
        with (folder / WEIGHTS_FILE).open("wb") as weights:
            writer = GraphWriter(GraphBuilder(weights, WEIGHTS_FILE), reader, config, layout)
            model = writer.write(on_progress)
        onnx.save(model, folder / GRAPH_FILE)
        layout.write(folder)
        copy_sidecars(base, folder)
        try:
            found = agreement(GraphSession(folder), load_model(base), probe_tokens(base))
        except RuntimeError as error:  # ONNX Runtime's, in its own words
            raise ExportError(
                f"ONNX Runtime cannot compute the serving graph of {base}: {error}; serve this model with vLLM "
                "(graftline serve --print-vllm)"
            ) from error
        logger.info("serving graph of %s against transformers: %s", base, found)
        if not BOUNDS[precision].hold_for(found):
            raise ExportError(
                f"the {precision} graph of {base} differs from transformers by {found}; its bounds are "
                f"{BOUNDS[precision]}; nothing was written"
            )
    return layout


def cached_graph(base: Path, cache: Path, *, precision: Precision = "fp32", on_progress: OnProgress = silent) -> Path:
    """Folder of the serving graph of ``base``, exported now or earlier: one graph a base, whatever its adapters."""
    folder = cache / f"{graph_digest(base, precision).hex[:32]}-{precision}-v{FORMAT}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # of two that start at once, one exports and the other waits
        if not folder.exists():
            export_graph(base, folder, precision=precision, on_progress=on_progress)
    return folder


def graph_digest(base: Path, precision: Precision) -> Digest:
    """Digest of all that the serving graph of a base is made of: weights, configuration, precision, kind of graph."""
    config = read_json_object(base / "config.json")
    computed = {name: value for name, value in config.items() if name not in _SAYS_WHO_WROTE_IT}
    return of_json([str(read_identity(base).digest), computed, precision, FORMAT])


def logit_difference(
    session: GraphSession, model: PreTrainedModel, tokens: Sequence[int], adapter: Mapping[str, Any] | None = None
) -> float:
    """Largest |Δlogit| of the graph (with an adapter's inputs) against a model."""
    return agreement(session, model, tokens, adapter).max_logit_difference


def agreement(
    session: GraphSession, model: PreTrainedModel, tokens: Sequence[int], adapter: Mapping[str, Any] | None = None
) -> Agreement:
    """How the graph (with an adapter's inputs) agrees with a model: on a padded batch, then on one token more a row."""
    prompts, following = [list(tokens[:13]), list(tokens[13:18])], [[tokens[18]], [tokens[19]]]
    runner, cache = session.runner(adapter), session.new_cache(2, 16)
    lengths = [len(prompt) for prompt in prompts]
    first_BTV = runner.step(cache, Step(prompts, lengths, every_position=True))
    second_BV = runner.step(cache, Step(following, [length + 1 for length in lengths]))
    expected, found = [], []
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            expected.append(model(torch.tensor([prompt + following[row]])).logits[0].double())
        found.append(
            torch.from_numpy(np.concatenate([first_BTV[row, : len(prompt)], second_BV[row : row + 1]])).double()
        )
    expected_NV, found_NV = torch.cat(expected), torch.cat(found)
    logp_NV, logq_NV = expected_NV.log_softmax(-1), found_NV.log_softmax(-1)
    return Agreement(
        max_logit_difference=float((expected_NV - found_NV).abs().max()),
        mean_kl=float((logp_NV.exp() * (logp_NV - logq_NV)).sum(-1).mean()),
        top1=float((expected_NV.argmax(-1) == found_NV.argmax(-1)).double().mean()),
    )


def probe_tokens(base: Path) -> list[int]:
    """20 tokens of plain text: on random ones a model's logits are an accident, and ten times more sensitive.

    A tokenizer may have more tokens than the model has rows; no token here is beyond them.
    """
    tokens: list[int] = load_tokenizer(base)(_PROBE_TEXT).input_ids
    num_tokens = read_config(base).vocab_size
    return [token % num_tokens for token in (tokens * 20)[:20]]


def _layout(config: PreTrainedConfig, base: Path, precision: Precision) -> GraphLayout:
    return GraphLayout(
        base_digest=read_identity(base).digest,
        architecture=architecture_of(config),
        precision=precision,
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim_of(config),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        linears=plan_linears(config),
        bottlenecks=plan_bottlenecks(config),
    )


@contextmanager
def _folder_in_making(out: Path) -> Iterator[Path]:
    """A temporary folder beside ``out`` that gets its name at the end; what a killed run left there is removed."""
    if out.exists():
        raise ExportError(f"{out} exists; an export overwrites nothing: remove it or choose another folder")
    making = out.with_name(f".{out.name}.part")
    shutil.rmtree(making, ignore_errors=True)
    try:
        making.mkdir(parents=True)
        yield making
        making.rename(out)
    except OSError as error:
        raise ExportError(
            f"cannot write {out}: {error.strerror or error}; free space or permission is missing"
        ) from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
