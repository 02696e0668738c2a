"""How a quantized base and the first values of its adapter are made: the section `quantize.init`."""

from typing import Literal

from graftline.settings.fields import Section

InitKind = Literal["plain", "loftq", "qpissa"]
Weighting = Literal["none", "diagonal", "full"]


class Init(Section):
    """How the quantized base and the first adapter are made together."""

    kind: InitKind
    """As when `quantize.init` is a single word."""
    weighting: Weighting = "none"
    """Which error `loftq` minimizes: the weight's (`none`), or that of the layer's output on 128 training rows, with
    each input weighted by its root mean square (`diagonal`), or with the products of inputs too (`full`)."""


def shortest(init: InitKind | Init) -> InitKind | Init:
    """The short form where that is enough, so that both spellings are the same setting."""
    return init.kind if isinstance(init, Init) and init.weighting == "none" else init
