"""Export a base as a serving graph, and adapters as files for it; both are compared with transformers."""

import functools
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from filelock import FileLock
from onnx import TensorProto, helper
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from graftline.adapters.bottleneck import Bottleneck
from graftline.adapters.peft_format import AdapterWeights, load_adapter
from graftline.digest import Digest, of_file, of_json, rename_synced
from graftline.errors import BaseMismatchError, ExportError
from graftline.export.onnx_builder import GraphBuilder
from graftline.export.onnx_graph import GraphWriter, plan_bottlenecks, plan_linears
from graftline.export.onnx_session import (
    FORMAT,
    GRAPH_FILE,
    HEAD_INPUT,
    RELU_SWITCH,
    WEIGHTS_FILE,
    FusedLinear,
    GraphLayout,
    GraphSession,
    Precision,
    Step,
)
from graftline.export.served_models import architecture_of, check_supported, head_dim_of, max_served_positions
from graftline.logs import OnProgress, silent
from graftline.weights.cast import cast
from graftline.weights.identity import read_identity
from graftline.weights.model_folder import load_tokenizer, read_config
from graftline.weights.quant.folder import DequantizingReader
from graftline.weights.quant.linear import load_model
from graftline.weights.writer import copy_sidecars

logger = logging.getLogger(__name__)

_PROBE_TEXT = "Water boils at one hundred degrees at sea level, and a plant that gets no light for weeks turns pale."


def check_precision(precision: Precision, device: str) -> None:
    """Refuse a number type that ONNX Runtime does not compute in on a device; raises ExportError."""
    if precision == "bf16" and device == "cpu":
        raise ExportError(
            "ONNX Runtime computes bf16 on a GPU only, and the device is the cpu; serve with --precision fp32, or with "
            "--device cuda"
        )


@dataclass(frozen=True)
class Agreement:
    """How a graph's next-token distributions agree with a model's, over the positions of a probe."""

    max_logit_difference: float
    mean_kl: float
    """KL(model‖graph), nats."""
    top1: float
    """Share of positions with the same most likely token."""

    def __str__(self) -> str:
        return f"max |Δlogit| {self.max_logit_difference:.2g}, mean KL {self.mean_kl:.2g} nats, top-1 {self.top1:.0%}"


@dataclass(frozen=True)
class Bounds:
    """Limits that an exported graph must keep."""

    max_mean_kl: float
    min_top1: float
    max_logit_difference: float = float("inf")

    def __str__(self) -> str:
        logit = "" if np.isinf(self.max_logit_difference) else f"max |Δlogit| {self.max_logit_difference:.2g}, "
        return f"{logit}mean KL {self.max_mean_kl:.2g} nats, top-1 {self.min_top1:.0%}"

    def hold_for(self, found: Agreement) -> bool:
        """Whether ``found`` is within the limits; NaN is not."""
        return (
            found.max_logit_difference <= self.max_logit_difference
            and found.mean_kl <= self.max_mean_kl
            and found.top1 >= self.min_top1
        )


BOUNDS: dict[Precision, Bounds] = {
    "fp32": Bounds(max_mean_kl=1e-6, min_top1=0.95, max_logit_difference=1e-3),
    "fp16": Bounds(max_mean_kl=1e-3, min_top1=0.9),
    "bf16": Bounds(max_mean_kl=2e-2, min_top1=0.8),
    "int4": Bounds(max_mean_kl=1.5, min_top1=0.2),
}
"""Measured on SmolLM2-135M, a small and so sensitive model, on 995 tokens of text: mean KL 2e-11 (fp32), 2e-5 (fp16),
0.31 (int4); top-1 100, 99.7 and 66 %; over the 22 tokens of the probe int4 had 0.59 and 36 %. Differences of single
logits say little: fp16's largest was 0.1 and int4's 13. bf16 had 1.3e-3 and 97 % in transformers on a CPU; the graph
itself needs a GPU."""

_WIDER: dict[Precision, str] = {
    "fp32": "serve this base with vLLM (graftline serve --print-vllm)",
    "fp16": "--precision fp32 on a cpu, or bf16 on a GPU, also holds activations beyond float16",
    "bf16": "serve this base with vLLM (graftline serve --print-vllm)",
    "int4": "take --precision fp32",
}
"""What to do if a graph differs from its model."""


def export_graph(
    base: Path,
    out: Path,
    *,
    precision: Precision = "fp32",
    device: str = "cpu",
    on_progress: OnProgress = silent,
) -> GraphLayout:
    """Write the serving graph of the model folder ``base`` (dense, or 4-bit and then dequantized) to ``out``.

    ``out`` holds the graph, its weights, ``graph.json`` and the tokenizer's files, and appears when it is complete. Its
    logits are computed on ``device`` and compared with transformers'.

    Raises:
        ExportError: ``out`` exists, the model is not supported, or the graph's logits are not transformers'.
        NumberTypeError: a weight does not fit the precision.
    """
    check_precision(precision, device)
    reader = DequantizingReader(base)
    config = reader.config
    check_supported(config)
    layout = layout_of(config, base, precision)
    with _folder_in_making(out) as folder:
        write_graph(reader, layout, folder, on_progress)
        copy_sidecars(base, folder)
        try:
            found = agreement(GraphSession(folder, device=device), load_model(base), probe_tokens(base))
        except RuntimeError as error:  # ONNX Runtime's
            raise ExportError(
                f"ONNX Runtime cannot compute the serving graph of {base}: {error}; serve this model with vLLM "
                "(graftline serve --print-vllm)"
            ) from error
        logger.info("serving graph of %s against transformers: %s", base, found)
        if not BOUNDS[precision].hold_for(found):
            raise ExportError(
                f"the {precision} graph of {base} differs from transformers by {found}; its bounds are "
                f"{BOUNDS[precision]}; nothing was written; {_WIDER[precision]}"
            )
    return layout


def write_graph(
    reader: DequantizingReader, layout: GraphLayout, folder: Path, on_progress: OnProgress = silent
) -> None:
    """Write the graph, its weights and ``graph.json`` into a folder; NumberTypeError if a weight does not fit."""
    with (folder / WEIGHTS_FILE).open("wb") as weights:
        model = GraphWriter(GraphBuilder(weights, WEIGHTS_FILE), reader, reader.config, layout).write(on_progress)
    onnx.save(model, folder / GRAPH_FILE)
    layout.write(folder)


def cached_graph(
    base: Path,
    cache: Path,
    *,
    precision: Precision = "fp32",
    device: str = "cpu",
    base_digest: Digest | None = None,
    on_progress: OnProgress = silent,
) -> Path:
    """Folder of the serving graph of ``base``, exported now or earlier: one graph a base, whatever its adapters.

    ``base_digest`` saves reading the base's identity, which takes a while. Raises as `export_graph`.
    """
    digest = graph_digest(base_digest or read_identity(base).digest, precision)
    folder = cache / f"{digest.hex[:32]}-{precision}-v{FORMAT}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # of two simultaneous starts one exports and the other waits
        if not folder.exists():
            export_graph(base, folder, precision=precision, device=device, on_progress=on_progress)
    return folder


def graph_digest(base: Digest, precision: Precision) -> Digest:
    """Digest of everything that a base's serving graph is made of: the base, the precision, the graph's format."""
    return of_json([str(base), precision, FORMAT])


def logit_difference(
    session: GraphSession, model: PreTrainedModel, tokens: Sequence[int], adapter: Mapping[str, Any] | None = None
) -> float:
    """Largest |Δlogit| of the graph (with an adapter's inputs) against a model."""
    return agreement(session, model, tokens, adapter).max_logit_difference


def agreement(
    session: GraphSession, model: PreTrainedModel, tokens: Sequence[int], adapter: Mapping[str, Any] | None = None
) -> Agreement:
    """How the graph (with an adapter's inputs) agrees with a model: on a padded batch, then one more token a row."""
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
    """20 tokens of plain text (random ones are ten times more sensitive), all within the model's vocabulary."""
    tokens: list[int] = load_tokenizer(base)(_PROBE_TEXT).input_ids
    num_tokens = read_config(base).vocab_size
    return [token % num_tokens for token in (tokens * 20)[:20]]


def layout_of(config: PreTrainedConfig, base: Path, precision: Precision) -> GraphLayout:
    """What the graph of a base computes in a precision."""
    return GraphLayout(
        base_digest=read_identity(base).digest,
        architecture=architecture_of(config),
        precision=precision,
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim_of(config),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_positions=max_served_positions(config),
        linears=plan_linears(config),
        bottlenecks=plan_bottlenecks(config),
    )


@contextmanager
def _folder_in_making(out: Path) -> Iterator[Path]:
    """A temporary folder beside ``out`` that gets its name at the end; leftovers of a killed run are removed."""
    if out.exists():
        raise ExportError(f"{out} exists; an export overwrites nothing: remove it or choose another folder")
    making = out.with_name(f".{out.name}.part")
    shutil.rmtree(making, ignore_errors=True)
    try:
        making.mkdir(parents=True)
        yield making
        rename_synced(making, out)
    except OSError as error:
        raise ExportError(
            f"cannot write {out}: {error.strerror or error}; free space or permission is missing"
        ) from error
    finally:
        shutil.rmtree(making, ignore_errors=True)


# An adapter as an ``.onnx_adapter`` file: the inputs that turn the universal graph into the adapted model.
#
#     LoRA, rsLoRA  A = Aᵀ, B = s·Bᵀ                  VeRA        A = (diag(d) A)ᵀ, B = (diag(b) B)ᵀ
#     DoRA          and g = m / ‖W + s·B·A‖           PiSSA       rank 2R, on the base that it was initialized from
#     bottleneck    D, b_D, U, b_U behind a sublayer, and the switch between SiLU and ReLU
#
# Layers that the graph runs as one matrix (q, k, v) get one A, side by side, and one block-diagonal B. The file has the
# format of ONNX Runtime's ``RunOptions.add_active_adapter``.
#
# Dimensions: I = input features, O = output features, R = rank.

Parameters = dict[str, np.ndarray]
"""Values of graph inputs by name."""


def export_adapter(adapter: Path, out: Path, *, base: Path, graph: Path) -> Digest:
    """Write the ``.onnx_adapter`` file ``out`` for an adapter folder, if the graph then gives transformers' logits.

    ``base`` is the model folder that the adapter was trained on, ``graph`` the serving graph of that base. Returns the
    file's digest; equal adapters give equal bytes.

    Raises:
        BaseMismatchError: adapter, base and graph do not belong together.
        ExportError: the graph cannot express the adapter, or its logits are not transformers'.
    """
    identity = read_identity(base)
    weights = AdapterWeights.open(adapter)
    weights.check_base(identity)
    session = GraphSession(graph)
    if session.layout.base_digest != identity.digest:
        raise BaseMismatchError(
            f"{graph} is the graph of the base {session.layout.base_digest}, {base} is {identity.digest}; "
            "export the graph of this base"
        )
    parameters = graph_parameters(weights, session.layout, base)
    model = load_model(base)
    load_adapter(model, adapter, base=identity)
    bounds = BOUNDS[session.layout.precision]
    found = agreement(session, model, probe_tokens(base), ort_values(parameters))
    logger.info("%s on the serving graph against transformers: %s", adapter, found)
    if not bounds.hold_for(found):
        raise ExportError(
            f"{adapter} on {graph} differs from transformers by {found}; its bounds are {bounds}; nothing was written"
        )
    return write_parameters(parameters, out)


def graph_parameters(weights: AdapterWeights, layout: GraphLayout, base: Path) -> Parameters:
    """The graph inputs for an adapter; ExportError if it changes a layer that the graph has no input for."""
    reader = DequantizingReader(base)
    weights = weights.without_copies(reader.find)
    bottlenecks = weights.bottlenecks()
    if bottlenecks:
        places = {slot.module for slot in layout.bottlenecks}
    else:
        places = {module for linear in layout.linears for module in linear.modules}
    outside = sorted([module for module in weights.modules() if module not in places] + list(weights.replacements()))
    if outside:
        raise ExportError(
            f"the serving graph has no input for {outside[0]} ({len(outside)} such tensors in the adapter); "
            "merge this adapter and serve the merged model"
        )
    if bottlenecks:
        parameters = _bottleneck_parameters(bottlenecks, layout)
    else:
        adapted = [linear for linear in layout.linears if not set(linear.modules).isdisjoint(weights.states)]
        parameters = {k: v for linear in adapted for k, v in _fused_parameters(weights, linear, reader).items()}
    if weights.head is not None:
        parameters[HEAD_INPUT] = weights.head.float().numpy().T
    switch = {name: value for name, value in parameters.items() if name == RELU_SWITCH}  # fp32 in every graph
    return {name: _fitting(name, value, layout) for name, value in sorted(parameters.items())} | switch


def _fitting(name: str, value: np.ndarray, layout: GraphLayout) -> np.ndarray:
    """The values in the graph's number type; NumberTypeError if one does not fit."""
    cast(torch.from_numpy(np.ascontiguousarray(value)), layout.dtype, f"the adapter's {name}")
    return np.ascontiguousarray(value, layout.numpy_dtype)


def ort_values(parameters: Parameters) -> dict[str, onnxruntime.OrtValue]:
    """The parameters as ONNX Runtime's values, on the CPU."""
    make, with_type = onnxruntime.OrtValue.ortvalue_from_numpy, onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type
    bfloat16 = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)  # which `make` does not know
    return {
        name: with_type(value, TensorProto.BFLOAT16) if value.dtype == bfloat16 else make(value)
        for name, value in parameters.items()
    }


def write_parameters(parameters: Parameters, out: Path) -> Digest:
    """Write an ``.onnx_adapter`` file, which appears when it is complete; returns its digest."""
    container = onnxruntime.AdapterFormat()
    container.set_adapter_version(1)
    container.set_model_version(FORMAT)
    container.set_parameters(ort_values(parameters))
    making = out.with_name(f".{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        container.export_adapter(str(making))
        making.replace(out)
    except (OSError, RuntimeError) as error:
        raise ExportError(f"cannot write {out}: {error}; free space or permission is missing") from error
    finally:
        making.unlink(missing_ok=True)
    return of_file(out)


def read_parameters(file: Path) -> dict[str, onnxruntime.OrtValue]:
    """The graph inputs in an ``.onnx_adapter`` file; ExportError if it cannot be read."""
    try:
        return dict(onnxruntime.AdapterFormat.read_adapter(str(file)).get_parameters())
    except Exception as error:  # ONNX Runtime's own exceptions have no nearer common root
        raise ExportError(f"cannot read {file}: {error}; export the adapter again") from error


def _fused_parameters(weights: AdapterWeights, linear: FusedLinear, reader: DequantizingReader) -> Parameters:
    A_parts, B_rows, g_parts, offset = [], [], [], 0
    width = sum(linear.out_features)
    for module, size in zip(linear.modules, linear.out_features, strict=True):
        g_O = np.ones(size, np.float32)
        if module in weights.states:
            weight = functools.partial(_read_weight, module, reader)
            A_IR, B_RO, scale_O = weights.serving_factors(module, weight)
            if A_IR.shape[0] != linear.in_features or B_RO.shape[1] != size:
                raise ExportError(
                    f"{module}: the adapter is for {(B_RO.shape[1], A_IR.shape[0])} (out, in), "
                    f"the graph has {(size, linear.in_features)}"
                )
            placed = np.zeros((B_RO.shape[0], width), np.float32)
            placed[:, offset : offset + size] = B_RO.numpy()
            A_parts.append(A_IR.numpy())
            B_rows.append(placed)
            g_O = g_O if scale_O is None else scale_O.numpy()
        g_parts.append(g_O)
        offset += size
    parameters = {f"{linear.name}.A": np.concatenate(A_parts, axis=1), f"{linear.name}.B": np.concatenate(B_rows)}
    g = np.concatenate(g_parts)
    return parameters if (g == 1).all() else parameters | {f"{linear.name}.g": g}


def _bottleneck_parameters(bottlenecks: Mapping[str, Bottleneck], layout: GraphLayout) -> Parameters:
    parameters: Parameters = {}
    for slot in layout.bottlenecks:
        block = bottlenecks.get(slot.module.rpartition(".")[0])
        if block is None:
            continue
        values = {"D": block.down, "D_bias": block.down_bias, "U": block.up, "U_bias": block.up_bias}
        parameters |= {f"{slot.name}.{part}": value.numpy() for part, value in values.items()}
        parameters[RELU_SWITCH] = np.array([block.activation == "relu"], np.float32)
    return parameters


def _read_weight(module: str, reader: DequantizingReader) -> Tensor:
    return reader.read(f"{module}.weight").to(torch.float32)
