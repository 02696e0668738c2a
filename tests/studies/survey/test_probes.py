"""Rounding to codes that only the study uses."""

import pytest
import torch

from studies.survey.probes import BLOCK, CODES, round_to


@pytest.mark.parametrize("name", CODES)
def test_every_weight_goes_to_the_nearest_value_of_its_block(name: str) -> None:
    weight = torch.randn(6, 2 * BLOCK, generator=torch.Generator().manual_seed(0))
    scaled = torch.tensor(CODES[name]) / max(CODES[name])
    table = torch.cat([-scaled, scaled])
    blocks = weight.reshape(-1, BLOCK)
    absmax = blocks.abs().amax(1, keepdim=True)
    gaps = (blocks.unsqueeze(-1) - absmax.unsqueeze(-1) * table).abs()
    nearest = gaps.amin(-1)
    torch.testing.assert_close((round_to(weight, CODES[name]).reshape(-1, BLOCK) - blocks).abs(), nearest)


def test_int4_has_fifteen_values() -> None:
    line = torch.linspace(-1, 1, BLOCK).reshape(1, BLOCK)
    assert len(round_to(line, CODES["Int4"]).unique()) == 15
