from statistics import NormalDist

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map, get_4bit_type

from graftline.weights.quant.scheme import CODE_BITS, code_bounds, code_table, dynamic_map, nearest_codes


def test_nf4_is_bitsandbytes_table_to_the_bit() -> None:
    assert torch.equal(code_table("nf4"), get_4bit_type("nf4", device="cpu"))


def test_dynamic_map_is_bitsandbytes_to_the_bit() -> None:
    assert torch.equal(dynamic_map(), create_dynamic_map())


def normal_float(bits: int) -> list[float]:
    """Quantiles of the normal distribution, scaled to [−1, 1], with an exact zero (QLoRA §3, LoftQ's reference code).

    2^(bits−1) quantiles above zero and one less below it, evenly spaced in probability from 0.9677083 to 0.5.
    """
    half = 2 ** (bits - 1)
    negative = [NormalDist().inv_cdf(p) for p in spaced(0.9677083, 0.5, half)]
    positive = [NormalDist().inv_cdf(p) for p in spaced(0.9677083, 0.5, half + 1)]
    return [-value / negative[0] for value in negative] + [0.0] + [value / positive[0] for value in positive][::-1]


def spaced(start: float, stop: float, count: int) -> list[float]:
    return [start + (stop - start) * index / (count - 1) for index in range(count - 1)]


@pytest.mark.parametrize("code", CODE_BITS)
def test_tables_follow_the_rule(code: str) -> None:
    assert code_table(code).tolist() == pytest.approx(normal_float(CODE_BITS[code]), abs=2e-7)


@pytest.mark.parametrize("code", CODE_BITS)
def test_tables_ascend_from_minus_one_to_one_with_an_exact_zero(code: str) -> None:
    table = code_table(code)
    assert len(table) == 2 ** CODE_BITS[code]
    assert table[0] == -1
    assert table[-1] == 1
    assert (table == 0).sum() == 1
    assert (table.diff() > 0).all()
    assert ((code_bounds(code) > table[:-1]) & (code_bounds(code) < table[1:])).all()


@pytest.mark.parametrize("code", CODE_BITS)
def test_look_up_of_codes_equals_a_search_of_the_bounds_everywhere(code: str) -> None:
    bounds = code_bounds(code)
    edges = torch.arange(-128, 129) / 128
    around = torch.cat([bounds, edges, torch.tensor([0.0, -0.0])])
    steps = [around]
    for _ in range(3):  # the next floats above and below each bound and edge
        steps += [torch.nextafter(steps[-1], torch.tensor(2.0))]
    steps += [torch.nextafter(around, torch.tensor(-2.0)), around + 1e-9, around - 1e-9, torch.rand(200_000) * 2 - 1]
    values = torch.cat(steps).clamp(-1, 1)
    assert torch.equal(nearest_codes(values, code).long(), torch.bucketize(values, bounds))
