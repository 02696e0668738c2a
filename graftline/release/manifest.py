"""The manifest: every file of a release with its size and SHA-256, and everything that the release was made from.

```python
manifest = describe(folder, pipeline="demo", created=now, lineage=lineage, verdict=verdict)
write_manifest(folder, manifest)
check_folder(folder, read_manifest(folder))  # ReleaseError lists what is missing, extra and changed
```

The digest of its bytes identifies the release. Format 2 also records what the verdict is about (`Judged`), which the
release's files must confirm (`graftline.registry.binding`). Format 1 stays readable (tests/old_artifacts).
"""

import json
import unicodedata
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from graftline.digest import Digest, atomic_write, of_bytes, of_file
from graftline.errors import GraftlineError, ReleaseError
from graftline.logs import OnProgress, silent


def _read_digest(value: Any) -> Any:
    try:
        return Digest.parse(value) if isinstance(value, str) else value
    except GraftlineError as error:
        raise ValueError(str(error)) from error  # for pydantic


DigestText = Annotated[Digest, BeforeValidator(_read_digest), PlainSerializer(str, return_type=str)]
"""A `Digest` that is text in JSON."""


class Part(BaseModel):
    """A frozen, strictly typed part of a record: no unknown fields, no conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)


class Record(Part):
    """A JSON document with one canonical spelling, so that equal contents have equal digests.

    For every subclass R: ``R.parse(r.to_bytes()) == r`` and ``R.parse(data).to_bytes() == data``; repeated keys, other
    spacing and other spellings of a value are refused.
    """

    kind: ClassVar[str]
    """Its name in errors."""

    @property
    def digest(self) -> Digest:
        """Digest of the record's bytes."""
        return of_bytes(self.to_bytes())

    def to_bytes(self) -> bytes:
        """JSON with sorted keys, two spaces, UTF-8 and a line end."""
        return (json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read a record; ReleaseError if it is not valid, or not in canonical form."""
        try:
            record = cls.model_validate_json(data)
        except ValidationError as error:
            raise ReleaseError(
                f"{cls.kind} is not right: {_first_problem(error)}; fetch it again from its store"
            ) from error
        if record.to_bytes() != data:
            raise ReleaseError(
                f"{cls.kind} is not in canonical form (key order, spacing, repeated keys or spelling of a value): "
                "it was edited by hand; fetch it again from its store"
            )
        return record


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {first['msg']}{more}" if where else f"{first['msg']}{more}"


MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "model.sig"
_NOT_LISTED = frozenset({MANIFEST_NAME, SIGNATURE_NAME})
_MAX_PATH_BYTES = 400  # leaves room for the store's prefix within S3's 1024


def check_path(path: str) -> str:
    """Return ``path`` if a manifest may list it: the same file on every file system, inside the release's folder.

    Raises:
        ReleaseError: absolute, with ``..``, an empty or hidden component, a backslash, a colon, a control character, a
            trailing dot or space, not in Unicode's NFC form, too long, or a reserved name.
    """
    components = path.split("/")
    wrong = (
        any(_is_bad(component) for component in components)
        or path != unicodedata.normalize("NFC", path)
        or len(path.encode(errors="replace")) > _MAX_PATH_BYTES
        or path.casefold() in _NOT_LISTED
    )
    if wrong:
        raise ReleaseError(
            f"path {path!r} cannot be part of a release; expected a relative path with '/' whose components are "
            "not empty, hidden or '..', without backslash, colon or control character, and other than "
            f"{MANIFEST_NAME} and {SIGNATURE_NAME}"
        )
    return path


def _is_bad(component: str) -> bool:
    return (
        not component
        or component.startswith(".")
        or component.endswith((".", " "))
        or any(character in '\\:*?"<>|' for character in component)
        or not component.isprintable()
    )


def check_distinct(paths: Iterable[str]) -> None:
    """Raise ReleaseError if two paths differ only in case, or one is the folder of another."""
    seen: dict[str, str] = {}
    for path in paths:
        folded = path.casefold()
        if folded in seen:
            raise ReleaseError(
                f"paths {seen[folded]!r} and {path!r} are one file where case does not count; rename one of them"
            )
        seen[folded] = path
    for folded, path in seen.items():
        for parent in Path(folded).parents:
            if parent.as_posix() in seen:
                raise ReleaseError(
                    f"path {seen[parent.as_posix()]!r} is a file and the folder of {path!r}; rename one of them"
                )


def list_files(folder: Path) -> list[str]:
    """Paths of all files of a package folder that its manifest must list, sorted.

    Raises:
        ReleaseError: not a folder, a symbolic link or a special file in it, or a path that `check_path` refuses.
    """
    if not folder.is_dir():
        raise ReleaseError(f"{folder} is not a folder; give the package folder that `graftline package` wrote")
    found: list[str] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ReleaseError(
                f"{path} is a link or a special file; a release holds plain files only, copy its target there"
            )
        if path.is_file() and name not in _NOT_LISTED:
            found.append(check_path(name))
    if not found:
        raise ReleaseError(f"{folder} holds no files; expected the package folder that `graftline package` wrote")
    check_distinct(found)
    return found


class FileEntry(Part):
    """One file of a release."""

    path: str
    num_bytes: Annotated[int, Field(ge=0)]
    digest: DigestText


class Lineage(Part):
    """What a release was made from."""

    base_digest: DigestText
    """The base that the adapter was trained on (tensors, independent of sharding)."""
    source_digest: DigestText | None
    """The unquantized base that it was made from, if any."""
    quantizer_digest: DigestText | None
    """Description of the quantizer; None for a dense base."""
    data_digest: DigestText
    """Prepared rows, training and evaluation."""
    template_digest: DigestText
    """Chat template and special tokens."""
    config_digest: DigestText
    """The pipeline's section of pipelines.yaml, with resolved sources."""
    dvc_lock_digest: DigestText | None
    """dvc.lock of the run; None outside a DVC repository."""
    code_revision: str
    """Git commit, with ``-dirty`` if the work tree had changes; ``unknown`` without git."""
    trust_remote_code: bool
    """Whether the base's own code had to be run."""
    parent_version: str | None = None
    """The release whose adapter training started from; left out of the file for a fresh start."""
    parent_digest: DigestText | None = None
    """Of that release's manifest."""

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        return {name: value for name, value in values.items() if value is not None or not name.startswith("parent_")}


class AnchorVerdict(Part):
    """The verdict on a candidate against its channel's anchor."""

    version: str
    release: DigestText
    """Digest of the anchor's manifest."""
    is_better: bool
    """Whether the candidate is shown to be better, so that a promotion moves the anchor to it."""
    evidence: str
    """Differences and p-values, in words."""


class GateVerdict(Part):
    """The gate's verdict."""

    outcome: Literal["pass", "fail", "inconclusive"]
    against: str
    """Version of the release that it was compared with; ``base`` for a first release."""
    digest: DigestText
    """verdict.json of the run."""
    release: DigestText | None = None
    """Digest of the release that ``against`` names; None for ``base``, or if it was not recorded."""
    anchor: AnchorVerdict | None = None
    """None where there is no anchor."""

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Records from before these fields must keep their bytes.
        values: dict[str, Any] = handler(self)
        for name in ("release", "anchor"):
            if getattr(self, name) is None:
                del values[name]
        return values


class Judged(Part):
    """What was judged, beside the base and the template, which are in the lineage."""

    adapter: DigestText
    """The adapter folder's files without the tokenizer's."""
    tokenizer: DigestText
    """The tokenizer's files in the adapter's folder."""
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
        """UTC time and short digest: ``20261124T061800Z-0123456789ab``."""
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
    """Make the manifest of a package folder, whose files are hashed; format 1 without ``judged``.

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
    """Read the manifest of a package folder; ReleaseError if it is missing or not valid."""
    path = folder / MANIFEST_NAME
    if not path.is_file() or path.is_symlink():
        raise ReleaseError(
            f"{folder} has no {MANIFEST_NAME}; expected a package folder, make one with `graftline package`"
        )
    return Manifest.parse(path.read_bytes())


def check_folder(folder: Path, manifest: Manifest) -> None:
    """Compare a folder's bytes with its manifest; ReleaseError lists the files that are missing, extra or changed."""
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
