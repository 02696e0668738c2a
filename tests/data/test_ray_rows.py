"""Rows prepared by a Ray Data job over parquet files in S3: what one machine comes to, also when a worker is killed."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import psutil
import pyarrow
import pyarrow.fs
import pyarrow.parquet
import pytest

from graftline.data.mixing import FetchedSource
from graftline.data.parts import Place
from graftline.data.preparation import prepare_rows
from graftline.data.records import Problems
from graftline.data.template import encode
from graftline.errors import ConfigError, DataError
from graftline.weights.model_folder import load_tokenizer
from graftline.workflow import many_rows, resolve
from tasks import fetch
from tests.data.many_rows import make_rows, write_parts
from tests.line.project import write_yaml
from tests.ray_cluster import RayCluster, ray_cluster
from tests.registry.servers import BUCKET, CREDENTIALS, make_bucket, ministack_server
from tests.tiny import make_tiny_llama
from tests.workflow.opened import Opened, open_pipeline
from tests.workflow.tiny_project import PIPELINE, tiny_settings
from tests.workflow.tiny_project import make_rows as make_other_rows

ROOT = Path(__file__).resolve().parents[2]
ROWS = 600


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    make_tiny_llama(root / "base")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_other_rows(100)))
    opened = _open(root)
    for stage in (resolve, fetch):
        stage.run(*opened)
    return root


def _open(root: Path, **changes: Any) -> Opened:
    pipeline = tiny_settings()
    del pipeline["data"]["labels"]
    pipeline["evaluate"] = {"metric": "f1", "answers": {"max_new_tokens": 4}}
    pipeline["gates"]["accuracy"] |= {"metric": "f1", "min_items": 60}
    pipeline["data"] |= {"evaluation_rows": 60, "max_tokens": 400, "seed": 3} | changes
    write_yaml(root, {"pipelines": {PIPELINE: pipeline}, "channels": {"production": {}}})
    return open_pipeline(PIPELINE, root)


@pytest.fixture(scope="module")
def cluster(s3: dict[str, str]) -> Iterator[RayCluster]:
    with ray_cluster(**s3) as running:
        yield running


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    with ministack_server() as endpoint:
        make_bucket(endpoint)
        yield CREDENTIALS | {"AWS_ENDPOINT_URL": endpoint}


def upload(folder: Path, prefix: str, s3: dict[str, str]) -> None:
    client = boto3.client(
        "s3", endpoint_url=s3["AWS_ENDPOINT_URL"], aws_access_key_id="test", aws_secret_access_key="test"
    )
    for file in folder.iterdir():
        client.upload_file(str(file), BUCKET, f"{prefix}/{file.name}")


def start(project: Path, source: str, out: str, cluster: RayCluster) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "graftline.workflow.many_rows", PIPELINE, source, out],
        cwd=project,
        env=os.environ | cluster.environment | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_a_worker(job: subprocess.Popen[str], cluster: RayCluster) -> None:
    """Kill the first process that is seen at a step of the job."""
    while job.poll() is None:
        for process in cluster.processes("Map"):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                return
        time.sleep(0.02)
    pytest.fail(f"the job ended before one of its workers was seen: {job.communicate()}")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_job_over_s3_comes_to_what_one_machine_comes_to_when_a_worker_is_killed(
    project: Path, s3: dict[str, str], cluster: RayCluster, tmp_path: Path
) -> None:
    rows = make_rows(ROWS)
    write_parts(rows, tmp_path / "in", files=3, group=100)
    upload(tmp_path / "in", "in", s3)
    opened = _open(project)
    with start(project, f"s3://{BUCKET}/in", f"s3://{BUCKET}/out", cluster) as job:
        kill_a_worker(job, cluster)
        with start(project, f"s3://{BUCKET}/in", f"s3://{BUCKET}/out", cluster) as second:
            _, refused = second.communicate(timeout=1500)
        assert second.returncode == 2
        assert f"error: another job in this Ray cluster writes to s3://{BUCKET}/out; wait for it" in refused
        output, errors = job.communicate(timeout=1500)
    assert job.returncode == 0, errors

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "all.parquet")
    data = opened.pipeline.data
    source = FetchedSource(data.all_sources[0], (("all", tmp_path / "all.parquet"),))
    one = prepare_rows(data, [source], root=project, out=tmp_path / "one")
    assert len(one.split.near) > 100
    assert json.loads(output) == {
        "rows": ROWS,
        "duplicates": len(one.dropped["duplicates"]),
        "training": len(one.split.training),
        "evaluation": 60,
        "too_long": 0,
        "near": len(one.split.near),
    }
    tokenizer = load_tokenizer(project / "base")
    store = pyarrow.fs.S3FileSystem(
        access_key="test",
        secret_key="test",
        endpoint_override=s3["AWS_ENDPOINT_URL"].removeprefix("http://"),
        scheme="http",
    )
    for side in ("training", "evaluation"):
        expected = getattr(one.split, side)
        encoded = [encode(row, tokenizer, template="none") for row in expected]
        found = pyarrow.parquet.ParquetDataset(f"{BUCKET}/out/{side}", filesystem=store).read().to_pylist()
        assert [row["line"] for row in found] == [row.source_line for row in expected]
        assert [(row["prompt"], row["completion"]) for row in found] == [(row.prompt, row.answer) for row in expected]
        assert [row["input_ids"] for row in found] == [list(row.input_ids) for row in encoded]
        assert [row["supervised"] for row in found] == [list(row.supervised) for row in encoded]
    near = pyarrow.parquet.read_table(f"{BUCKET}/out/near.parquet", filesystem=store).to_pylist()
    assert [(row["line"], row["earlier"]) for row in near] == list(one.split.near)
    left = store.get_file_info(pyarrow.fs.FileSelector(f"{BUCKET}/out", recursive=True))
    assert not [file.path for file in left if "/.work" in file.path]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_bad_rows_of_all_files_are_told_together_and_nothing_is_finished(
    project: Path, cluster: RayCluster, tmp_path: Path
) -> None:
    rows = make_rows(60)
    rows[3] |= {"completion": " "}
    rows[57] |= {"prompt": "\0"}
    write_parts(rows, tmp_path / "in", files=3, group=10)
    _open(project)
    with start(project, str(tmp_path / "in"), str(tmp_path / "out"), cluster) as job:
        _, errors = job.communicate(timeout=1500)
    assert job.returncode == 2
    assert "error: the rows: 2 problems:" in errors
    assert "rows-0.parquet, row 4: 'completion' is empty" in errors
    assert "rows-2.parquet, row 18: 'prompt' holds NUL" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out" / "summary.json").exists()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_rows", 100),
        ("empty", "drop"),
        ("duplicates", "keep"),
        ("contradictions", "drop"),
        ("contradictions", "error"),
        ("near_duplicates", "drop"),
        ("split", "newest"),
        ("learned", "last-turn"),
        ("learned_reasoning", False),
    ],
)
def test_what_only_one_machine_does_is_refused_before_anything_starts(
    project: Path, tmp_path: Path, setting: str, value: object
) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{setting} is set to what is done on one machine only; "):
        prepare(_open(project, **{setting: value}), tmp_path, tmp_path / "out")


def test_preference_pairs_are_not_taken_for_rows(project: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "No."}]
    write_parts(pairs, tmp_path / "in", files=1, group=1)
    with pytest.raises(DataError, match=r"rows-0\.parquet holds preference pairs, which are prepared on one machine"):
        prepare(_open(project), tmp_path / "in", tmp_path / "out")


def prepare(opened: Opened, source: Path | str, out: Path | str) -> None:
    """Nothing that is refused may have asked Ray for anything: there is no cluster at this address."""
    many_rows.prepare_many(*opened, source=str(source), out=str(out), address="127.0.0.1:1", processes=2)


def test_a_source_without_parquet_files_is_refused_before_anything_starts(project: Path, tmp_path: Path) -> None:
    opened, rows = _open(project), tmp_path / "in"
    rows.mkdir()
    (rows / "rows.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"has no rows; expected \.parquet files of rows there"):
        prepare(opened, rows, tmp_path / "out")
    (rows / "rows.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"rows\.parquet is not a whole parquet file"):
        prepare(opened, rows, tmp_path / "out")
    for address in ("gs://bucket/rows", "s3://", " "):
        with pytest.raises(DataError, match=r"is given; expected a folder or s3://bucket/prefix"):
            prepare(opened, address, tmp_path / "out")


def test_columns_that_the_result_adds_are_refused(project: Path, tmp_path: Path) -> None:
    rows = [row | {"line": 1} for row in make_rows(5)]
    write_parts(rows, tmp_path / "in", files=1, group=5)
    with pytest.raises(DataError, match="has a column 'line', which the result adds; rename it"):
        prepare(_open(project), tmp_path / "in", tmp_path / "out")


def test_the_result_overwrites_nothing_that_is_not_its_own(project: Path, tmp_path: Path) -> None:
    write_parts(make_rows(5), tmp_path / "in", files=1, group=5)
    for out in (tmp_path, tmp_path / "in", tmp_path / "in" / "out"):
        with pytest.raises(DataError, match=r"among the rows of .*; name another place"):
            prepare(_open(project), tmp_path / "in", out)
    (tmp_path / "out" / "training").mkdir(parents=True)
    with pytest.raises(DataError, match="holds training, which no such job has written; name an empty place"):
        prepare(_open(project), tmp_path / "in", tmp_path / "out")


def test_a_file_that_changes_or_goes_while_it_is_read_is_told(tmp_path: Path) -> None:
    write_parts(make_rows(5), tmp_path / "in", files=1, group=5)
    place = Place.of(str(tmp_path / "in"))
    (part,) = place.find_parts()
    assert place.read(part).num_rows == 5
    write_parts(make_rows(4), tmp_path / "other", files=1, group=5)
    (tmp_path / "other" / "rows-0.parquet").replace(tmp_path / "in" / "rows-0.parquet")
    for read in (place.read, lambda part: list(place.rows(part, format="prompt-completion", problems=Problems("")))):
        with pytest.raises(DataError, match=r"rows-0\.parquet has changed since the job began; run it again"):
            read(part)
    (tmp_path / "in" / "rows-0.parquet").unlink()
    with pytest.raises(DataError, match=r"rows-0\.parquet has changed since the job began"):
        place.read(part)


def test_a_place_that_cannot_be_written_is_told_and_nothing_is_half_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/x/y\.parquet cannot be written: .*; check the address"):
        Place.of(str(tmp_path / "file" / "x")).write("y.parquet", pyarrow.table({"a": [1]}))
    place = Place.of(str(tmp_path / "out"))
    place.write("y.parquet", pyarrow.table({"a": [1]}))
    assert place.names() == ["y.parquet"]
