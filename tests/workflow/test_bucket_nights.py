"""Rows in a bucket, night after night: what has moved is seen, fetched and recorded, and nothing else runs."""

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import boto3
import pytest

from graftline.digest import of_bytes
from graftline.errors import SourceError
from graftline.settings import load
from graftline.workflow import inputs, pinned_sources, resolve, shelf, watching
from graftline.workflow.fetching import fetch_inputs
from tests.line.project import read_yaml, write_yaml
from tests.registry.servers import BUCKET, CREDENTIALS, make_bucket, moto_server
from tests.workflow.opened import open_pipeline
from tests.workflow.tiny_project import PIPELINE, commit, make_repository, make_rows

ROWS = make_rows(460)
OTHER, LOCAL = "parts", "local"
ALL = [PIPELINE, OTHER]


def lines(rows: Sequence[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def put(key: str, rows: Sequence[dict[str, str]]) -> None:
    boto3.client("s3").put_object(Bucket=BUCKET, Key=key, Body=lines(rows))


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with moto_server() as running:
        make_bucket(running)
        yield running


@pytest.fixture
def repository(tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three pipelines: one of an object, one of a growing set of objects, one of a local file."""
    for name, value in (CREDENTIALS | {"AWS_ENDPOINT_URL": endpoint}).items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "absent"))
    monkeypatch.setenv("GRAFTLINE_CACHE", str(tmp_path / "cache"))
    put("rows.jsonl", ROWS[:400])
    for key in boto3.client("s3").list_objects_v2(Bucket=BUCKET, Prefix="day=").get("Contents", ()):
        boto3.client("s3").delete_object(Bucket=BUCKET, Key=key["Key"])
    for day in range(2):
        put(f"day={day}/part-0.jsonl", ROWS[200 * day : 200 * day + 200])
    root = make_repository(tmp_path / "repository")
    document = read_yaml(root)
    pipelines = document["pipelines"]
    pipelines[LOCAL] = copy.deepcopy(pipelines[PIPELINE])
    pipelines[OTHER] = copy.deepcopy(pipelines[PIPELINE])
    pipelines[PIPELINE]["data"]["source"] = f"s3://{BUCKET}/rows.jsonl"
    pipelines[OTHER]["data"]["source"] = f"s3://{BUCKET}/day=*/*.jsonl"
    write_yaml(root, document)
    commit(root, "rows in a bucket")
    return root


def night(root: Path) -> list[str]:
    """What `flows.watch` would run; each has a run as far as its rows go."""
    new, broken = watching.sort_out(root, [*ALL, LOCAL])
    assert broken == {}
    for name in new:
        pipeline, at = open_pipeline(name, root)
        resolve.run(pipeline, at)
        at.folder("fetch").mkdir(parents=True, exist_ok=True)
        fetch_inputs(pipeline, at, out=at.folder("fetch"))
        shelf.keep_run(root, name, inputs="", outcome="pass", version=None)
    return list(new)


def record(root: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "runs" / name / "fetch" / "data.json").read_text(encoding="utf-8"))
    return found


def num_rows(root: Path, name: str) -> int:
    folder = root / "runs" / name / "fetch"
    return sum(len((folder / f"{side}.jsonl").read_bytes().splitlines()) for side in ("train", "evaluation"))


def test_each_night_runs_exactly_the_pipelines_whose_objects_have_new_rows(repository: Path) -> None:
    assert night(repository) == [*ALL, LOCAL]
    assert night(repository) == []

    put("rows.jsonl", ROWS[:430])
    assert night(repository) == [PIPELINE]
    assert (num_rows(repository, PIPELINE), num_rows(repository, OTHER)) == (430, 400)
    head = boto3.client("s3").head_object(Bucket=BUCKET, Key="rows.jsonl")
    found = record(repository, PIPELINE)
    address = f"s3://{BUCKET}/rows.jsonl"
    assert found["source"] == {
        "source": address,
        "sha256": of_bytes(lines(ROWS[:430])).hex,
        "prepare": None,
    }
    assert found["versions"][address]["etag"] == head["ETag"]

    put("day=2/part-0.jsonl", ROWS[400:460])
    assert night(repository) == [OTHER]
    found = record(repository, OTHER)
    assert found["source"]["files"] == {
        f"s3://{BUCKET}/day={day}/part-0.jsonl": of_bytes(lines(ROWS[start:end])).hex
        for day, (start, end) in enumerate([(0, 200), (200, 400), (400, 460)])
    }
    assert [span["name"] for span in found["files_of_lines"]] == list(found["source"]["files"])
    assert num_rows(repository, OTHER) == 460
    assert night(repository) == []

    # Rows that come back after others are new again.
    put("rows.jsonl", ROWS[:400])
    assert night(repository) == [PIPELINE]


def test_an_object_that_is_written_again_with_the_same_bytes_is_not_new(repository: Path) -> None:
    client = boto3.client("s3")
    pipeline, at = open_pipeline(PIPELINE, repository)
    before = resolve.look_up(pipeline, at, {})
    # In two parts, so that the ETag is another.
    upload = client.create_multipart_upload(Bucket=BUCKET, Key="rows.jsonl")["UploadId"]
    part = {"Bucket": BUCKET, "Key": "rows.jsonl", "UploadId": upload, "PartNumber": 1}
    made = client.upload_part(**part, Body=lines(ROWS[:400]))
    client.complete_multipart_upload(
        Bucket=BUCKET,
        Key="rows.jsonl",
        UploadId=upload,
        MultipartUpload={"Parts": [{"ETag": made["ETag"], "PartNumber": 1}]},
    )

    after = resolve.look_up(pipeline, at, {})

    assert before["versions"] != after["versions"]
    assert resolve.what_counts(before) == resolve.what_counts(after)
    assert inputs.combine("code", before) == inputs.combine("code", after)


def test_one_object_that_cannot_be_read_is_its_own_pipelines_problem(repository: Path) -> None:
    boto3.client("s3").delete_object(Bucket=BUCKET, Key="rows.jsonl")

    new, broken = watching.sort_out(repository, [*ALL, LOCAL])

    assert (list(new), list(broken)) == ([OTHER, LOCAL], [PIPELINE])
    assert f"s3://{BUCKET}/rows.jsonl: the store answered 404 NoSuchKey; check bucket, key" in broken[PIPELINE]


def test_a_file_that_two_sources_give_is_refused(repository: Path) -> None:
    folder = repository / "twice"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(lines(ROWS[:5]))
    (folder / "b.jsonl").symlink_to("a.jsonl")
    refused = {
        "path:twice/*.jsonl": ("path:twice/a.jsonl", "path:twice/b.jsonl is given by path:twice/"),
        "path:./twice/../twice/a.jsonl": ("path:twice/a.jsonl", "path:twice/a.jsonl is given by path:./twice"),
        f"s3://{BUCKET}/day=*/*.jsonl": (f"s3://{BUCKET}/day=1/", f"s3://{BUCKET}/day=1/part-0.jsonl is given by"),
    }
    for first, (second, message) in refused.items():
        pipeline, at = open_pipeline(LOCAL, repository)
        given = pipeline.data.replace(source=None, sources=[{"source": first}, {"source": second}])
        with pytest.raises(SourceError, match=message.replace("*", r"\*")):
            pinned_sources.pin_all(pipeline.replace(data=given), at)


def test_rows_that_judge_must_not_be_trained_on_too(repository: Path) -> None:
    pipeline, at = open_pipeline(LOCAL, repository)
    frozen = {"source": "path:./rows.jsonl", "sha256": of_bytes((repository / "rows.jsonl").read_bytes()).hex}
    given = pipeline.replace(data=pipeline.data.replace(evaluation=frozen))
    with pytest.raises(SourceError, match=r"path:\./rows\.jsonl is given by path:rows\.jsonl and again by"):
        pinned_sources.pin_all(given, at)


def test_what_is_pinned_by_digests_is_not_watched(repository: Path) -> None:
    data = load(repository / "pipelines.yaml").pipeline(LOCAL).data
    sha = "0" * 64
    assert pinned_sources.may_move(data)
    assert not pinned_sources.may_move(data.replace(sha256=sha))
    several = [{"source": "path:a", "sha256": sha}, {"source": "https://h.example/b"}]
    assert pinned_sources.may_move(data.replace(source=None, sources=several))
    assert not pinned_sources.may_move(data.replace(source=None, sources=several[:1]))


def test_a_set_of_files_is_pinned_by_the_digest_that_its_error_tells(repository: Path) -> None:
    pipeline, at = open_pipeline(OTHER, repository)
    sha256 = pinned_sources.pin_all(pipeline, at)[0]["data"]["sha256"]
    pinned = pipeline.replace(data=pipeline.data.replace(sha256=sha256))
    assert pinned_sources.pin_all(pinned, at)[0]["data"]["sha256"] == sha256

    put("day=1/part-1.jsonl", ROWS[:3])

    with pytest.raises(SourceError, match=f"over 3 files; expected sha256:{sha256}: find out what has changed"):
        pinned_sources.pin_all(pinned, at)
