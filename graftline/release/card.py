"""A package's model card and its bill of materials."""

import io
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, Property, XsUri
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import License as CycloneDxLicense
from cyclonedx.output.json import JsonV1Dot6
from jinja2 import Environment, PackageLoader, StrictUndefined
from packageurl import PackageURL
from ruamel.yaml import YAML

from graftline.digest import Digest, of_json, write_text
from graftline.plain_text import count, duration
from graftline.release.pages.report import MetricRow, Outcome


@dataclass(frozen=True, kw_only=True)
class License:
    """The licence of something that the release was made from."""

    of: str
    """``base model``, ``training data``…"""
    name: str
    """SPDX identifier if there is one."""


@dataclass(frozen=True, kw_only=True)
class CardData:
    """The content of the model card."""

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
    judged_by: str = ""
    """Which rows the figures come from, and whether they chose the release, in a sentence."""
    lineage: tuple[tuple[str, str], ...] = ()
    """Name and digest of everything that the release was made from."""
    files: tuple[tuple[str, str], ...] = ()
    """Files and their descriptions."""
    training_seconds: float | None = None
    hardware: str = ""
    energy_watt_hours: float | None = None
    """Of the training, if it is known."""
    energy_source: str = ""
    """What was measured, and how the rest was estimated."""
    money: str = ""
    """What making the release cost, in a sentence without its full stop; empty if no prices are known."""
    notes: tuple[str, ...] = ()
    """What else a user should know, in sentences, such as why no merged model ships."""


def render_card(data: CardData) -> str:
    """README.md: the YAML front matter that the Hugging Face hub reads, and the same facts for people.

    Source of the fields: https://huggingface.co/docs/hub/model-cards (``base_model_relation``, ``model-index``).
    """
    environment = Environment(
        loader=PackageLoader("graftline.release"),
        autoescape=False,  # noqa: S701  # Markdown, not HTML: cells are escaped by their filter
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"count": count, "duration": duration}
    environment.filters["cell"] = _cell
    environment.filters["number"] = lambda value: "–" if value is None else f"{value:.4g}"
    return f"---\n{_front_matter(data)}---\n\n{environment.get_template('card.md').render(data=data)}"


def write_card(folder: Path, data: CardData) -> Digest:
    """Write ``README.md`` into a package folder; returns the file's digest."""
    return write_text(folder / "README.md", render_card(data))


def _front_matter(data: CardData) -> str:
    value: dict[str, Any] = {
        "library_name": "peft",
        **_hub_license(data.licenses[0].name if data.licenses else None),
        "tags": ["graftline", data.method.split(",")[0].lower()],
    }
    if found := _HUB_NAME.fullmatch(data.base_model):  # the hub knows no bases elsewhere
        value |= {"base_model": found["name"], "base_model_relation": "adapter"}
    if data.metrics:
        value["model-index"] = [{"name": data.pipeline, "results": [_result(data, data.metrics)]}]
    text = io.StringIO()
    yaml = YAML(typ="safe")
    yaml.default_flow_style = False
    yaml.dump(value, text)
    return text.getvalue()


_HUB_NAME = re.compile(r"(hf:)?(?P<name>[\w.-]+/[\w.-]+)(@.*)?", re.ASCII)
_HUB_LICENSES = frozenset(
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m "  # noqa: SIM905
    "afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 "
    "cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 "
    "cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 "
    "cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl "
    "gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl "
    "openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license "
    "fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown other".split()
)
"""What the hub takes for `license` (https://huggingface.co/docs/hub/repositories-licenses); it refuses other names."""


def _hub_license(name: str | None) -> dict[str, str]:
    """The front matter's fields on the licence."""
    if name is None:
        return {"license": "other"}
    return {"license": name.lower()} if name.lower() in _HUB_LICENSES else {"license": "other", "license_name": name}


def _result(data: CardData, metrics: Sequence[MetricRow]) -> dict[str, Any]:
    return {
        "task": {"type": "text-generation", "name": data.task},
        "dataset": {"type": data.dataset or "private", "name": data.dataset or "private"},
        "metrics": [{"type": row.name, "value": round(row.candidate, 6)} for row in metrics],
    }


def _cell(text: str) -> str:
    """Text that stays within one cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


BOM_NAME = "bom.cdx.json"
LIBRARIES = ("torch", "transformers", "accelerate", "safetensors", "bitsandbytes", "graftline")
"""The libraries that affect a release's numbers."""


@dataclass(frozen=True, kw_only=True)
class BomData:
    """The content of the bill of materials."""

    pipeline: str
    created: datetime
    base_model: str
    base_digest: Digest
    method: str
    """Adapter method, for example ``LoRA, rank 8``."""
    dataset: str
    data_digest: Digest
    files: Mapping[str, Digest]
    """Files of the package by path, without the bill itself, the manifest and the signature."""
    base_license: License | None = None
    data_license: License | None = None
    libraries: tuple[str, ...] = LIBRARIES
    """Installed packages to list with their versions."""


def render_bom(data: BomData) -> str:
    """The bill of materials as CycloneDX 1.6 JSON (an ML-BOM, https://cyclonedx.org/capabilities/mlbom/).

    Files have their SHA-256, libraries their package address. Equal input gives equal bytes.
    """
    model = Component(
        name=data.pipeline,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="model",
        description=f"{data.method} adapter for {data.base_model}",
        external_references=[ExternalReference(type=ExternalReferenceType.MODEL_CARD, url=XsUri("README.md"))],
    )
    base = Component(
        name=data.base_model,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="base",
        properties=[Property(name="graftline:base_digest", value=str(data.base_digest))],
        licenses=_licenses(data.base_license),
    )
    rows = Component(
        name=data.dataset or "data",
        type=ComponentType.DATA,
        bom_ref="data",
        properties=[Property(name="graftline:data_digest", value=str(data.data_digest))],
        licenses=_licenses(data.data_license),
    )
    files = [_file(path, digest) for path, digest in sorted(data.files.items())]
    libraries = [_library(name) for name in data.libraries]
    bom = Bom(
        components=[base, rows, *files, *libraries],
        metadata=BomMetaData(component=model, timestamp=data.created),
        serial_number=_serial_number(data),
    )
    bom.register_dependency(model, [base, rows, *files, *libraries])
    return json.dumps(json.loads(JsonV1Dot6(bom).output_as_string()), indent=2, sort_keys=True) + "\n"


def write_bom(folder: Path, data: BomData) -> Digest:
    """Write ``bom.cdx.json`` into a package folder; returns the file's digest."""
    return write_text(folder / BOM_NAME, render_bom(data))


def _file(path: str, digest: Digest) -> Component:
    hashes = [HashType(alg=HashAlgorithm.SHA_256, content=digest.hex)]
    return Component(name=path, type=ComponentType.FILE, bom_ref=f"file:{path}", hashes=hashes)


def _library(name: str) -> Component:
    version = installed_version(name)
    address = PackageURL("pypi", name=name, version=version)
    return Component(name=name, version=version, type=ComponentType.LIBRARY, bom_ref=address.to_string(), purl=address)


def _licenses(found: License | None) -> list[CycloneDxLicense]:
    """As an SPDX identifier if it is one, otherwise as a name."""
    return [LicenseFactory().make_from_string(found.name)] if found else []


def _serial_number(data: BomData) -> uuid.UUID:
    """A number derived from the content, so that packaging twice gives equal bytes."""
    content = {path: str(digest) for path, digest in data.files.items()}
    return uuid.UUID(of_json([data.pipeline, data.created.isoformat(), content]).hex[:32], version=4)
