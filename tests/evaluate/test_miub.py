import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from graftline.adapters.attach import adapter_layers, attach
from graftline.errors import EvaluationError
from graftline.evaluate.miub import Miub, measure_miub
from tests.adapters.stand_in import make_experts
from tests.sections import adapter_section

DOCUMENTS = [tuple(np.random.default_rng(i).integers(4, 300, 12 + i).tolist()) for i in range(6)]


def adapted(tiny_llama: Path, *, method: str = "lora", noise: float = 0.05, **changes) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    spec = adapter_section(method, rank=4, alpha=8, targets=("q_proj", "v_proj"), **changes)
    attach(model, spec, seed=0)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * noise
    return model


def by_definition(model: PreTrainedModel, name: str) -> tuple[float, float]:
    """mean KL(p_t || mean p) of u and of v, all tokens at once."""
    layer = adapter_layers(model)[name]
    inputs: list[torch.Tensor] = []
    hook = layer.register_forward_hook(lambda _, args, output: inputs.append(args[0][0]))
    with torch.no_grad():
        for document in DOCUMENTS:
            model(input_ids=torch.tensor([document]))
        hook.remove()
        x_TI = torch.cat(inputs)
        u_TO = x_TI @ layer.base.weight.T
        v_TO = layer.plan.scale * x_TI @ layer.A.T @ layer.B.T
    terms = []
    for out_TO in (u_TO, v_TO):
        standard_TO = ((out_TO - out_TO.mean(0)) / out_TO.std(0, unbiased=False)).double()
        p_TO = standard_TO.softmax(-1)
        terms.append(float((p_TO * (p_TO / p_TO.mean(0)).log()).sum(-1).mean()))
    return terms[0], terms[1]


@pytest.fixture(scope="module")
def found(tiny_llama: Path) -> Miub:
    return measure_miub(adapted(tiny_llama), DOCUMENTS, num_resamples=200)


def test_both_terms_equal_their_definition(tiny_llama: Path, found: Miub) -> None:
    model = adapted(tiny_llama)
    assert len(found.layers) == 4
    for layer in found.layers:
        assert (layer.frozen_term, layer.adapter_term) == pytest.approx(by_definition(model, layer.name), rel=1e-3)
        assert layer.bound == min(layer.frozen_term, layer.adapter_term)


def test_the_bound_is_between_zero_and_the_logarithms_of_features_and_tokens(found: Miub) -> None:
    assert found.num_tokens == sum(map(len, DOCUMENTS))
    assert found.num_documents == len(DOCUMENTS)
    for layer in found.layers:
        assert 0 < layer.bound <= min(math.log(64), math.log(found.num_tokens))
        assert layer.norm_ratio > 0


def test_the_mean_is_over_layers_and_lies_near_its_interval(found: Miub) -> None:
    assert found.mean == pytest.approx(np.mean([layer.bound for layer in found.layers]))
    assert found.interval[0] < found.interval[1]
    assert set(found.by_kind()) == {"q_proj", "v_proj"}


def test_an_adapter_at_step_zero_has_no_adapter_term(tiny_llama: Path) -> None:
    found = measure_miub(adapted(tiny_llama, noise=0.0), DOCUMENTS, num_resamples=10)
    assert all(layer.adapter_term == pytest.approx(0.0, abs=1e-9) for layer in found.layers)
    assert all(layer.norm_ratio == 0.0 for layer in found.layers)
    assert found.mean == pytest.approx(0.0, abs=1e-9)


def test_a_scaled_adapter_has_the_same_terms_and_another_norm(tiny_llama: Path) -> None:
    model = adapted(tiny_llama)
    first = next(iter(adapter_layers(model)))
    before = measure_miub(model, DOCUMENTS, num_resamples=10).layers[0]
    adapter_layers(model)[first].B.data *= 3
    after = measure_miub(model, DOCUMENTS, num_resamples=10).layers[0]
    # The first layer's input does not change, so standardization removes the factor.
    assert after.adapter_term == pytest.approx(before.adapter_term, rel=1e-4)
    assert after.norm_ratio == pytest.approx(3 * before.norm_ratio, rel=1e-4)


@pytest.mark.parametrize("method", ["dora", "vera", "rslora"])
def test_other_methods_are_measured_through_what_they_add(tiny_llama: Path, method: str) -> None:
    found = measure_miub(adapted(tiny_llama, method=method), DOCUMENTS, num_resamples=10)
    assert all(layer.bound > 0 for layer in found.layers)


def test_equal_seeds_give_equal_intervals_and_hooks_are_gone(tiny_llama: Path) -> None:
    model = adapted(tiny_llama)
    assert measure_miub(model, DOCUMENTS, num_resamples=50) == measure_miub(model, DOCUMENTS, num_resamples=50)
    assert all(not layer._forward_hooks for layer in adapter_layers(model).values())


def test_models_and_documents_that_cannot_be_measured_are_refused(tiny_llama: Path) -> None:
    model = adapted(tiny_llama)
    with pytest.raises(EvaluationError, match="no adapter"):
        measure_miub(AutoModelForCausalLM.from_pretrained(tiny_llama), DOCUMENTS)
    with pytest.raises(EvaluationError, match="1 documents"):
        measure_miub(model, DOCUMENTS[:1])
    with pytest.raises(EvaluationError, match="at least one token"):
        measure_miub(model, [DOCUMENTS[0], ()])


def test_an_adapter_on_experts_is_refused() -> None:
    model = make_experts("mixtral")
    attach(model, adapter_section("lora", rank=3, targets=("experts.down_proj",)), seed=0)
    with pytest.raises(EvaluationError, match="experts read some"):
        measure_miub(model, [[4, 5, 6], [7, 8, 9]])
