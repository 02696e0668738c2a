import json
import os
import string
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from graftline.digest import Digest, of_bytes, of_file
from graftline.errors import ReleaseError
from graftline.release.manifest import (
    FileEntry,
    GateVerdict,
    Lineage,
    Manifest,
    check_distinct,
    check_folder,
    check_path,
    describe,
    read_manifest,
    write_manifest,
)
from tests.release.packages import CREATED, LINEAGE, VERDICT, make_package, write_files


def test_a_manifest_lists_every_file_with_size_and_digest(tmp_path: Path) -> None:
    manifest = make_package(tmp_path / "package")
    listed = [(e.path, e.num_bytes, e.digest) for e in manifest.files]
    assert listed == [
        (name, (tmp_path / "package" / name).stat().st_size, of_file(tmp_path / "package" / name))
        for name in ("README.md", "adapter/adapter_model.safetensors", "empty.txt", "notes für später.txt")
    ]
    assert manifest.num_bytes == sum(size for _, size, _ in listed)


def test_the_folder_it_was_made_from_passes(tmp_path: Path) -> None:
    manifest = make_package(tmp_path / "package")
    check_folder(tmp_path / "package", read_manifest(tmp_path / "package"))
    assert read_manifest(tmp_path / "package") == manifest


def test_the_digest_is_the_one_of_the_file(tmp_path: Path) -> None:
    manifest = make_package(tmp_path / "package")
    assert manifest.digest == of_file(tmp_path / "package" / "manifest.json")
    assert manifest.version == f"20261124T061800Z-{manifest.digest.short}"


def test_the_same_files_moved_have_the_same_manifest(tmp_path: Path) -> None:
    assert make_package(tmp_path / "one") == make_package(tmp_path / "other place")


def test_missing_extra_and_changed_files_are_all_named(tmp_path: Path) -> None:
    package = tmp_path / "package"
    manifest = make_package(package)
    (package / "empty.txt").unlink()
    (package / "extra.bin").touch()
    (package / "README.md").write_text("# b\n")  # same size
    with pytest.raises(ReleaseError) as caught:
        check_folder(package, manifest)
    for problem in ("missing: empty.txt", "not in the manifest: extra.bin", "changed: README.md", "3 of 4 files"):
        assert problem in str(caught.value)


@pytest.mark.parametrize("position", [0, 35_000, 69_999])
def test_one_changed_byte_is_found(tmp_path: Path, position: int) -> None:
    manifest = make_package(tmp_path / "package")
    path = tmp_path / "package" / "adapter" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(ReleaseError, match=r"changed: adapter/adapter_model\.safetensors"):
        check_folder(tmp_path / "package", manifest)


def test_links_are_refused(tmp_path: Path) -> None:
    write_files(tmp_path / "package")
    (tmp_path / "package" / "link").symlink_to("README.md")
    with pytest.raises(ReleaseError, match="is a link"):
        make_from(tmp_path / "package")


def test_a_linked_folder_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path / "package")
    (tmp_path / "package" / "link").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(ReleaseError, match="is a link"):
        make_from(tmp_path / "package")


def test_special_files_are_refused(tmp_path: Path) -> None:
    write_files(tmp_path / "package")
    os.mkfifo(tmp_path / "package" / "pipe")
    with pytest.raises(ReleaseError, match="special file"):
        make_from(tmp_path / "package")


def test_names_that_differ_in_case_only_are_refused(tmp_path: Path) -> None:
    write_files(tmp_path / "package")
    (tmp_path / "package" / "readme.MD").touch()
    with pytest.raises(ReleaseError, match="one file where case does not count"):
        make_from(tmp_path / "package")


def test_hidden_files_are_refused(tmp_path: Path) -> None:
    write_files(tmp_path / "package")
    (tmp_path / "package" / ".env").touch()
    with pytest.raises(ReleaseError, match=r"'\.env' cannot be part of a release"):
        make_from(tmp_path / "package")


def test_a_folder_without_files_or_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="is not a folder"):
        make_from(tmp_path / "absent")
    with pytest.raises(ReleaseError, match="no files"):
        make_from(tmp_path)


def make_from(folder: Path) -> Manifest:
    return describe(folder, pipeline="demo", created=CREATED, lineage=LINEAGE, verdict=VERDICT)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "..",
        "../a",
        "a/../../b",
        "a/./b",
        "a//b",
        "a/",
        "./a",
        ".hidden",
        "a/.b",
        "a\\b",
        "C:/a",
        "C:a",
        "a\nb",
        "a\0b",
        "a\u202eb",
        "a.",
        "a ",
        "a./b",
        "a*",
        "a?",
        'a"',
        "a<b",
        "a|b",
        "manifest.json",
        "MANIFEST.JSON",
        "model.sig",
        "Model.Sig",
        "cafe\u0301",
        "x" * 401,
    ],
)
def test_unsafe_paths_are_refused(path: str) -> None:
    with pytest.raises(ReleaseError, match="cannot be part of a release"):
        check_path(path)


@pytest.mark.parametrize("path", ["a", "a/b.c", "x-y_z 1.txt", "für/später", "sub/manifest.json", "a..b"])
def test_plain_paths_are_accepted(path: str) -> None:
    assert check_path(path) == path


@pytest.mark.parametrize("paths", [("a", "A"), ("straße", "STRASSE"), ("a/b", "A/b"), ("a", "a/b"), ("A", "a/b/c")])
def test_paths_that_collide_are_refused(paths: tuple[str, ...]) -> None:
    with pytest.raises(ReleaseError, match="rename one of them"):
        check_distinct(paths)


def document(**changes: Any) -> dict[str, Any]:
    """A right manifest as JSON, with changes at dotted paths; None removes nothing, ``...`` removes the key."""
    manifest = Manifest(
        pipeline="demo",
        created=CREATED,
        files=(
            FileEntry(path="a", num_bytes=1, digest=of_bytes(b"a")),
            FileEntry(path="b", num_bytes=2, digest=of_bytes(b"b")),
        ),
        lineage=LINEAGE,
        verdict=VERDICT,
    )
    value: dict[str, Any] = json.loads(manifest.to_bytes())
    for name, change in changes.items():
        *parents, last = name.split("__")
        target: Any = value
        for parent in parents:
            target = target[int(parent) if parent.isdigit() else parent]
        if change is ...:
            del target[last]
        else:
            target[last] = change
    return value


def written(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def test_the_document_the_bad_ones_are_made_from_is_right() -> None:
    assert Manifest.parse(written(document())).files[1].num_bytes == 2


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"format": 2}, "format"),
    ({"format": "1"}, "format"),
    ({"format": ...}, "canonical"),
    ({"pipeline": ...}, "pipeline"),
    ({"pipeline": 7}, "pipeline"),
    ({"created": "yesterday"}, "created"),
    ({"created": "2026-11-24T06:18:00+01:00"}, "UTC"),
    ({"created": "2026-11-24T06:18:00.5Z"}, "whole seconds"),
    ({"created": "2026-11-24T06:18:00"}, "UTC"),
    ({"created": "2026-11-24T06:18:00+00:00"}, "canonical"),
    ({"created": 0}, "created"),
    ({"files": []}, "not empty"),
    ({"files": None}, "files"),
    ({"files": {}}, "files"),
    ({"files__0__path": "../a"}, "cannot be part"),
    ({"files__0__path": "/a"}, "cannot be part"),
    ({"files__0__path": "b"}, "one file"),
    ({"files__0__path": "B"}, "one file"),
    ({"files__1__path": "a/b"}, "is a file and the folder"),
    ({"files__0__path": "z"}, "sorted"),
    ({"files__0__path": 3}, "path"),
    ({"files__0__path": ...}, "path"),
    ({"files__0__num_bytes": -1}, "num_bytes"),
    ({"files__0__num_bytes": 1.5}, "num_bytes"),
    ({"files__0__num_bytes": True}, "num_bytes"),
    ({"files__0__num_bytes": "1"}, "num_bytes"),
    ({"files__0__digest": "sha256:12"}, "not of the form"),
    ({"files__0__digest": "md5:" + "0" * 64}, "not of the form"),
    ({"files__0__digest": "sha256:" + "A" * 64}, "not of the form"),
    ({"files__0__digest": None}, "digest"),
    ({"files__0__mode": 755}, "mode"),
    ({"lineage": ...}, "lineage"),
    ({"lineage": []}, "lineage"),
    ({"lineage__base_digest": None}, "base_digest"),
    ({"lineage__base_digest": ...}, "base_digest"),
    ({"lineage__dvc_lock_digest": ...}, "dvc_lock_digest"),
    ({"lineage__trust_remote_code": "no"}, "trust_remote_code"),
    ({"lineage__trust_remote_code": 0}, "trust_remote_code"),
    ({"lineage__author": "me"}, "author"),
    ({"verdict__outcome": "maybe"}, "outcome"),
    ({"verdict__outcome": "PASS"}, "outcome"),
    ({"verdict__digest": ...}, "digest"),
    ({"signature": "me"}, "signature"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_FIELDS)
def test_a_wrong_field_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ReleaseError, match=message):
        Manifest.parse(written(document(**changes)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"7",
        b'"manifest"',
        b"\xff\xfe{}",
        b"\x00",
        b"[" * 100_000,
        written(document())[:-2],
        written(document()) + b"{}",
        b"\xef\xbb\xbf" + written(document()),
        b"{}",
        written(document()).replace(b'"', b"'"),
    ],
)
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(ReleaseError, match="manifest is not"):
        Manifest.parse(data)


@pytest.mark.parametrize(
    "data",
    [
        json.dumps(document()).encode(),
        written(document()).rstrip(),
        written(document()).replace(b"{\n", b'{\n  "pipeline": "other",\n', 1),
        written(document()).replace(b'"num_bytes": 1,', b'"num_bytes": 1,\n      "num_bytes": 1,'),
        written(document()).replace(b'"demo"', b'"\\u0064emo"'),
    ],
)
def test_another_spelling_of_a_right_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(ReleaseError, match="not in canonical form"):
        Manifest.parse(data)


def test_a_manifest_made_in_code_is_checked_too() -> None:
    with pytest.raises(ValidationError, match="UTC"):
        Manifest(
            pipeline="demo",
            created=datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=1))),
            files=(FileEntry(path="a", num_bytes=0, digest=of_bytes(b"")),),
            lineage=LINEAGE,
            verdict=VERDICT,
        )


digests = st.binary(min_size=32, max_size=32).map(lambda raw: Digest(raw.hex()))
components = st.text(string.ascii_letters + string.digits + "äß文 -_", min_size=1, max_size=8).filter(
    lambda c: c.strip() == c
)
paths = st.lists(components, min_size=1, max_size=3).map("/".join)
times = st.datetimes(datetime(1970, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC)).map(
    lambda t: t.replace(microsecond=0)
)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    names = draw(st.lists(paths, min_size=1, max_size=6, unique=True))
    try:
        check_distinct(names)
    except ReleaseError:
        names = names[:1]
    files = tuple(
        FileEntry(path=name, num_bytes=draw(st.integers(0, 2**60)), digest=draw(digests)) for name in sorted(names)
    )
    optional = st.none() | digests
    lineage = Lineage(
        base_digest=draw(digests),
        source_digest=draw(optional),
        quantizer_digest=draw(optional),
        data_digest=draw(digests),
        template_digest=draw(digests),
        config_digest=draw(digests),
        dvc_lock_digest=draw(optional),
        code_revision=draw(st.text(max_size=10)),
        trust_remote_code=draw(st.booleans()),
    )
    outcome = draw(st.sampled_from(["pass", "fail", "inconclusive"]))
    verdict = GateVerdict(outcome=outcome, against=draw(st.text(max_size=10)), digest=draw(digests))
    return Manifest(
        pipeline=draw(st.text(max_size=10)), created=draw(times), files=files, lineage=lineage, verdict=verdict
    )


@given(manifests())
def test_writing_and_reading_is_the_identity(manifest: Manifest) -> None:
    data = manifest.to_bytes()
    assert Manifest.parse(data) == manifest
    assert Manifest.parse(data).to_bytes() == data


@given(manifests(), st.data())
def test_any_changed_byte_is_refused_or_changes_the_digest(manifest: Manifest, data: st.DataObject) -> None:
    raw = bytearray(manifest.to_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        changed = Manifest.parse(bytes(raw))
    except ReleaseError:
        return
    assert changed != manifest
    assert changed.digest != manifest.digest


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode()))
def test_no_bytes_make_the_parser_fail_in_another_way(data: bytes) -> None:
    with pytest.raises(ReleaseError):
        Manifest.parse(data)


@given(st.text(max_size=60))
def test_an_accepted_path_stays_below_its_folder(path: str) -> None:
    try:
        check_path(path)
    except ReleaseError:
        return
    resolved = os.path.normpath(f"/folder/{path}")
    assert resolved == f"/folder/{path}"


def test_writing_is_atomic_and_repeats(tmp_path: Path) -> None:
    manifest = make_package(tmp_path / "package")
    before = sorted(p.name for p in (tmp_path / "package").iterdir())
    assert write_manifest(tmp_path / "package", manifest) == manifest.digest
    assert sorted(p.name for p in (tmp_path / "package").iterdir()) == before
