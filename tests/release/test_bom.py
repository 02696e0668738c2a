import dataclasses
import json
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from graftline.digest import of_bytes
from graftline.release.card import BOM_NAME, BomData, License, render_bom, write_bom
from tests.release.packages import CREATED

DATA = BomData(
    pipeline="demo",
    created=CREATED,
    base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
    base_digest=of_bytes(b"base"),
    method="LoRA, rank 8",
    dataset="wordnet",
    data_digest=of_bytes(b"rows"),
    files={"adapter/adapter_model.safetensors": of_bytes(b"weights"), "README.md": of_bytes(b"card")},
    base_license=License(of="base", name="Apache-2.0"),
    data_license=License(of="data", name="the WordNet licence"),
    libraries=("pydantic", "boto3"),
)


@pytest.mark.parametrize(
    "data", [DATA, dataclasses.replace(DATA, base_license=None, data_license=None, files={}, dataset="")]
)
def test_the_bill_follows_the_schema_of_cyclonedx_1_6(data: BomData) -> None:
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(render_bom(data)) is None


def test_models_data_files_and_libraries_are_components_of_their_types() -> None:
    bom = json.loads(render_bom(DATA))
    by_ref = {component["bom-ref"]: component for component in bom["components"]}
    assert bom["metadata"]["component"]["type"] == "machine-learning-model"
    assert by_ref["base"]["type"] == "machine-learning-model"
    assert by_ref["data"]["type"] == "data"
    assert by_ref["file:README.md"]["hashes"] == [{"alg": "SHA-256", "content": of_bytes(b"card").hex}]
    assert any(ref.startswith("pkg:pypi/pydantic@2") for ref in by_ref)
    assert bom["dependencies"][[d["ref"] for d in bom["dependencies"]].index("model")]["dependsOn"] == sorted(by_ref)


def test_licences_are_spdx_identifiers_where_they_are_known() -> None:
    by_ref = {component["bom-ref"]: component for component in json.loads(render_bom(DATA))["components"]}
    assert by_ref["base"]["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert by_ref["data"]["licenses"] == [{"license": {"name": "the WordNet licence"}}]


def test_equal_content_gives_equal_bytes_and_other_content_another_number(tmp_path: Path) -> None:
    assert write_bom(tmp_path, DATA) == write_bom(tmp_path, DATA)
    other = dataclasses.replace(DATA, files={**DATA.files, "x": of_bytes(b"x")})
    first, second = json.loads((tmp_path / BOM_NAME).read_text()), json.loads(render_bom(other))
    assert first["serialNumber"] != second["serialNumber"]
