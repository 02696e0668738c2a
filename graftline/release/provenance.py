"""What a signed release was made from, in a form that other tools read: SLSA provenance v1 in an in-toto statement.

``provenance.intoto.json`` is a DSSE envelope, signed with the builder's key. Its subjects are the release's other
files, its dependencies the base, the rows, the template and the code. Everything in it that the manifest also says must
agree with the manifest (`problems`), whose signature covers this file too.

Sources: https://slsa.dev/spec/v1.0/provenance, https://github.com/in-toto/attestation/tree/main/spec/v1,
https://github.com/secure-systems-lab/dsse/blob/master/envelope.md.
"""

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from graftline.digest import Digest, of_bytes, write_text
from graftline.errors import ReleaseError
from graftline.release.manifest import Lineage, Manifest
from graftline.release.signing import is_signed, load_private_key, public_pem, sign_statement

PROVENANCE_NAME = "provenance.intoto.json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT, _PREDICATE = "https://in-toto.io/Statement/v1", "https://slsa.dev/provenance/v1"
_BUILD_TYPE = "urn:graftline:line:v1"
"""How to read the parameters: docs/releases.md."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class ProvenanceData:
    """The content of a statement."""

    pipeline: str
    created: datetime
    files: Mapping[str, Digest]
    """The release's files by path, without the statement itself, the manifest and the signature."""
    lineage: Lineage
    base: str
    """Address of the base; without secrets."""
    rows: str
    """Address of the rows; without secrets."""
    code: Digest
    """Of what the line's stages executed."""


def render_statement(data: ProvenanceData, *, builder: str) -> dict[str, Any]:
    """The in-toto statement; ``builder`` is the name of the signing key, see `key_id`."""
    addresses = {"base": data.base, "rows": data.rows}
    dependencies = [
        {"name": name, "digest": digest} | ({"uri": addresses[name]} if name in addresses else {})
        for name, digest in _dependencies(data.lineage).items()
    ]
    dependencies.append({"name": "stages", "digest": {"sha256": data.code.hex}})
    predicate = {
        "buildDefinition": {
            "buildType": _BUILD_TYPE,
            "externalParameters": {"pipeline": data.pipeline, "settings": str(data.lineage.config_digest)},
            "resolvedDependencies": dependencies,
        },
        "runDetails": {
            "builder": {
                "id": f"urn:graftline:builder:{builder}",
                "version": {name: installed_version(name) for name in ("graftline", "torch", "transformers")},
            },
            "metadata": {"finishedOn": f"{data.created:%Y-%m-%dT%H:%M:%SZ}"},
        },
    }
    return {
        "_type": _STATEMENT,
        "subject": _subjects(data.files),
        "predicateType": _PREDICATE,
        "predicate": predicate,
    }


def write_provenance(folder: Path, data: ProvenanceData, private_key: Path) -> Digest:
    """Write the signed statement into a package folder; returns the file's digest. ReleaseError as for a package."""
    key = load_private_key(private_key)
    identifier = key_id(key.public_key())
    payload = json.dumps(render_statement(data, builder=identifier), ensure_ascii=False, sort_keys=True).encode()
    envelope = {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": identifier, "sig": sign_statement(key, PAYLOAD_TYPE.encode(), payload)}],
    }
    return write_text(folder / PROVENANCE_NAME, json.dumps(envelope, sort_keys=True) + "\n")


def key_id(key: ec.EllipticCurvePublicKey) -> str:
    """A key's name in envelopes: the SHA-256 of its PEM."""
    return of_bytes(public_pem(key).encode()).hex


def problems(manifest: Manifest, data: bytes) -> list[str]:
    """What a statement says otherwise than the manifest of its release; ``data`` are the bytes of its file."""
    try:
        payload, _ = _open(data)
        statement = json.loads(payload)
        definition = statement["predicate"]["buildDefinition"]
        dependencies = {one["name"]: one["digest"] for one in definition["resolvedDependencies"]}
        files = {one["name"]: one["digest"] for one in statement["subject"]}
        said = (statement["_type"], statement["predicateType"], definition["externalParameters"]["pipeline"])
    except (ReleaseError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{PROVENANCE_NAME} cannot be read: {error!r}"]
    found = []
    if said != (_STATEMENT, _PREDICATE, manifest.pipeline):
        found.append(f"{PROVENANCE_NAME} is a statement of another kind or pipeline: {', '.join(map(str, said))}")
    listed = {entry.path: entry.digest for entry in manifest.files if entry.path != PROVENANCE_NAME}
    wanted = {one["name"]: one["digest"] for one in _subjects(listed)}
    wrong = sorted(str(name) for name in files.keys() | wanted.keys() if files.get(name) != wanted.get(name))
    if wrong or len(statement["subject"]) != len(files):
        found.append(f"{PROVENANCE_NAME} is about other files: {', '.join(wrong[:5]) or 'one is named twice'}")
    other = [name for name, digest in _dependencies(manifest.lineage).items() if dependencies.get(name) != digest]
    if other:
        found.append(f"{PROVENANCE_NAME} names another {', '.join(other)} than the manifest")
    return found


def signed_with(data: bytes, keys: Mapping[str, ec.EllipticCurvePublicKey]) -> str | None:
    """Name of the key that signed a statement; None if it was signed with a key that ``keys`` does not have.

    Raises:
        ReleaseError: it is not a signed statement, or the signature is not that of the key that it names.
    """
    payload, signatures = _open(data)
    names = {key_id(key): name for name, key in keys.items()}
    for signature in signatures:
        if (name := names.get(signature["keyid"])) is not None:
            if not is_signed(keys[name], signature["sig"], PAYLOAD_TYPE.encode(), payload):
                raise ReleaseError(f"the signature in {PROVENANCE_NAME} is not that of {name}; do not use this release")
            return name
    return None


def _open(data: bytes) -> tuple[bytes, list[dict[str, str]]]:
    """Payload and signatures of an envelope."""
    try:
        if len(data) > _MAX_BYTES:
            raise ValueError(f"it is longer than {_MAX_BYTES} bytes")
        envelope = json.loads(data)
        payload = base64.b64decode(envelope["payload"], validate=True)
        signatures = [{name: str(one[name]) for name in ("keyid", "sig")} for one in envelope["signatures"]]
        if envelope["payloadType"] != PAYLOAD_TYPE or not signatures:
            raise ValueError(f"expected a signed {PAYLOAD_TYPE}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ReleaseError(f"{PROVENANCE_NAME} is not a DSSE envelope: {error!r}; do not use this release") from error
    return payload, signatures


def _subjects(files: Mapping[str, Digest]) -> list[dict[str, Any]]:
    return [{"name": path, "digest": {"sha256": digest.hex}} for path, digest in sorted(files.items())]


def _dependencies(lineage: Lineage) -> dict[str, dict[str, str]]:
    """What a release was made from, by name, each with its digest set.

    A base's digest is one over its tensors, however they are spread over files, so it has a name of its own.
    """
    found = {"base": {"graftlineModel": lineage.base_digest.hex}}
    if lineage.source_digest:
        found["unquantized base"] = {"graftlineModel": lineage.source_digest.hex}
    found["rows"] = {"sha256": lineage.data_digest.hex}
    found["template"] = {"sha256": lineage.template_digest.hex}
    if lineage.dvc_lock_digest:
        found["dvc.lock"] = {"sha256": lineage.dvc_lock_digest.hex}
    if _COMMIT.fullmatch(lineage.code_revision):
        found["code"] = {"gitCommit": lineage.code_revision}
    if lineage.parent_digest:
        found["parent release"] = {"sha256": lineage.parent_digest.hex}
    return found
