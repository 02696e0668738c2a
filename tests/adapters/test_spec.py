import math

import pytest

from graftline.adapters.spec import AdapterSpec
from graftline.errors import AdapterError

BAD = [
    ({"rank": 0}, "rank is 0; expected a whole number of at least 1"),
    ({"rank": -4}, "rank is -4"),
    ({"rank": 2.5}, "rank is 2.5"),
    ({"rank": True}, "rank is True"),
    ({"rank": "8"}, "rank is '8'"),
    ({"alpha": 0}, "alpha is 0; expected a finite number above 0"),
    ({"alpha": math.nan}, "alpha is nan"),
    ({"alpha": math.inf}, "alpha is inf"),
    ({"alpha": -1.0}, "alpha is -1.0"),
    ({"dropout": 1.0}, "outside 0 ≤ p < 1"),
    ({"dropout": -0.1}, "outside 0 ≤ p < 1"),
    ({"dropout": math.nan}, "outside 0 ≤ p < 1"),
    ({"targets": ""}, "targets is empty"),
    ({"targets": ()}, "targets is empty"),
    ({"targets": ("q_proj", "")}, "targets is empty"),
    ({"targets": "(q_proj"}, "targets: .* is no regular expression"),
    ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] is 0"),
    ({"rank_pattern": {"[": 4}}, "rank_pattern: .* is no regular expression"),
    ({"alpha_pattern": {"q_proj": -1.0}}, r"alpha_pattern\['q_proj'\] is -1.0"),
    ({"alpha_pattern": {"(": 1.0}}, "alpha_pattern: .* is no regular expression"),
    ({"bias": "lora_only"}, "bias is 'lora_only'; expected none, all or adapter_only"),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_a_value_out_of_range_is_refused_with_what_was_expected(values, message):
    with pytest.raises(AdapterError, match=message):
        AdapterSpec(method="lora", **values)


def test_a_pattern_matches_the_end_of_a_path_and_the_first_match_counts():
    spec = AdapterSpec(
        method="lora",
        rank=8,
        rank_pattern={r"layers\.1\..*q_proj": 4, "q_proj": 2, "proj": 1},
        alpha_pattern={"v": 3.0},
    )
    assert spec.rank_of("model.layers.1.self_attn.q_proj") == 4
    assert spec.rank_of("model.layers.0.self_attn.q_proj") == 2
    assert spec.rank_of("model.layers.0.self_attn.v_proj") == 8  # "proj" is no whole part of the path
    assert spec.alpha_of("model.v") == 3.0
    assert spec.alpha_of("model.layers.0.self_attn.v_proj") == 16.0
