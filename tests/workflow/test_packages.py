"""The archive: DVC pushes the package to S3, what was pushed is looked at, and anybody can fetch it from there."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from graftline.workflow import packages
from graftline.workflow.packages import ArchiveError, push
from tests.registry.servers import BUCKET, CREDENTIALS, make_bucket, moto_server
from tests.workflow.tiny_project import PIPELINE, commit, git

GRAPH = """\
vars: [pipelines.yaml]
stages:
  package:
    foreach: ${pipelines}
    do:
      cmd: mkdir -p runs/${key}/package && cp -r parts/. runs/${key}/package
      deps: [parts]
      outs:
      - runs/${key}/package
artifacts:
  pets: {path: runs/pets/package, type: model}
"""
PREFIX = "packages/dvc"  # moto keeps one set of buckets for all servers of a process: other tests have their own
FILES = {"adapter/adapter_model.safetensors": b"\x00\x01weights" * 1000, "README.md": b"card", "manifest.json": b"{}"}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with moto_server() as address:
        make_bucket(address)
        yield address


@pytest.fixture(scope="module")
def project(endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose package stage has run, with an S3 remote; its dvc.lock is committed."""
    folder = tmp_path_factory.mktemp("archive") / "my project"
    for name, data in FILES.items():
        path = folder / "parts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (folder / "dvc.yaml").write_text(GRAPH)
    (folder / "pipelines.yaml").write_text(f"pipelines: {{{PIPELINE}: {{}}, never-packaged: {{}}}}\n")
    (folder / ".gitignore").write_text("/runs/\n")
    git(folder, "init", "-q", "-b", "main")
    remote = f"""['remote "archive"']\n    url = s3://{BUCKET}/{PREFIX}\n    endpointurl = {endpoint}\n"""
    (folder / ".dvc").mkdir()
    (folder / ".dvc" / "config").write_text(f"[core]\n    analytics = false\n{remote}")
    (folder / ".dvc" / ".gitignore").write_text("/config.local\n/tmp\n/cache\n")
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q", f"package@{PIPELINE}"], cwd=folder, check=True)
    commit(folder, "packaged")
    git(folder, "tag", "-a", f"{PIPELINE}@v1.0.0", "-m", "for dvc artifacts get")
    return folder


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    for name in ("GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(name, "test")


@pytest.fixture
def client(endpoint: str) -> Any:
    return boto3.client("s3", endpoint_url=endpoint)


def keys(client: Any) -> list[str]:
    return [item["Key"] for item in client.list_objects_v2(Bucket=BUCKET, Prefix=PREFIX).get("Contents", [])]


def key_of(client: Any, data: bytes) -> str:
    (found,) = [key for key in keys(client) if client.get_object(Bucket=BUCKET, Key=key)["Body"].read() == data]
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_package_is_pushed_once_and_all_of_it_is_there(project: Path, client: Any) -> None:
    done = push(PIPELINE, "archive", root=project)
    assert (done.url, done.num_objects) == (f"s3://{BUCKET}/{PREFIX}/files/md5", len(FILES) + 1)
    assert done.num_bytes > sum(map(len, FILES.values()))
    assert len(keys(client)) == done.num_pushed == done.num_objects
    assert push(PIPELINE, "archive", root=project).num_pushed == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["artifacts", "get", "{url}", PIPELINE],
        pytest.param(["get", "{url}", f"runs/{PIPELINE}/package"], marks=pytest.mark.long),
    ],
)
def test_whoever_has_the_repository_fetches_the_package_with_dvc(
    project: Path, tmp_path: Path, arguments: list[str]
) -> None:
    push(PIPELINE, "archive", root=project)
    git(tmp_path, "clone", "-q", str(project), "clone")  # no cache, only what git has
    command = [argument.format(url=tmp_path / "clone") for argument in arguments]
    subprocess.run(
        [sys.executable, "-m", "dvc", *command, "--remote", "archive", "-o", "got"], cwd=tmp_path, check=True
    )
    assert contents(tmp_path / "got") == FILES


def test_an_object_that_the_remote_has_lost_is_pushed_again(project: Path, client: Any) -> None:
    push(PIPELINE, "archive", root=project)
    client.delete_object(Bucket=BUCKET, Key=key_of(client, b"card"))
    assert push(PIPELINE, "archive", root=project).num_pushed == 1
    assert client.get_object(Bucket=BUCKET, Key=key_of(client, b"card"))


def test_an_object_that_is_not_there_after_the_push_is_named(
    project: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(PIPELINE, "archive", root=project)
    lost = key_of(client, b"card")
    client.delete_object(Bucket=BUCKET, Key=lost)
    monkeypatch.setattr(packages, "_upload", lambda *_: None)
    with pytest.raises(ArchiveError, match=f"{lost} is missing after the push"):
        push(PIPELINE, "archive", root=project)


@pytest.mark.parametrize("damage", [b"cord", b"car"], ids=["other bytes", "fewer bytes"])
def test_a_damaged_object_is_named_with_what_to_do(project: Path, client: Any, damage: bytes) -> None:
    push(PIPELINE, "archive", root=project)
    key = key_of(client, b"card")
    client.put_object(Bucket=BUCKET, Key=key, Body=damage)
    with pytest.raises(ArchiveError, match=f"{key} is damaged: .*remove it and run the same command again"):
        push(PIPELINE, "archive", root=project)
    client.delete_object(Bucket=BUCKET, Key=key)
    assert push(PIPELINE, "archive", root=project).num_pushed == 1


def test_a_remote_that_computes_no_digest_is_read_back(project: Path, tmp_path: Path) -> None:
    (project / ".dvc" / "config.local").write_text(f"['remote \"folder\"']\n    url = {tmp_path}\n")
    assert push(PIPELINE, "folder", root=project).num_pushed == len(FILES) + 1
    (card,) = [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == b"card"]
    card.chmod(0o644)
    card.write_bytes(b"cord")
    with pytest.raises(ArchiveError, match=f"{card} is damaged"):
        push(PIPELINE, "folder", root=project)


def test_a_remote_or_a_package_that_is_not_there_is_said(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ArchiveError, match="dvc remote add elsewhere"):
        push(PIPELINE, "elsewhere", root=project)
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "argv", ["archive", "never-packaged", "--remote", "archive"])
    with pytest.raises(SystemExit, match="2"):
        packages.main()
    assert "is not in DVC's cache; run `python -m flows.retrain never-packaged` first" in capsys.readouterr().err
