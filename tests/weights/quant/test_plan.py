import pytest

from graftline.errors import QuantizeError
from graftline.weights.quant.scheme import QuantizationPlan, Scheme, plan_of
from tests.sections import quantize_section

NF4, NF2 = Scheme("nf4", 64, True), Scheme("nf2", 64, True)


def test_one_method_is_every_layer_s_scheme() -> None:
    plan = plan_of(quantize_section("nf2", block_size=32, double_quant=False))
    assert plan == QuantizationPlan(Scheme("nf2", 32, False))
    assert plan.scheme_of("model.layers.0.mlp.up_proj") == Scheme("nf2", 32, False)


def test_first_rule_that_matches_from_the_start_decides_and_the_rest_gets_4_bits() -> None:
    plan = plan_of(quantize_section("mixed", bits={r".*up_proj": 3, "0-0": 2, "mlp": 2}))
    assert plan.scheme_of("model.layers.0.mlp.up_proj") == Scheme("nf3", 64, True)
    assert plan.scheme_of("model.layers.0.mlp.down_proj") == NF2
    assert plan.scheme_of("model.layers.1.mlp.down_proj") == NF4


def test_a_range_of_layers_is_told_apart_by_whole_numbers() -> None:
    plan = plan_of(quantize_section("mixed", bits={"0-1": 4, ".*": 2}))
    found = [plan.scheme_of(f"model.layers.{block}.mlp.up_proj") for block in (0, 1, 2, 10, 11, 19)]
    assert found == [NF4, NF4, NF2, NF2, NF2, NF2]


def test_a_base_that_stays_dense_has_no_plan() -> None:
    with pytest.raises(QuantizeError, match=r"quantize\.method is none"):
        plan_of(quantize_section("none"))
