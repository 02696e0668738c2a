"""Which weight is quantized how: one scheme for all linear layers, or a mixture by name."""

import re
from dataclasses import dataclass
from typing import Any

from graftline.errors import QuantizeError
from graftline.settings.model import Quantize
from graftline.weights.quant.scheme import Scheme


@dataclass(frozen=True)
class QuantizationPlan:
    """``default`` for every linear layer inside the blocks, unless a rule matches.

    rules: (regular expression, scheme); the first that matches the module's path from its start decides.

    Raises:
        QuantizeError: a rule that is not a regular expression.
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
        """Refuse a rule that matches none of the model's linear layers: it is a misspelling.

        Raises:
            QuantizeError: such a rule; it is named.
        """
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
    """The plan that a pipeline's section asks for.

    Raises:
        QuantizeError: nothing is to be quantized, or a range of layers whose first number is the larger one.
    """
    if quantize.method == "none":
        raise QuantizeError("quantize.method is none: the dense base serves as it is; choose nf4 or another code book")

    def scheme(code: str) -> Scheme:
        return Scheme(code, quantize.block_size, quantize.double_quant)

    if quantize.method != "mixed":
        return QuantizationPlan(scheme(quantize.method))
    rules = tuple((_pattern(key), scheme(_CODES[bits])) for key, bits in quantize.bits.items())
    return QuantizationPlan(scheme(_CODES[4]), rules)


def _pattern(key: str) -> str:
    """A layer range such as ``0-7`` as a regular expression on the module's path; anything else is one already."""
    bounds = re.fullmatch(r"(\d+)-(\d+)", key)
    if not bounds:
        return key
    first, last = int(bounds[1]), int(bounds[2])
    if first > last:
        raise QuantizeError(f"quantize.bits names the layers {key}; expected the smaller number first")
    return rf".*\.(?:{'|'.join(map(str, range(first, last + 1)))})\."
