"""Write an adapter as an ``.onnx_adapter`` file: the inputs that turn the universal graph into the adapted model.

    LoRA, rsLoRA  A = Aᵀ, B = s·Bᵀ                  VeRA        A = (diag(d) A)ᵀ, B = (diag(b) B)ᵀ
    DoRA          and g = m / ‖W + s·B·A‖           PiSSA       rank 2R, on the base that it was initialized from
    bottleneck    D, b_D, U, b_U behind a sublayer, and the switch between SiLU and ReLU

Layers that the graph runs as one matrix (q, k, v) get one A, side by side, and one block-diagonal B. The file
is ONNX Runtime's own format (METHODS.md §2.4): a session over the graph takes it as ``RunOptions.add_active_adapter``.

Dimensions: I = input features, O = output features, R = rank.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from graftline.adapters.bottleneck import Bottleneck
from graftline.adapters.peft_format import AdapterWeights, load_adapter
from graftline.digest import Digest, of_file
from graftline.errors import BaseMismatchError, ExportError
from graftline.export.onnx_export import BOUNDS, agreement, probe_tokens
from graftline.export.onnx_layout import FORMAT, RELU_SWITCH, FusedLinear, GraphLayout
from graftline.export.onnx_session import GraphSession
from graftline.weights.identity import read_identity
from graftline.weights.quant.folder import DequantizingReader
from graftline.weights.quant.load import load_model

logger = logging.getLogger(__name__)

Parameters = dict[str, np.ndarray]
"""Values of graph inputs by name."""


def export_adapter(adapter: Path, out: Path, *, base: Path, graph: Path) -> Digest:
    """Write the file ``out`` for an adapter folder, after the graph with it gave the logits of transformers with it.

    Args:
        adapter: a folder in PEFT's format.
        out: the ``.onnx_adapter`` file; appears when it is complete.
        base: the model folder that the adapter was trained on.
        graph: the serving graph of that base.

    Returns:
        Digest of the file: equal adapters give equal bytes.

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
    """The graph inputs that stand for an adapter.

    Raises:
        ExportError: the adapter changes a layer that the graph has no input for.
    """
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
    dtype = np.float16 if layout.precision == "fp16" else np.float32
    switch = {name: value for name, value in parameters.items() if name == RELU_SWITCH}  # fp32 in every graph
    converted = {name: np.ascontiguousarray(value, dtype) for name, value in sorted(parameters.items())}
    return converted | switch


def ort_values(parameters: Parameters) -> dict[str, onnxruntime.OrtValue]:
    """The same as ONNX Runtime's values, on the CPU."""
    return {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in parameters.items()}


def write_parameters(parameters: Parameters, out: Path) -> Digest:
    """Write an ``.onnx_adapter`` file; it appears under its name when it is complete."""
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
    """The graph inputs in an ``.onnx_adapter`` file.

    Raises:
        ExportError: it cannot be read or is no such file.
    """
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
            A_IR, B_RO, scale_O = weights.serving_factors(module, _weight_of(module, reader))
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


def _weight_of(module: str, reader: DequantizingReader) -> Callable[[], Tensor]:
    return lambda: reader.read(f"{module}.weight").to(torch.float32)
