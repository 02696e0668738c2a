"""Export a base model as a serving graph: once a base, checked against transformers, cached by the base's digest."""

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from filelock import FileLock
from transformers import PreTrainedConfig, PreTrainedModel

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
from graftline.weights.quant.load import load_model, load_tokenizer
from graftline.weights.sidecars import copy_sidecars

logger = logging.getLogger(__name__)

_PROBE_TEXT = "Water boils at one hundred degrees at sea level, and a plant that gets no light for weeks turns pale."

LOGIT_TOLERANCE: dict[Precision, float] = {"fp32": 1e-3, "fp16": 4.0, "int4": float("inf")}
"""Largest |Δlogit| on the probe, against transformers in fp32, that the exporter accepts. For scale: transformers' own
bf16 differs by 0.7 to 2.7 on SmolLM2. int4 is lossy on purpose: its difference is only reported."""


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
        difference = logit_difference(GraphSession(folder), load_model(base), probe_tokens(base))
        logger.info("serving graph of %s: max |Δlogit| against transformers %.2g", base, difference)
        if not difference <= LOGIT_TOLERANCE[precision]:
            raise ExportError(
                f"the {precision} graph of {base} differs from transformers by {difference:.3g} in a logit, "
                f"limit {LOGIT_TOLERANCE[precision]:.3g}; nothing was written"
            )
    return layout


def cached_graph(base: Path, cache: Path, *, precision: Precision = "fp32", on_progress: OnProgress = silent) -> Path:
    """Folder of the serving graph of ``base``, exported now or earlier: one graph a base, whatever its adapters."""
    digest = read_identity(base).digest
    folder = cache / f"{digest.hex[:32]}-{precision}-v{FORMAT}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # of two that start at once, one exports and the other waits
        if not folder.exists():
            export_graph(base, folder, precision=precision, on_progress=on_progress)
    return folder


def logit_difference(
    session: GraphSession, model: PreTrainedModel, tokens: Sequence[int], adapter: Mapping[str, Any] | None = None
) -> float:
    """Largest |Δlogit| of the graph (with an adapter's inputs) against a model: a padded batch, then one token more."""
    prompts, following = [list(tokens[:13]), list(tokens[13:18])], [[tokens[18]], [tokens[19]]]
    runner, cache = session.runner(adapter), session.new_cache(2, 16)
    lengths = [len(prompt) for prompt in prompts]
    first_BTV = runner.step(cache, Step(prompts, lengths, every_position=True))
    second_BV = runner.step(cache, Step(following, [length + 1 for length in lengths]))
    difference = 0.0
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            expected_TV = model(torch.tensor([prompt + following[row]])).logits[0].float().numpy()
        found_TV = np.concatenate([first_BTV[row, : len(prompt)], second_BV[row : row + 1]])
        difference = max(difference, float(np.abs(found_TV - expected_TV).max()))
    return difference


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
