"""Grafts small trained adapters onto a frozen base, proves that the result is better and puts it into production.

The names below are the public Python API. Each is imported on first use, so that ``import graftline`` is fast and does
not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graftline.api import (
        Model,
        attach_adapter,
        encode_rows,
        evaluate_model,
        export_adapter,
        load_adapter,
        merge_adapter,
        open_model,
        plan_training,
        quantize_model,
        save_adapter,
        split_rows,
        train_adapter,
    )
    from graftline.data.rows import read_rows
    from graftline.errors import GraftlineError
    from graftline.evaluate.gates import judge
    from graftline.settings.loader import load as load_settings
    from graftline.settings.model import Adapter, Evaluate, Gate, Quantize, Train

__all__ = [
    "Adapter",
    "Evaluate",
    "Gate",
    "GraftlineError",
    "Model",
    "Quantize",
    "Train",
    "attach_adapter",
    "encode_rows",
    "evaluate_model",
    "export_adapter",
    "judge",
    "load_adapter",
    "load_settings",
    "merge_adapter",
    "open_model",
    "plan_training",
    "quantize_model",
    "read_rows",
    "save_adapter",
    "split_rows",
    "train_adapter",
]

_ELSEWHERE = {
    "GraftlineError": ("graftline.errors", "GraftlineError"),
    "judge": ("graftline.evaluate.gates", "judge"),
    "load_settings": ("graftline.settings.loader", "load"),
    "read_rows": ("graftline.data.rows", "read_rows"),
    **{name: ("graftline.settings.model", name) for name in ("Adapter", "Evaluate", "Gate", "Quantize", "Train")},
}
"""Module and attribute of the names that `graftline.api` does not define."""


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'graftline' has no attribute {name!r}")
    module, there = _ELSEWHERE.get(name, ("graftline.api", name))
    value = globals()[name] = getattr(import_module(module), there)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
