"""Checked configuration: `load` reads pipelines.yaml, `schema` describes it.

>>> from graftline.config import load                           # doctest: +SKIP
>>> load().pipeline("wordnet-category").adapter.rank            # doctest: +SKIP
8
"""

from graftline.config.loader import DEFAULT_FILE, Config, Setting, load, parse_config, schema
from graftline.config.model import (
    Adapter,
    Answers,
    Base,
    Channel,
    Check,
    Data,
    Evaluate,
    Forgetting,
    Gate,
    Guards,
    Harness,
    Package,
    Pipeline,
    Quantize,
    Release,
    Train,
)
from graftline.config.readers import narrowed

__all__ = [
    "DEFAULT_FILE",
    "Adapter",
    "Answers",
    "Base",
    "Channel",
    "Check",
    "Config",
    "Data",
    "Evaluate",
    "Forgetting",
    "Gate",
    "Guards",
    "Harness",
    "Package",
    "Pipeline",
    "Quantize",
    "Release",
    "Setting",
    "Train",
    "load",
    "narrowed",
    "parse_config",
    "schema",
]
