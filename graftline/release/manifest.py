"""The manifest: every file of a release with size and SHA-256, and everything the release was made from.

```python
manifest = describe(folder, pipeline="demo", created=now, lineage=lineage, verdict=verdict)
write_manifest(folder, manifest)
check_folder(folder, read_manifest(folder))  # ReleaseError lists what is missing, extra and changed
```

The digest of its bytes identifies the release. Format 2 also says what the verdict is about (`Judged`), and the
release's own files must bear it out (`graftline.registry.binding`). Format 1 stays readable for ever
(tests/old_artifacts).
"""

from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from graftline.digest import Digest, atomic_write, of_file
from graftline.errors import ReleaseError
from graftline.progress import OnProgress, silent
from graftline.release.paths import MANIFEST_NAME, check_distinct, check_path, list_files
from graftline.release.record import DigestText, Part, Record


class FileEntry(Part):
    """One file of a release."""

    path: str
    num_bytes: Annotated[int, Field(ge=0)]
    digest: DigestText


class Lineage(Part):
    """What a release was made from."""

    base_digest: DigestText
    """Base the adapter was trained on (tensors, independent of sharding)."""
    source_digest: DigestText | None
    """Unquantized base that one was made from; None if it is the base itself."""
    quantizer_digest: DigestText | None
    """Description of the quantizer; None for a dense base."""
    data_digest: DigestText
    """Prepared rows, training and evaluation."""
    template_digest: DigestText
    """Chat template and special tokens."""
    config_digest: DigestText
    """The pipeline's part of pipelines.yaml, with resolved sources."""
    dvc_lock_digest: DigestText | None
    """dvc.lock of the run; None outside a DVC repository."""
    code_revision: str
    """Git commit, with ``-dirty`` when the work tree had changes; ``unknown`` without git."""
    trust_remote_code: bool
    """True when the base needed code of its own to be run."""


class GateVerdict(Part):
    """What the gate said."""

    outcome: Literal["pass", "fail", "inconclusive"]
    against: str
    """Version of the release it was compared with; ``base`` for a first release."""
    digest: DigestText
    """verdict.json of the run."""
    release: DigestText | None = None
    """Digest of the release that ``against`` names; None for ``base``, and where it was not recorded."""

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Records from before this field have to keep their bytes.
        values: dict[str, Any] = handler(self)
        if self.release is None:
            del values["release"]
        return values


class Judged(Part):
    """What the verdict is about. The base and the template are in the lineage."""

    adapter: DigestText
    """Every file of the adapter's folder but the tokenizer's."""
    tokenizer: DigestText
    """The tokenizer's files, which lie beside the adapter."""
    rows: DigestText
    """The file of evaluation rows."""


class Manifest(Record):
    """A release's contents and origin."""

    kind: ClassVar[str] = "manifest"
    format: Literal[1, 2] = 1
    pipeline: str
    created: datetime
    """UTC, whole seconds."""
    files: tuple[FileEntry, ...]
    """Sorted by path."""
    lineage: Lineage
    verdict: GateVerdict
    judged: Judged | None = None
    """None in format 1."""

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        if self.format == 1:
            del values["judged"]
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.created.utcoffset() != timedelta(0) or self.created.microsecond:
            raise ValueError(f"created is {self.created.isoformat()}; expected a UTC time in whole seconds")
        if (self.format == 1) != (self.judged is None):
            raise ValueError(f"format {self.format} {'has no' if self.judged else 'needs'} judged: what was scored")
        paths = [check_path(entry.path) for entry in self.files]
        if not paths or paths != sorted(paths):
            raise ValueError("files must be a list sorted by path that is not empty")
        check_distinct(paths)
        return self

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(entry.num_bytes for entry in self.files)

    @property
    def version(self) -> str:
        """UTC time and short digest: ``20261124T061800Z-0123456789ab``. A function of the manifest's bytes."""
        return f"{self.created:%Y%m%dT%H%M%SZ}-{self.digest.short}"


def describe(
    folder: Path,
    *,
    pipeline: str,
    created: datetime,
    lineage: Lineage,
    verdict: GateVerdict,
    judged: Judged | None = None,
    on_progress: OnProgress = silent,
) -> Manifest:
    """Make the manifest of a package folder: every file is read and hashed.

    Without ``judged`` it has format 1, which says nothing of what was scored.

    Raises:
        ReleaseError: a link, an unsafe or colliding path, or nothing in the folder.
    """
    paths = list_files(folder)
    entries = []
    for done, path in enumerate(paths, start=1):
        entries.append(FileEntry(path=path, num_bytes=(folder / path).stat().st_size, digest=of_file(folder / path)))
        on_progress(done, len(paths))
    return Manifest(
        format=2 if judged else 1,
        pipeline=pipeline,
        created=created.replace(microsecond=0),
        files=tuple(entries),
        lineage=lineage,
        verdict=verdict,
        judged=judged,
    )


def write_manifest(folder: Path, manifest: Manifest) -> Digest:
    """Write ``manifest.json`` into a package folder; returns the release's digest."""
    with atomic_write(folder / MANIFEST_NAME) as out:
        out.write(manifest.to_bytes())
    return out.digest


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a package folder.

    Raises:
        ReleaseError: there is none, or it is not right.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file() or path.is_symlink():
        raise ReleaseError(
            f"{folder} has no {MANIFEST_NAME}; expected a package folder, make one with `graftline package`"
        )
    return Manifest.parse(path.read_bytes())


def check_folder(folder: Path, manifest: Manifest) -> None:
    """Compare a folder's files with its manifest; each is read.

    Raises:
        ReleaseError: lists the files that are missing, extra or changed.
    """
    expected = {entry.path: entry for entry in manifest.files}
    present = list_files(folder)
    problems = [f"missing: {path}" for path in expected if path not in present]
    problems += [f"not in the manifest: {path}" for path in present if path not in expected]
    for path in present:
        entry = expected.get(path)
        if entry and ((folder / path).stat().st_size != entry.num_bytes or of_file(folder / path) != entry.digest):
            problems.append(f"changed: {path}")
    if problems:
        raise ReleaseError(
            f"{folder} is not what its manifest says ({len(problems)} of {len(expected)} files): "
            f"{'; '.join(problems[:10])}; fetch the release again"
        )
