from pathlib import Path

import pytest
import torch

from graftline.adapters.attach import adapter_layers, attach, plan_layers
from graftline.adapters.lora import principal_factors
from graftline.adapters.peft_format import AdapterIdentity, AdapterWeights, load_adapter, save_adapter
from graftline.digest import of_bytes
from graftline.errors import AdapterError, BaseMismatchError
from graftline.settings.model import Adapter
from graftline.weights.identity import BaseIdentity
from tests.adapters.stand_in import disturb, make_model, make_tokens, quantize
from tests.sections import adapter_section

BASE = BaseIdentity(of_bytes(b"base"))
IDENTITY = AdapterIdentity(base_digest=BASE.digest)
SPEC = Adapter(method="pissa", rank=3, alpha=12.0, svd="exact", rank_pattern={"q_proj": 2})


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_initial_factors_are_the_best_approximation_whatever_the_scale(exact, scale):
    torch.manual_seed(0)
    weight = torch.randn(40, 30)
    initial = principal_factors(weight, rank=5, scale=scale, exact=exact, generator=torch.Generator().manual_seed(0))
    best = torch.linalg.svdvals(weight)[5:].norm()
    error = torch.linalg.norm(weight - scale * initial["B"] @ initial["A"])
    assert error == pytest.approx(best.item(), rel=1e-5 if exact else 0.01)


def test_file_holds_the_equivalent_lora_on_the_original_base(tmp_path: Path):
    model = make_model("llama")
    attach(model, SPEC, seed=0)
    disturb(model)
    save_adapter(model, tmp_path, identity=IDENTITY)
    weights = AdapterWeights.open(tmp_path)
    name = "model.layers.0.mlp.up_proj"
    folded = weights.fold_weight(name, make_model("llama").get_submodule(name).weight.detach())
    layer = adapter_layers(model)[name]
    trained = layer.base.weight + layer.plan.scale * layer.B @ layer.A
    torch.testing.assert_close(folded, trained.detach(), rtol=0, atol=1e-5)
    assert weights.tensors(name)["A"].shape[0] == 6
    assert weights.scale(name) == layer.plan.scale == 4.0


def test_training_goes_on_from_the_file_as_if_it_had_not_stopped(tmp_path: Path):
    model, tokens = make_model("llama"), make_tokens()
    attach(model, SPEC, seed=0)
    disturb(model)
    save_adapter(model, tmp_path, identity=IDENTITY)
    again = make_model("llama")
    load_adapter(again, tmp_path, base=BASE, trainable=True)
    for name, layer in adapter_layers(model).items():
        assert torch.equal(adapter_layers(again)[name].A, layer.A)
        assert torch.equal(adapter_layers(again)[name].B, layer.B)
        assert torch.equal(adapter_layers(again)[name].base.weight, layer.base.weight)
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_a_head_tied_to_the_embedding_leaves_the_embedding_as_it_was():
    model = make_model("llama")
    before = model.model.embed_tokens.weight.detach().clone()
    attach(model, Adapter(method="pissa", rank=3, targets=("lm_head",)), seed=0)
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert not torch.equal(adapter_layers(model)["lm_head"].base.weight, before)


def test_a_half_precision_base_is_the_identity_within_its_rounding():
    model, tokens = make_model("llama", dtype=torch.bfloat16), make_tokens()
    expected = model(tokens).logits.float()
    attach(model, Adapter(method="pissa", rank=3), seed=0)
    difference = (model(tokens).logits.float() - expected).abs().max()
    assert difference <= 0.05 * expected.abs().max()


@pytest.mark.parametrize("method", ["pissa", "loftq"])
def test_a_quantized_base_needs_the_factors_that_it_was_made_with(method):
    model = quantize(make_model("llama"))
    before = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(AdapterError, match="run the init stage with this method"):
        attach(model, adapter_section(method, rank=3), seed=0)
    assert not adapter_layers(model)
    assert all(parameter.requires_grad == was for parameter, was in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("method", ["pissa", "loftq"])
def test_a_quantized_base_with_its_factors_trains_and_its_file_is_plain_lora(method, tmp_path: Path):
    model, tokens = quantize(make_model("llama")), make_tokens()
    names = [name for name, module in model.named_modules() if type(module).__name__ == "RoundedLinear"]
    generator = torch.Generator().manual_seed(2)
    initial = {
        name: {
            "A": torch.randn(3, model.get_submodule(name).in_features, generator=generator),
            "B": torch.randn(model.get_submodule(name).out_features, 3, generator=generator),
        }
        for name in names
    }
    attach(model, adapter_section(method, rank=3), seed=0, initial=initial)
    disturb(model)
    pair = of_bytes(b"factors")
    identity = AdapterIdentity(base_digest=BASE.digest, quantizer={"method": "rounded"}, initial_digest=pair)
    save_adapter(model, tmp_path, identity=identity)
    assert AdapterWeights.open(tmp_path).tensors(names[0])["A"].shape[0] == 3

    again = quantize(make_model("llama"))
    load_adapter(again, tmp_path, base=BaseIdentity(BASE.digest, pair=pair))
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    with pytest.raises(BaseMismatchError, match="made together with"):
        load_adapter(make_model("llama"), tmp_path, base=BaseIdentity(BASE.digest, pair=of_bytes(b"others")))


def test_factors_for_other_layers_than_the_targets_are_refused():
    with pytest.raises(AdapterError, match="the initial factors and the targets differ"):
        attach(make_model("llama"), SPEC, seed=0, initial={"model.layers.0.mlp.up_proj": {}})


@pytest.mark.parametrize("method", ["pissa", "loftq"])
def test_factors_of_another_rank_are_refused_before_anything_is_changed(method):
    model = make_model("llama") if method == "pissa" else quantize(make_model("llama"))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plans = plan_layers(model, adapter_section(method, rank=3))
    initial = {
        name: {"A": torch.ones(3, model.get_submodule(name).in_features), "B": torch.ones(16, 3)} for name in plans
    }
    with pytest.raises(AdapterError, match=r"the initial factors have shapes .* expected .* run the init stage again"):
        attach(model, adapter_section(method, rank=3), seed=0, initial=initial)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not adapter_layers(model)
