"""The table of adapter methods. A new one is a file and a line here; the conformance suite then tests it."""

import difflib

from graftline.adapters import bottleneck, dora, full, loftq, lora, pissa, rslora, vera
from graftline.adapters.base import Method
from graftline.errors import AdapterError

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        full.METHOD,
        bottleneck.HOULSBY,
        bottleneck.PFEIFFER,
        lora.METHOD,
        rslora.METHOD,
        dora.METHOD,
        pissa.METHOD,
        pissa.QUANTIZED,
        vera.METHOD,
        loftq.METHOD,
    )
}


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        AdapterError: there is none; the nearest names are given.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise AdapterError(f"there is no adapter method {name!r}; {hint}known: {', '.join(METHODS)}")
    return METHODS[name]
