import pytest
import torch

from graftline.errors import QuantizeError
from graftline.weights.quant.blockwise import quantize
from graftline.weights.quant.scheme import Scheme


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        (Scheme("nf4", 64, True), 4 + 8 / 64 + 32 / (64 * 256)),
        (Scheme("nf4", 64, False), 4.5),
        (Scheme("nf3", 64, False), 3.5),
        (Scheme("nf2", 32, False), 3.0),
    ],
)
def test_bits_per_weight_is_the_formula_and_what_is_stored(scheme: Scheme, bits: float) -> None:
    assert scheme.bits_per_weight == pytest.approx(bits)
    quantized = quantize(torch.randn(512, 512), scheme)
    assert 8 * quantized.num_bytes / 512**2 == pytest.approx(bits, rel=1e-3)


def test_unknown_code_and_block_size_are_refused_with_the_allowed_ones() -> None:
    with pytest.raises(QuantizeError, match=r"'int4' is unknown; expected one of nf4, nf3, nf2"):
        Scheme("int4", 64, True)
    with pytest.raises(QuantizeError, match=r"block size 48 is not one of 32, 64"):
        Scheme("nf4", 48, True)
