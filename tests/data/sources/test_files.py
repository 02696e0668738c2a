"""The files that a folder or a pattern names, on this machine and in a bucket."""

import os
from pathlib import Path

import boto3
import pytest

from graftline.data.sources import list_files, parse
from graftline.errors import SourceError
from tests.registry.servers import BUCKET, CREDENTIALS

TREE = (
    "rows/b.jsonl",
    "rows/a.jsonl",
    "rows/A.jsonl",
    "rows/.hidden.jsonl",
    "rows/notes.txt",
    "rows/day=2/part-0.parquet",
    "rows/day=10/part-0.parquet",
    "rows/day=10/_SUCCESS",
    "rows/_tmp/c.jsonl",
    "other.jsonl",
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in TREE:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return tmp_path


def names(address: str, root: Path) -> list[str] | None:
    found = list_files(parse(address), root)
    return None if found is None else [str(file.source) for file in found]


PATTERNS: list[tuple[str, list[str]]] = [
    ("rows/*.jsonl", ["rows/A.jsonl", "rows/a.jsonl", "rows/b.jsonl"]),
    ("rows/?.jsonl", ["rows/A.jsonl", "rows/a.jsonl", "rows/b.jsonl"]),
    ("rows/[ab].jsonl", ["rows/a.jsonl", "rows/b.jsonl"]),
    ("rows/[!b].jsonl", ["rows/A.jsonl", "rows/a.jsonl"]),
    ("rows/.*.jsonl", ["rows/.hidden.jsonl"]),
    ("rows/day=*/*.parquet", ["rows/day=10/part-0.parquet", "rows/day=2/part-0.parquet"]),
    ("*/*/part-0.parquet", ["rows/day=10/part-0.parquet", "rows/day=2/part-0.parquet"]),
    ("**/?.jsonl", ["rows/A.jsonl", "rows/_tmp/c.jsonl", "rows/a.jsonl", "rows/b.jsonl"]),
    ("rows/**/part-*", ["rows/day=10/part-0.parquet", "rows/day=2/part-0.parquet"]),
    (
        "rows/",
        [
            "rows/A.jsonl",
            "rows/a.jsonl",
            "rows/b.jsonl",
            "rows/day=10/part-0.parquet",
            "rows/day=2/part-0.parquet",
        ],
    ),
]


@pytest.mark.parametrize(("pattern", "expected"), PATTERNS)
def test_files_come_in_the_order_of_their_names(tree: Path, pattern: str, expected: list[str]) -> None:
    assert names(f"path:{pattern}", tree) == [f"path:{name}" for name in expected]


def test_a_folder_needs_no_slash(tree: Path) -> None:
    assert names("path:rows", tree) == names("path:rows/", tree)


def test_a_file_whose_own_name_looks_like_a_pattern_is_that_file(tree: Path) -> None:
    (tree / "rows" / "[ab].jsonl").write_text("{}")
    assert names("path:rows/[ab].jsonl", tree) is None


def test_a_whole_path_and_the_home_folder_work(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tree))
    assert names(f"path:{tree}/o*.jsonl", Path("/")) == [f"path:{tree}/other.jsonl"]
    assert names("path:~/o*.jsonl", Path("/")) == ["path:~/other.jsonl"]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("path:rows/*.csv", r"path:rows/\*\.csv matches no file; .*check the address"),
        ("path:row/*.jsonl", r"path:row/: there is no file or folder .*did you mean rows\?"),
        ("path:~nobody-here/*.jsonl", "Could not determine home directory.*; write the whole path"),
        (f"path:{'x' * 300}/*.jsonl", "cannot look for path:x.*: File name too long; check the path"),
        ("path:empty", "path:empty holds no file of rows; a folder's rows are in its .csv, .json"),
    ],
)
def test_what_matches_nothing_says_so(tree: Path, address: str, message: str) -> None:
    (tree / "empty").mkdir()
    (tree / "empty" / "notes.txt").touch()
    with pytest.raises(SourceError, match=message):
        names(address, tree)


def test_links_are_followed_but_in_no_circle(tree: Path) -> None:
    (tree / "rows" / "day=2" / "up").symlink_to(tree / "rows", target_is_directory=True)
    (tree / "linked").mkdir()
    (tree / "linked" / "day").symlink_to(tree / "rows" / "day=2", target_is_directory=True)

    assert names("path:rows/**/part-0.parquet", tree) == names("path:rows/day=*/part-0.parquet", tree)
    assert names("path:linked/*/part-0.parquet", tree) == ["path:linked/day/part-0.parquet"]


def test_a_link_that_leads_nowhere_is_not_passed_over(tree: Path) -> None:
    (tree / "rows" / "c.jsonl").symlink_to("gone.jsonl")
    assert "path:rows/c.jsonl" in (names("path:rows/*.jsonl", tree) or [])


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
def test_a_folder_that_cannot_be_read_is_named(tree: Path) -> None:
    (tree / "rows" / "day=2").chmod(0)
    try:
        with pytest.raises(SourceError, match=r"cannot read the folder .*day=2"):
            names("path:rows/day=*/*.parquet", tree)
    finally:
        (tree / "rows" / "day=2").chmod(0o700)


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    client = boto3.client("s3")
    for left in client.list_objects_v2(Bucket=BUCKET).get("Contents", ()):  # moto's servers share what they hold
        client.delete_object(Bucket=BUCKET, Key=left["Key"])
    for name in (*TREE, "rows/"):
        client.put_object(Bucket=BUCKET, Key=name, Body=b"{}")


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize(("pattern", "expected"), PATTERNS)
def test_objects_match_as_files_do(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    assert names(f"s3://{BUCKET}/{pattern}", tmp_path) == [f"s3://{BUCKET}/{name}" for name in expected]


@pytest.mark.usefixtures("bucket")
def test_an_object_is_one_thing_and_what_matches_no_object_is_told(tmp_path: Path) -> None:
    assert names(f"s3://{BUCKET}/other.jsonl", tmp_path) is None
    with pytest.raises(SourceError, match=rf"s3://{BUCKET}/rows/\*\.csv matches no file"):
        names(f"s3://{BUCKET}/rows/*.csv", tmp_path)
    with pytest.raises(SourceError, match=r"s3://absent-bucket/\*\.csv: the store answered 404 NoSuchBucket; check"):
        names("s3://absent-bucket/*.csv", tmp_path)


@pytest.mark.usefixtures("bucket")
def test_a_listing_of_many_pages_is_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "2")
    assert len(names(f"s3://{BUCKET}/rows/**", tmp_path) or []) == 8
