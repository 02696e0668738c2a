"""How a weight is quantized: which code, which blocks, whether the constants are quantized too."""

from dataclasses import asdict, dataclass
from typing import Any, get_args

from graftline.errors import QuantizeError
from graftline.settings.model import BlockSize
from graftline.weights.quant.codebooks import CODE_BITS

BLOCK_SIZES: tuple[int, ...] = get_args(BlockSize)
"""Those of bitsandbytes."""
NESTED_BLOCK_SIZE = 256
"""bitsandbytes' second level always has this many."""


@dataclass(frozen=True)
class Scheme:
    """Blockwise quantization to a table of 2^bits values.

    code: nf4, nf3 or nf2. block_size: weights that share one constant. double_quant: the constants in 8 bits.

    Raises:
        QuantizeError: an unknown code or block size.
    """

    code: str
    block_size: int
    double_quant: bool

    def __post_init__(self) -> None:
        if self.code not in CODE_BITS:
            raise QuantizeError(f"quantization code {self.code!r} is unknown; expected one of {', '.join(CODE_BITS)}")
        if self.block_size not in BLOCK_SIZES:
            raise QuantizeError(f"block size {self.block_size} is not one of {', '.join(map(str, BLOCK_SIZES))}")

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return CODE_BITS[self.code]

    @property
    def bits_per_weight(self) -> float:
        """Bits of a code and of its share of the constants, for whole blocks (QLoRA §3): NF4 4.127, or 4.5 plain."""
        constants = 8 + 32 / NESTED_BLOCK_SIZE if self.double_quant else 32
        return self.bits + constants / self.block_size

    def as_json(self) -> dict[str, Any]:
        """For identities and reports."""
        return asdict(self)
