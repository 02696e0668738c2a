"""How weights are quantized: code books, schemes, which weight gets which, and the entry in config.json."""

import re
from collections.abc import Collection
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, get_args

import torch
from torch import Tensor

from graftline.errors import QuantizeError
from graftline.settings.model import BlockSize, Quantize

# Tables of the values of codes, ascending in [−1, 1]: quantiles of the normal distribution with an exact zero, from
# Dettmers et al. 2023 (arXiv 2305.14314), as in bitsandbytes. Recomputing them agrees only to 1e-7, and a difference in
# the last bit makes another file, so the constants are the definition.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# The same rule with 3 and 2 bits, as in LoftQ's reference code; their positive quantiles are also NF4's.
NF3 = (-1.0, -0.47862916, -0.21714182, 0.0, NF4[9], NF4[11], NF4[13], 1.0)
NF2 = (-1.0, 0.0, NF4[11], 1.0)

# Cells in [0, 1] of the look-up table for nearest codes; a power of two, so that scaling by it is exact.
_CELLS = 128
CODE_BITS = {"nf4": 4, "nf3": 3, "nf2": 2}
_TABLES = {"nf4": NF4, "nf3": NF3, "nf2": NF2}


@cache
def code_table(code: str) -> Tensor:
    """The fp32 table of a code, shape (2^bits,). It is shared: do not write to it."""
    return torch.tensor(_TABLES[code], dtype=torch.float32)


@cache
def code_bounds(code: str) -> Tensor:
    """Midpoints between neighbours of a table, shape (2^bits − 1,): where the nearest code changes."""
    table = code_table(code)
    return (table[1:] + table[:-1]) / 2


def nearest_codes(scaled: Tensor, code: str) -> Tensor:
    """Index of the table value nearest to each of ``scaled`` (n,) fp32 in [−1, 1], ties to the lower one: (n,) uint8.

    Equals ``bucketize(scaled, code_bounds(code))`` but is ten times faster: [−1, 1] is divided into cells with at most
    one bound each, so that a look-up and one comparison decide. With three bounds, comparing with each is faster still.
    """
    if CODE_BITS[code] == 2:
        first, *others = code_bounds(code).tolist()
        codes = scaled.gt(first).view(torch.uint8)
        for bound in others:
            codes += scaled.gt(bound)
        return codes
    lowest, bounds = (table.to(scaled.device) for table in _cell_tables(code))
    # Rounding may move a value across a cell's edge, but every bound is on an edge or further from it than that.
    cells = scaled.mul(_CELLS).add_(_CELLS).to(torch.int32)
    return lowest.index_select(0, cells).add_(scaled > bounds.index_select(0, cells))


@cache
def _cell_tables(code: str) -> tuple[Tensor, Tensor]:
    """For each cell the code at its lower edge, uint8, and the bound inside it (or one that is never passed), fp32."""
    bounds = code_bounds(code)
    cells_of_bounds = (bounds * _CELLS + _CELLS).long()
    lowest = (torch.arange(2 * _CELLS + 1).unsqueeze(1) > cells_of_bounds).sum(dim=1, dtype=torch.uint8)
    return lowest, torch.full((2 * _CELLS + 1,), 2.0).scatter(0, cells_of_bounds, bounds)


@cache
def dynamic_map() -> Tensor:
    """The signed 8-bit dynamic data type of the constants, shape (256,), fp32 (Dettmers 2015, arXiv 1511.04561).

    For k = 0…6 the midpoints of 2^k equal parts of [0.1, 1], times 10^(k−6), with both signs; and 0 and 1.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2
        values += (10 ** (exponent - 6) * middles).tolist() + (-(10 ** (exponent - 6)) * middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


BLOCK_SIZES: tuple[int, ...] = get_args(BlockSize)
"""Those of bitsandbytes."""
ROW = 0
"""The block size of FP8: the weights of one output feature share a scale, as `torch._scaled_mm` wants it."""
NESTED_BLOCK_SIZE = 256
"""bitsandbytes' fixed block size for quantized constants."""


@dataclass(frozen=True)
class Scheme:
    """Blockwise quantization to a table of 2^bits values, or to FP8.

    code: nf4, nf3 or nf2; fp8 for torch.float8_e4m3fn. block_size: weights that share a constant; `ROW` for fp8.
    double_quant: constants in 8 bits.

    Raises:
        QuantizeError: an unknown code or block size.
    """

    code: str
    block_size: int
    double_quant: bool

    def __post_init__(self) -> None:
        if self.code == "fp8":
            if self.block_size != ROW or self.double_quant:
                raise QuantizeError(
                    f"fp8 with block size {self.block_size} and double_quant {self.double_quant}; expected one scale a "
                    f"row, in fp32: block size {ROW}, no double quantization"
                )
            return
        if self.code not in CODE_BITS:
            known = ", ".join((*CODE_BITS, "fp8"))
            raise QuantizeError(f"quantization code {self.code!r} is unknown; expected one of {known}")
        if self.block_size not in BLOCK_SIZES:
            raise QuantizeError(f"block size {self.block_size} is not one of {', '.join(map(str, BLOCK_SIZES))}")

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 8 if self.code == "fp8" else CODE_BITS[self.code]

    @property
    def bits_per_weight(self) -> float:
        """Bits of a code and its share of the constants (QLoRA §3): NF4 4.127 with double quantization, 4.5 without.

        FP8's scales are not counted: how many weights share one is up to the weight (32 bits a row, 0.008 at I = 4096).
        """
        if self.code == "fp8":
            return 8.0
        constants = 8 + 32 / NESTED_BLOCK_SIZE if self.double_quant else 32
        return self.bits + constants / self.block_size

    def as_json(self) -> dict[str, Any]:
        """For identities and reports."""
        return asdict(self)


FP8 = Scheme("fp8", ROW, False)


@dataclass(frozen=True)
class QuantizationPlan:
    """``default`` for every linear layer inside the blocks, unless a rule matches.

    rules: (regular expression, scheme); the first that matches the start of a module's path applies.

    Raises:
        QuantizeError: a rule is not a regular expression.
    """

    default: Scheme
    rules: tuple[tuple[str, Scheme], ...] = ()

    def __post_init__(self) -> None:
        for pattern, _ in self.rules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise QuantizeError(f"the rule {pattern!r} is not a regular expression: {error}; correct it") from error

    def scheme_of(self, module: str) -> Scheme:
        """The scheme of a linear layer, by its path (``model.layers.0.mlp.up_proj``)."""
        for pattern, scheme in self.rules:
            if re.match(pattern, module):
                return scheme
        return self.default

    def check_rules(self, modules: list[str]) -> None:
        """Raise QuantizeError for a rule that matches none of the model's linear layers."""
        if not modules:
            raise QuantizeError("the model has no linear layer inside its blocks; is it cut short?")
        for pattern, _ in self.rules:
            if not any(re.match(pattern, module) for module in modules):
                raise QuantizeError(
                    f"the rule {pattern!r} matches no linear layer inside the blocks (the first is {modules[0]!r}); "
                    "head, embeddings and norms stay dense: correct the rule or leave it out"
                )

    def as_json(self) -> dict[str, Any]:
        """For identities and reports."""
        return {
            "default": self.default.as_json(),
            "rules": [[pattern, scheme.as_json()] for pattern, scheme in self.rules],
        }


_CODES = {2: "nf2", 3: "nf3", 4: "nf4"}


def plan_of(quantize: Quantize) -> QuantizationPlan:
    """The plan of a pipeline's section.

    Raises:
        QuantizeError: nothing is to be quantized, or a range of layers begins with the larger number.
    """
    if quantize.method == "none":
        raise QuantizeError("quantize.method is none: the dense base serves as it is; choose nf4 or another code book")

    def scheme(code: str) -> Scheme:
        if code == "fp8":
            return FP8
        return Scheme(code, quantize.block_size, quantize.double_quant)

    if quantize.method != "mixed":
        return QuantizationPlan(scheme(quantize.method))
    rules = tuple((_pattern(key), scheme(_CODES[bits])) for key, bits in quantize.bits.items())
    return QuantizationPlan(scheme(_CODES[4]), rules)


def _pattern(key: str) -> str:
    """A key of ``quantize.bits`` as a regular expression on a module's path; ``0-7`` is a range of layers."""
    bounds = re.fullmatch(r"(\d+)-(\d+)", key)
    if not bounds:
        return key
    first, last = int(bounds[1]), int(bounds[2])
    if first > last:
        raise QuantizeError(f"quantize.bits names the layers {key}; expected the smaller number first")
    return rf".*\.(?:{'|'.join(map(str, range(first, last + 1)))})\."


def quantization_config(plan: QuantizationPlan, schemes: Collection[Scheme], dtype: str) -> dict[str, Any]:
    """The ``quantization_config`` in config.json, from the linear layers' schemes and the source's ``dtype``.

    If all are NF4 it is bitsandbytes' configuration, so that transformers loads the folder. Otherwise it names a method
    that transformers does not know, so that it stops instead of filling in random weights.
    """
    if any(scheme.code != "nf4" for scheme in schemes):
        return {"quant_method": "graftline", "format": 1, **plan.as_json()}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": plan.default.double_quant,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": ["lm_head"],
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }
