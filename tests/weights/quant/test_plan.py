from graftline.weights.quant.plan import QuantizationPlan, first_blocks
from graftline.weights.quant.scheme import Scheme

NF4, NF2 = Scheme("nf4"), Scheme("nf2")


def test_without_rules_every_layer_has_the_default() -> None:
    assert QuantizationPlan(NF2).scheme_of("model.layers.0.mlp.up_proj") == NF2
    assert QuantizationPlan(None).scheme_of("model.layers.0.mlp.up_proj") is None


def test_first_rule_that_matches_from_the_start_decides() -> None:
    plan = QuantizationPlan(NF4, ((r".*up_proj", None), (r"model\.layers\.0\.", NF2), (r"mlp", NF2)))
    assert plan.scheme_of("model.layers.0.mlp.up_proj") is None
    assert plan.scheme_of("model.layers.0.mlp.down_proj") == NF2
    assert plan.scheme_of("model.layers.1.mlp.down_proj") == NF4


def test_first_blocks_are_told_apart_by_their_whole_number() -> None:
    plan = first_blocks(2, NF4, NF2)
    found = [plan.scheme_of(f"model.layers.{block}.mlp.up_proj") for block in (0, 1, 2, 10, 11, 19)]
    assert found == [NF4, NF4, NF2, NF2, NF2, NF2]
    assert first_blocks(0, NF4, NF2).scheme_of("model.layers.0.mlp.up_proj") == NF2
