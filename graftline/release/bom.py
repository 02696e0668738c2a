"""The bill of materials: what a release consists of and was made with, as CycloneDX 1.6 JSON (an ML-BOM).

Models and data are components of their own types, files carry their SHA-256, libraries their package address. Equal
input gives equal bytes. Source: https://cyclonedx.org/capabilities/mlbom/.
"""

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version as installed_version
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, Property, XsUri
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import License as CycloneDxLicense
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from graftline.digest import Digest, of_json, write_text
from graftline.release.card import License

BOM_NAME = "bom.cdx.json"
LIBRARIES = ("torch", "transformers", "accelerate", "safetensors", "bitsandbytes", "graftline")
"""What decides the numbers in a release."""


@dataclass(frozen=True, kw_only=True)
class BomData:
    """What the bill lists."""

    pipeline: str
    created: datetime
    base_model: str
    base_digest: Digest
    method: str
    """Adapter method, for example ``LoRA, rank 8``."""
    dataset: str
    data_digest: Digest
    files: Mapping[str, Digest]
    """Files of the package by path; the bill itself, manifest and signature come later and are not among them."""
    base_license: License | None = None
    data_license: License | None = None
    libraries: tuple[str, ...] = LIBRARIES
    """Installed packages to list with their versions."""


def render_bom(data: BomData) -> str:
    """The bill as JSON text."""
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
    """An SPDX identifier where it is one, else a name."""
    return [LicenseFactory().make_from_string(found.name)] if found else []


def _serial_number(data: BomData) -> uuid.UUID:
    """A number that is the same for the same content, so that packaging twice gives equal bytes."""
    content = {path: str(digest) for path, digest in data.files.items()}
    return uuid.UUID(of_json([data.pipeline, data.created.isoformat(), content]).hex[:32], version=4)
