import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from graftline.adapters.base import check_finite, dense_weight, features_of, is_quantized, kind_of, to_stored
from graftline.errors import AdapterError
from tests.adapters.stand_in import RoundedLinear


@pytest.mark.parametrize("bad", [[float("nan")], [float("inf")], [float("inf"), float("-inf")]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_infinity_are_found_and_counted(bad, dtype):
    tensor = torch.ones(100, dtype=dtype)
    tensor[: len(bad)] = torch.tensor(bad)
    with pytest.raises(AdapterError, match=rf"weight holds {len(bad)} values that are NaN or infinite"):
        check_finite(tensor, "weight")


def test_finite_values_whose_sum_overflows_are_finite():
    check_finite(torch.full((4,), 3e38), "weight")
    check_finite(torch.full((4,), 60000.0, dtype=torch.float16), "weight")
    check_finite(torch.tensor([1, 2]), "codes")


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.Linear(3, 5), "linear"),
        (Conv1D(5, 3), "conv1d"),
        (nn.Embedding(3, 5), "embedding"),
        (RoundedLinear(nn.Linear(3, 5)), "linear"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_every_adaptable_layer_has_one_orientation(layer, kind):
    assert kind_of(layer) == kind
    assert features_of(layer) == (3, 5)
    assert dense_weight(layer).shape == (5, 3)
    assert dense_weight(layer, torch.float64).dtype == torch.float64
    assert not dense_weight(layer).requires_grad
    if not is_quantized(layer):
        assert torch.equal(to_stored(dense_weight(layer), kind), layer.weight)
        assert dense_weight(layer).data_ptr() == layer.weight.data_ptr()  # a view, no copy


def test_a_layer_that_is_not_linear_has_neither_features_nor_a_dense_weight():
    assert kind_of(nn.LayerNorm(3)) == "module"
    with pytest.raises(AdapterError, match="LayerNorm is no linear layer"):
        features_of(nn.LayerNorm(3))
    with pytest.raises(AdapterError, match="LayerNorm is no linear layer"):
        dense_weight(nn.LayerNorm(3))
