"""Checked configuration: `load` reads pipelines.yaml, `schema` describes it.

>>> from graftline.settings import load                           # doctest: +SKIP
>>> load().pipeline("wordnet-category").adapter.rank            # doctest: +SKIP
8
"""

from graftline.settings.loader import DEFAULT_FILE, Config, Setting, load, parse_config, schema
from graftline.settings.model import (
    Adapter,
    Answers,
    Approvals,
    Base,
    Channel,
    Check,
    Data,
    Evaluate,
    EvaluationRows,
    Forgetting,
    FreezeWindow,
    Gate,
    Guards,
    Harness,
    Package,
    Pipeline,
    Quantize,
    Release,
    Resources,
    RowSource,
    Train,
)
from graftline.settings.tree import narrowed

__all__ = [
    "DEFAULT_FILE",
    "Adapter",
    "Answers",
    "Approvals",
    "Base",
    "Channel",
    "Check",
    "Config",
    "Data",
    "Evaluate",
    "EvaluationRows",
    "Forgetting",
    "FreezeWindow",
    "Gate",
    "Guards",
    "Harness",
    "Package",
    "Pipeline",
    "Quantize",
    "Release",
    "Resources",
    "RowSource",
    "Setting",
    "Train",
    "load",
    "narrowed",
    "parse_config",
    "schema",
]
