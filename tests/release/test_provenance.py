"""The provenance statement, read with the tools of its standards: in-toto's models and securesystemslib's DSSE."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
from in_toto_attestation.v1.statement import Statement
from securesystemslib.dsse import Envelope
from securesystemslib.signer import SSlibKey

from graftline.digest import of_bytes, of_folder
from graftline.errors import ReleaseError
from graftline.release.manifest import Lineage, Manifest, describe
from graftline.release.provenance import (
    PROVENANCE_NAME,
    ProvenanceData,
    problems,
    render_statement,
    signed_with,
    write_provenance,
)
from graftline.release.signing import create_key, load_private_key
from tests.release.packages import CREATED, LINEAGE, VERDICT, write_files

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def data_of(folder: Path, lineage: Lineage = LINEAGE) -> ProvenanceData:
    return ProvenanceData(
        pipeline="demo",
        created=CREATED,
        files=of_folder(folder),
        lineage=lineage,
        base="hf:org/base@main",
        rows="s3://bucket/rows.jsonl",
        code=of_bytes(b"code"),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A package folder with its statement; ``key`` lies beside it."""
    write_files(tmp_path / "package")
    create_key(tmp_path / "key")
    write_provenance(tmp_path / "package", data_of(tmp_path / "package"), tmp_path / "key")
    return tmp_path / "package"


def manifest_of(folder: Path) -> Manifest:
    return describe(folder, pipeline="demo", created=CREATED, lineage=LINEAGE, verdict=VERDICT)


def test_the_standards_own_libraries_accept_signature_statement_and_predicate(folder: Path) -> None:
    (line,) = (folder / PROVENANCE_NAME).read_text(encoding="utf-8").splitlines()
    envelope = Envelope.from_dict(json.loads(line))
    (signature,) = envelope.signatures
    public = folder.with_name("key.pub").read_text(encoding="utf-8")
    key = SSlibKey(signature, "ecdsa", "ecdsa-sha2-nistp256", {"public": public})
    assert envelope.verify([key], 1)
    statement = json.loads(envelope.payload)
    Statement.copy_from_pb(ParseDict(statement, statement_pb2.Statement())).validate()
    predicate = ParseDict(statement["predicate"], provenance_pb2.Provenance())  # refuses unknown fields
    assert predicate.build_definition.build_type
    assert predicate.run_details.builder.id
    for dependency in predicate.build_definition.resolved_dependencies:
        ResourceDescriptor.copy_from_pb(dependency).validate()


def test_its_subjects_are_the_other_files_and_its_dependencies_what_the_release_was_made_from(folder: Path) -> None:
    envelope = json.loads((folder / PROVENANCE_NAME).read_bytes())
    statement = json.loads(base64.b64decode(envelope["payload"]))
    files = {entry.path: entry.digest.hex for entry in manifest_of(folder).files if entry.path != PROVENANCE_NAME}
    assert {one["name"]: one["digest"]["sha256"] for one in statement["subject"]} == files
    definition = statement["predicate"]["buildDefinition"]
    assert {one["name"]: one.get("uri") for one in definition["resolvedDependencies"]} == {
        "base": "hf:org/base@main",
        "unquantized base": None,
        "rows": "s3://bucket/rows.jsonl",
        "template": None,
        "stages": None,
    }
    assert problems(manifest_of(folder), (folder / PROVENANCE_NAME).read_bytes()) == []


def test_a_clean_commit_is_named_and_a_changed_work_tree_is_not_passed_off_as_one(tmp_path: Path) -> None:
    write_files(tmp_path)

    def code(revision: str) -> list[Any]:
        lineage = LINEAGE.model_copy(update={"code_revision": revision})
        statement = render_statement(data_of(tmp_path, lineage), builder="x")
        found = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
        return [one["digest"] for one in found if one["name"] == "code"]

    assert code(COMMIT) == [{"gitCommit": COMMIT}]
    assert code(f"{COMMIT}-dirty") == code("unknown") == []


def changed(folder: Path, change: Callable[[Any], Any]) -> bytes:
    """The envelope with a changed statement."""
    envelope = json.loads((folder / PROVENANCE_NAME).read_bytes())
    statement = json.loads(base64.b64decode(envelope["payload"]))
    change(statement)
    envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    return json.dumps(envelope).encode()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda it: it["subject"].pop(), "is about other files: notes"),
        (lambda it: it["subject"].append(it["subject"][0]), "one is named twice"),
        (lambda it: it["subject"][0]["digest"].update(sha256="0" * 64), "is about other files: README.md"),
        (lambda it: it["subject"][0]["digest"].update(sha512="0"), "is about other files: README.md"),
        (
            lambda it: it["predicate"]["buildDefinition"]["resolvedDependencies"][0]["digest"].update(
                graftlineModel="0" * 64
            ),
            "names another base than",
        ),
        (lambda it: it["predicate"]["buildDefinition"]["resolvedDependencies"].pop(2), "names another rows than"),
        (lambda it: it["predicate"]["buildDefinition"]["externalParameters"].update(pipeline="other"), "pipeline"),
        (lambda it: it.update(predicateType="https://slsa.dev/provenance/v0.2"), "of another kind"),
        (lambda it: it.clear(), "cannot be read"),
        (lambda it: it.update(subject=[1]), "cannot be read"),
        (lambda it: it["predicate"].update(buildDefinition=[]), "cannot be read"),
    ],
)
def test_a_statement_that_says_something_else_than_the_manifest_is_found_and_its_signature_does_not_hold(
    folder: Path, change: Callable[[Any], Any], problem: str
) -> None:
    data = changed(folder, change)
    (found,) = problems(manifest_of(folder), data)
    assert problem in found
    key = load_private_key(folder.with_name("key")).public_key()
    with pytest.raises(ReleaseError, match="is not that of bob"):
        signed_with(data, {"bob": key})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"{}",
        b"\xff",
        b'{"payload": 1, "payloadType": "application/vnd.in-toto+json", "signatures": []}',
        b'{"payload": "e30=", "payloadType": "application/vnd.in-toto+json", "signatures": []}',
        b'{"payload": "e30=", "payloadType": "text/plain", "signatures": [{"keyid": "a", "sig": "b"}]}',
        b'{"payload": "?", "payloadType": "application/vnd.in-toto+json", "signatures": [{"keyid": "a", "sig": "b"}]}',
        b"[" * 100_000,
    ],
)
def test_what_is_not_an_envelope_is_refused(folder: Path, data: bytes) -> None:
    with pytest.raises(ReleaseError, match="is not a DSSE envelope"):
        signed_with(data, {})
    (found,) = problems(manifest_of(folder), data)
    assert "cannot be read" in found


def test_who_signed_it_is_named_by_the_key_ring(folder: Path, tmp_path: Path) -> None:
    data = (folder / PROVENANCE_NAME).read_bytes()
    create_key(tmp_path / "other")
    keys = {name: load_private_key(tmp_path / name).public_key() for name in ("key", "other")}
    assert signed_with(data, keys) == "key"
    assert signed_with(data, {"other": keys["other"]}) is None
