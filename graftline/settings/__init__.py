"""Checked configuration: `load` reads pipelines.yaml, `schema` describes it.

>>> from graftline.settings import load                           # doctest: +SKIP
>>> load().pipeline("wordnet-category").adapter.rank            # doctest: +SKIP
8
"""

from graftline.settings.answers import AnswerJudge, Answers
from graftline.settings.channels import Approvals, Channel, Drift, FreezeWindow, RequestLog, Rollout
from graftline.settings.data import Check, Data, EvaluationRows, RowSource
from graftline.settings.loader import DEFAULT_FILE, Config, Setting, load, parse_config, schema
from graftline.settings.machines import Prices, Resources
from graftline.settings.model import (
    Adapter,
    Base,
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
from graftline.settings.objective import Objective
from graftline.settings.start import Init
from graftline.settings.tree import narrowed
from graftline.settings.webhooks import Webhook

__all__ = [
    "DEFAULT_FILE",
    "Adapter",
    "AnswerJudge",
    "Answers",
    "Approvals",
    "Base",
    "Channel",
    "Check",
    "Config",
    "Data",
    "Drift",
    "Evaluate",
    "EvaluationRows",
    "Forgetting",
    "FreezeWindow",
    "Gate",
    "Guards",
    "Harness",
    "Init",
    "Objective",
    "Package",
    "Pipeline",
    "Prices",
    "Quantize",
    "Release",
    "RequestLog",
    "Resources",
    "Rollout",
    "RowSource",
    "Setting",
    "Train",
    "Webhook",
    "load",
    "narrowed",
    "parse_config",
    "schema",
]
