"""Small packages made by code."""

from datetime import UTC, datetime
from pathlib import Path

from graftline.digest import of_bytes
from graftline.registry.reserve import ROWS
from graftline.release.manifest import GateVerdict, Lineage, Manifest, describe, write_manifest

CREATED = datetime(2026, 11, 24, 6, 18, 0, tzinfo=UTC)
LINEAGE = Lineage(
    base_digest=of_bytes(b"base"),
    source_digest=of_bytes(b"source"),
    quantizer_digest=of_bytes(b"nf4"),
    data_digest=of_bytes(b"rows"),
    template_digest=of_bytes(b"chatml"),
    config_digest=of_bytes(b"configuration"),
    dvc_lock_digest=None,
    code_revision="0123abc",
    trust_remote_code=False,
)
VERDICT = GateVerdict(outcome="pass", against="base", digest=of_bytes(b"verdict"))


def write_files(folder: Path, seed: str = "a") -> None:
    """Four files, one in a folder, one empty, one with a space and a letter outside ASCII."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(seed.encode() * 70_000)
    (folder / "README.md").write_text(f"# {seed}\n")
    (folder / "empty.txt").touch()
    (folder / "notes für später.txt").write_text("ä")


def make_package(
    folder: Path, seed: str = "a", *, pipeline: str = "demo", verdict: GateVerdict = VERDICT, reserve: str = ""
) -> Manifest:
    """A package folder with its manifest; ``reserve``: the text of the rows that only promotions look at."""
    write_files(folder, seed)
    if reserve:
        (folder / ROWS).parent.mkdir()
        (folder / ROWS).write_text(reserve)
    manifest = describe(folder, pipeline=pipeline, created=CREATED, lineage=LINEAGE, verdict=verdict)
    write_manifest(folder, manifest)
    return manifest
