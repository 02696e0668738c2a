"""A quantized weight as named tensors of a checkpoint, and back.

NF4 is written exactly as bitsandbytes does (METHODS §3), so that transformers loads it. NF3 and NF2, which
bitsandbytes lacks, use the same keys under our own name (docs/decisions/0010-low-bit-layout.md)::

    P.weight                                     uint8 (bytes, 1)   packed codes
    P.weight.absmax                              uint8 (blocks,) with double quantization, else float32 (blocks,)
    P.weight.quant_map                           float32 (2^bits,)  the table
    P.weight.nested_absmax                       float32 (⌈blocks / 256⌉,)   ┐ double
    P.weight.nested_quant_map                    float32 (256,)              ┘ quantization
    P.weight.quant_state.bitsandbytes__nf4       uint8: JSON; graftline__nf3, graftline__nf2 for the others

FP8 has no table: P.weight has the bits of torch.float8_e4m3fn, P.weight.absmax is float32 (O,), what each row is
multiplied by, and its state (graftline__fp8) says blocksize 0.
"""

import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graftline.errors import CheckpointError, QuantizeError
from graftline.weights.cast import type_name
from graftline.weights.quant.blockwise import NestedConstants, QuantizedWeight, packed_bytes
from graftline.weights.quant.scheme import NESTED_BLOCK_SIZE, Scheme, code_table, dynamic_map

_STATE = "quant_state."
_OWNERS = {"nf4": "bitsandbytes", "nf3": "graftline", "nf2": "graftline", "fp8": "graftline"}
_STATE_SUFFIXES = {f"{_STATE}{owner}__{code}": code for code, owner in _OWNERS.items()}
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def to_tensors(name: str, weight: QuantizedWeight, *, source_dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors to write for the weight ``name`` (``….weight``); bitsandbytes dequantizes to ``source_dtype``."""
    scheme, absmax = weight.scheme, weight.absmax
    state: dict[str, Any] = {
        "quant_type": scheme.code,
        "blocksize": scheme.block_size,
        "dtype": type_name(source_dtype),
        "shape": list(weight.shape),
    }
    tensors = {name: weight.packed.view(-1, 1)}
    if scheme.code != "fp8":
        tensors[f"{name}.quant_map"] = code_table(scheme.code)
    if isinstance(absmax, NestedConstants):
        tensors |= {
            f"{name}.absmax": absmax.codes,
            f"{name}.nested_absmax": absmax.absmax,
            f"{name}.nested_quant_map": dynamic_map(),
        }
        state |= {
            "nested_blocksize": NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": float(absmax.offset),
        }
    else:
        tensors[f"{name}.absmax"] = absmax
    blob = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors | {state_key(name, scheme.code): blob}


def state_key(name: str, code: str) -> str:
    """The key of a weight's state, the last of its tensors to be written."""
    return f"{name}.{_STATE}{_OWNERS[code]}__{code}"


def quantized_weights(names: list[str]) -> dict[str, str]:
    """Weights that are stored quantized: name -> the key of its state.

    Raises:
        QuantizeError: a state of an unsupported kind, for example bitsandbytes' fp4.
    """
    found: dict[str, str] = {}
    for key in names:
        name, separator, kind = key.partition(f".{_STATE}")
        if not separator:
            continue
        if _STATE + kind not in _STATE_SUFFIXES:
            known = ", ".join(suffix.removeprefix(_STATE) for suffix in _STATE_SUFFIXES)
            raise QuantizeError(f"{name} is quantized as {kind}; expected one of {known}: quantize the base anew")
        found[name] = key
    return found


def part_names(name: str) -> list[str]:
    """Keys that a quantized weight's constants and tables may have."""
    return [f"{name}.{part}" for part in _PARTS]


def dense_shape(name: str, state_key: str, read: Callable[[str], Tensor]) -> tuple[int, int]:
    """Shape of a quantized weight, from its state alone; raises as `from_tensors`."""
    rows, columns = _parse_state(name, read(state_key), _code_of(name, state_key))["shape"]
    return rows, columns


def from_tensors(name: str, state_key: str, read: Callable[[str], Tensor]) -> QuantizedWeight:
    """Rebuild a weight from a checkpoint; ``read`` returns a stored tensor by its name.

    Codes and constants may be on ``meta``: only their sizes are checked then.

    Raises:
        CheckpointError: the state is malformed, or sizes do not agree.
    """
    code = _code_of(name, state_key)
    state = _parse_state(name, read(state_key), code)
    scheme = Scheme(code, state["blocksize"], "nested_offset" in state)
    shape = tuple(state["shape"])
    packed = read(name).view(torch.uint8).reshape(-1)
    if code != "fp8" and not torch.equal(read(f"{name}.quant_map"), code_table(code)):
        raise CheckpointError(f"{name}: its quant_map is not the table of {code}; fetch or quantize the base again")
    absmax: Tensor | NestedConstants = read(f"{name}.absmax").reshape(-1)
    if scheme.double_quant:
        if not torch.equal(read(f"{name}.nested_quant_map"), dynamic_map()):
            raise CheckpointError(f"{name}: its nested_quant_map is not the dynamic map; quantize the base again")
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32)
        absmax = NestedConstants(read(f"{name}.absmax").reshape(-1), read(f"{name}.nested_absmax").reshape(-1), offset)
    weight = QuantizedWeight(packed, absmax, shape, scheme)
    _check_sizes(name, weight)
    if code == "fp8" and not packed.is_meta:
        refuse_nan(packed, name)
    return weight


def refuse_nan(packed: Tensor, name: str) -> None:
    """Raise CheckpointError if bits of FP8 (n,) are those of NaN."""
    if bool(((packed & 0x7F) == 0x7F).any()):
        raise CheckpointError(f"{name} holds NaN; every weight must be finite: fetch or quantize the base again")


def _code_of(name: str, state_key: str) -> str:
    return _STATE_SUFFIXES[state_key.removeprefix(f"{name}.")]


def _parse_state(name: str, blob: Tensor, code: str) -> dict[str, Any]:
    expected = {"quant_type", "blocksize", "dtype", "shape"}
    nested = {"nested_blocksize", "nested_dtype", "nested_offset"}
    try:
        state = json.loads(bytes(blob.tolist()))
        ok = (
            state.keys() in (expected, expected | nested)
            and state["quant_type"] == code
            and state.get("nested_blocksize", NESTED_BLOCK_SIZE) == NESTED_BLOCK_SIZE
            and math.isfinite(state.get("nested_offset", 0.0))
            and isinstance(state["blocksize"], int)
            and [type(size) for size in state["shape"]] == [int, int]
            and min(state["shape"]) > 0
        )
    except (ValueError, TypeError, AttributeError, RecursionError):
        ok = False
    if not ok:
        raise CheckpointError(
            f"{name}: its quant_state is not that of a 2-dimensional {code} weight; quantize the base again"
        )
    return dict(state)


def _check_sizes(name: str, weight: QuantizedWeight) -> None:
    num_weights = weight.shape[0] * weight.shape[1]
    is_fp8 = weight.scheme.code == "fp8"
    num_blocks = weight.shape[0] if is_fp8 else -(-num_weights // weight.scheme.block_size)
    found = [weight.packed.numel(), weight.packed.dtype]
    expected = [num_weights if is_fp8 else packed_bytes(num_weights, weight.scheme.bits), torch.uint8]
    if isinstance(weight.absmax, NestedConstants):
        nested = weight.absmax
        found += [nested.codes.numel(), nested.codes.dtype, nested.absmax.numel(), nested.absmax.dtype]
        expected += [num_blocks, torch.uint8, -(-num_blocks // NESTED_BLOCK_SIZE), torch.float32]
    else:
        found += [weight.absmax.numel(), weight.absmax.dtype]
        expected += [num_blocks, torch.float32]
    if found != expected:
        raise CheckpointError(
            f"{name} of shape {weight.shape}: its packed codes and constants have {found}, expected {expected} "
            "(elements and dtypes); quantize the base again"
        )
