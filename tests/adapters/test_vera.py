import pytest
import torch
from torch import nn

from graftline.adapters.base import AttachContext, LayerPlan
from graftline.adapters.vera import METHOD, VeraLayer, draw_projections, share
from graftline.errors import AdapterError
from graftline.settings.model import Adapter

RANK = 3


def make_layer(*, dropout: float = 0.0) -> VeraLayer:
    torch.manual_seed(0)
    base = nn.Linear(6, 5).requires_grad_(False)
    spec = Adapter(method="vera", rank=RANK)
    shared = share({"layer": base, "larger": nn.Linear(9, 8)}, spec)
    context = AttachContext(spec=spec, generator=torch.Generator(), shared=shared)
    layer = VeraLayer(base, LayerPlan(name="layer", rank=RANK, scale=1.0, dropout=dropout), context).double()
    nn.init.normal_(layer.b)
    nn.init.normal_(layer.d)
    return layer


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_output_and_gradients_equal_autograd_of_the_formula(dropout):
    layer = make_layer(dropout=dropout).train()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, 5, dtype=torch.float64)

    def naive(x):
        dropped = nn.functional.dropout(x, dropout) if dropout else x
        return layer.base(x) + layer.b * ((layer.d * (dropped @ layer.A.T)) @ layer.B.T)

    results = []
    for run in (layer, naive):
        torch.manual_seed(5)
        y = run(x)
        results.append([y, *torch.autograd.grad((y * weights).sum(), (x, layer.b, layer.d))])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_layers_use_the_leading_slices_of_one_projection_sized_by_separate_maxima():
    layers = {"wide": nn.Linear(9, 4), "tall": nn.Linear(3, 8)}
    spec = Adapter(method="vera", rank=RANK, projection_seed=7)
    shared = share(layers, spec)
    A, B = draw_projections(9, 8, rank=RANK, seed=7)
    assert torch.equal(shared["A"], A)
    assert torch.equal(shared["B"], B)
    for name, num_inputs, num_outputs in (("wide", 9, 4), ("tall", 3, 8)):
        plan = LayerPlan(name=name, rank=RANK, scale=1.0, dropout=0.0)
        layer = VeraLayer(layers[name], plan, AttachContext(spec=spec, generator=torch.Generator(), shared=shared))
        assert torch.equal(layer.A, A[:, :num_inputs])
        assert torch.equal(layer.B, B[:num_outputs])
        assert layer.A.data_ptr() == shared["A"].data_ptr()  # a view: one projection in memory for all layers


def test_a_layer_that_the_projection_is_too_small_for_is_refused():
    shared = share({"small": nn.Linear(4, 4)}, Adapter(method="vera", rank=RANK))
    context = AttachContext(spec=Adapter(method="vera", rank=RANK), generator=torch.Generator(), shared=shared)
    with pytest.raises(AdapterError, match="drawn for other targets"):
        VeraLayer(nn.Linear(5, 4), LayerPlan(name="layer", rank=RANK, scale=1.0, dropout=0.0), context)


def test_a_rank_for_single_layers_is_refused():
    with pytest.raises(AdapterError, match="share one projection"):
        share({"layer": nn.Linear(4, 4)}, Adapter(method="vera", rank=RANK, rank_pattern={"layer": 2}))


def test_llama_2_7b_at_rank_256_trains_1_42_million_parameters():
    shapes = [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]
    assert sum(METHOD.count(i, o, 256) for i, o in shapes) * 32 == pytest.approx(1.42e6, rel=0.005)
