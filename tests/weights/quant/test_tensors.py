import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graftline.errors import GraftlineError
from graftline.weights.quant.blockwise import dequantize, quantize
from graftline.weights.quant.scheme import FP8, Scheme
from graftline.weights.quant.tensors import from_tensors, part_names, quantized_weights, state_key, to_tensors

NAME = "model.layers.0.mlp.up_proj.weight"
SCHEMES = [*(Scheme(code, 64, double) for code in ("nf4", "nf3", "nf2") for double in (True, False)), FP8]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def stored(scheme: Scheme) -> dict[str, Tensor]:
    w = torch.randn(10, 33, generator=torch.Generator().manual_seed(0))
    return to_tensors(NAME, quantize(w, scheme), source_dtype=torch.bfloat16)


def as_blob(text: bytes) -> Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_weight_comes_back_as_it_was_stored(scheme: Scheme) -> None:
    tensors = stored(scheme)
    found = quantized_weights(list(tensors))
    assert found == {NAME: state_key(NAME, scheme.code)}
    back = from_tensors(NAME, found[NAME], tensors.__getitem__)
    expected = quantize(torch.randn(10, 33, generator=torch.Generator().manual_seed(0)), scheme)
    assert back.scheme == scheme
    assert torch.equal(dequantize(back), dequantize(expected))
    assert set(tensors) <= {NAME, found[NAME], *part_names(NAME)}


def test_state_is_written_last_because_it_marks_the_weight_as_complete() -> None:
    assert list(stored(SCHEMES[0]))[-1] == state_key(NAME, "nf4")


def test_state_has_exactly_the_keys_that_bitsandbytes_accepts() -> None:
    state = json.loads(bytes(stored(Scheme("nf4", 64, True))[state_key(NAME, "nf4")].tolist()))
    assert state.keys() == {
        "quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset",
    }  # fmt: skip
    assert state["dtype"] == "bfloat16"


@given(
    key=st.sampled_from(["quant_type", "blocksize", "dtype", "shape", "nested_offset", "nested_blocksize"]), value=JSON
)
@settings(max_examples=150, deadline=None)
def test_any_value_in_a_state_is_read_right_or_refused(key: str, value: object) -> None:
    tensors = stored(Scheme("nf4", 64, True))
    state = json.loads(bytes(tensors[state_key(NAME, "nf4")].tolist())) | {key: value}
    tensors[state_key(NAME, "nf4")] = as_blob(json.dumps(state).encode())
    try:
        weight = from_tensors(NAME, state_key(NAME, "nf4"), tensors.__getitem__)
    except GraftlineError:
        return
    assert dequantize(weight).shape == weight.shape


@given(blob=st.binary(max_size=60))
@settings(max_examples=60, deadline=None)
def test_any_bytes_in_place_of_a_state_are_refused(blob: bytes) -> None:
    tensors = stored(Scheme("nf2", 64, True)) | {state_key(NAME, "nf2"): as_blob(blob)}
    with pytest.raises(GraftlineError, match=NAME):
        from_tensors(NAME, state_key(NAME, "nf2"), tensors.__getitem__)
