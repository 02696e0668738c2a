"""The model card: README.md with the YAML front matter that the Hugging Face hub reads, and the same facts for people.

Source of the fields: https://huggingface.co/docs/hub/model-cards (``base_model_relation``, ``model-index``).
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from ruamel.yaml import YAML

from graftline.digest import Digest, write_text
from graftline.release.pages.report_data import MetricRow, Outcome


@dataclass(frozen=True, kw_only=True)
class License:
    """Licence of one thing that the release was made from."""

    of: str
    """``base model``, ``training data``…"""
    name: str
    """SPDX identifier where there is one."""


@dataclass(frozen=True, kw_only=True)
class CardData:
    """What the card says."""

    pipeline: str
    base_model: str
    """Name or address of the base, for example ``HuggingFaceTB/SmolLM2-135M-Instruct``."""
    method: str
    """Adapter method and rank in words, for example ``LoRA, rank 8``."""
    task: str
    """What the model is for, in a sentence."""
    outcome: Outcome
    against: str
    """What the gate compared with: a version or ``base``."""
    licenses: tuple[License, ...]
    metrics: tuple[MetricRow, ...] = ()
    dataset: str = ""
    num_training_rows: int = 0
    num_evaluation_rows: int = 0
    lineage: tuple[tuple[str, str], ...] = ()
    """Name and digest of everything the release was made from."""
    files: tuple[tuple[str, str], ...] = ()
    """File and what it is."""
    training_seconds: float | None = None
    hardware: str = ""
    energy_watt_hours: float | None = None
    """Of the training; None where nothing is known."""
    energy_source: str = ""
    """What of it was measured, and how the rest was estimated."""
    notes: tuple[str, ...] = ()
    """What else a user should know, in sentences: that no merged model ships and why."""


def render_card(data: CardData) -> str:
    """README.md: front matter and text."""
    environment = Environment(
        loader=PackageLoader("graftline.release"),
        autoescape=False,  # Markdown, not HTML: cells are escaped by their filter
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _cell
    environment.filters["number"] = lambda value: "–" if value is None else f"{value:.4g}"
    return f"---\n{_front_matter(data)}---\n\n{environment.get_template('card.md').render(data=data)}"


def write_card(folder: Path, data: CardData) -> Digest:
    """Write ``README.md`` into a package folder; returns the file's digest."""
    return write_text(folder / "README.md", render_card(data))


def _front_matter(data: CardData) -> str:
    value: dict[str, Any] = {
        "base_model": data.base_model,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": data.licenses[0].name.lower() if data.licenses else "other",
        "tags": ["graftline", data.method.split(",")[0].lower()],
    }
    if data.metrics:
        value["model-index"] = [{"name": data.pipeline, "results": [_result(data, data.metrics)]}]
    text = io.StringIO()
    yaml = YAML(typ="safe")
    yaml.default_flow_style = False
    yaml.dump(value, text)
    return text.getvalue()


def _result(data: CardData, metrics: Sequence[MetricRow]) -> dict[str, Any]:
    return {
        "task": {"type": "text-generation", "name": data.task},
        "dataset": {"type": data.dataset or "private", "name": data.dataset or "private"},
        "metrics": [{"type": row.name, "value": round(row.candidate, 6)} for row in metrics],
    }


def _cell(text: str) -> str:
    """Text that stays within one cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
