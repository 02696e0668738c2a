"""Objects of a real S3 server (moto's) over HTTP, and of a server that fails on the way."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from graftline.data.sources import fetch, parse
from graftline.errors import SourceError, SourceUnavailableError
from tests.data.sources.servers import FileServer, status, truncated, whole
from tests.registry.servers import BUCKET, CREDENTIALS, make_bucket, moto_server

BODY = bytes(range(256)) * 12_000
SHA = hashlib.sha256(BODY).hexdigest()


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "absent"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with moto_server() as running:
        make_bucket(running)
        yield running


@pytest.fixture
def moto(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bucket with one object, at the address that boto3 finds in the environment."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    boto3.client("s3").put_object(Bucket=BUCKET, Key="rows/train set.jsonl", Body=BODY)


@pytest.mark.usefixtures("moto")
def test_an_object_lands_in_the_cache_under_its_own_name(cache: Path) -> None:
    path = fetch(parse(f"s3://{BUCKET}/rows/train set.jsonl"), sha256=SHA, cache=cache)

    assert (path.name, path.read_bytes()) == ("train set.jsonl", BODY)


@pytest.mark.usefixtures("moto")
def test_another_digest_is_refused(cache: Path) -> None:
    with pytest.raises(SourceError, match=f"has digest sha256:{SHA}; expected sha256:{'0' * 64}"):
        fetch(parse(f"s3://{BUCKET}/rows/train set.jsonl"), sha256="0" * 64, cache=cache)

    assert list((cache / "entries").glob("*")) == []


@pytest.mark.usefixtures("moto")
@pytest.mark.parametrize(("name", "code"), [(f"{BUCKET}/absent", "NoSuchKey"), ("absent-bucket/x", "NoSuchBucket")])
def test_an_object_that_is_not_there_is_told_at_once(cache: Path, name: str, code: str) -> None:
    with pytest.raises(SourceError, match=f"s3://{name}: the store answered 404 {code}; check bucket, key"):
        fetch(parse(f"s3://{name}"), sha256=SHA, cache=cache)


def test_missing_credentials_say_what_to_set(cache: Path, monkeypatch: pytest.MonkeyPatch, server: FileServer) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")

    with pytest.raises(SourceError, match="Unable to locate credentials; set AWS_ACCESS_KEY_ID"):
        fetch(parse(f"s3://{BUCKET}/x"), sha256=SHA, cache=cache)


def test_a_body_that_ends_early_is_fetched_again(
    server: FileServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    server.answers[f"/{BUCKET}/x"] = [truncated(BODY, 1_500_000), whole(BODY)]

    assert fetch(parse(f"s3://{BUCKET}/x"), sha256=SHA, cache=cache).read_bytes() == BODY


def test_a_body_that_always_ends_early_leaves_nothing(
    server: FileServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    server.answers[f"/{BUCKET}/x"] = [truncated(BODY, 1_500_000)]

    with pytest.raises(SourceUnavailableError, match="could not be fetched in 4 attempts"):
        fetch(parse(f"s3://{BUCKET}/x"), sha256=SHA, cache=cache)

    assert list((cache / "entries").glob("*")) == []
    assert list((cache / "partial").glob("*")) == []


def test_a_store_that_is_overloaded_for_a_moment_is_asked_again(
    server: FileServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    server.answers[f"/{BUCKET}/x"] = [status(503)] * 3 + [whole(BODY)]

    assert fetch(parse(f"s3://{BUCKET}/x"), sha256=SHA, cache=cache).read_bytes() == BODY


def test_a_store_that_is_not_there_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")

    with pytest.raises(SourceUnavailableError, match="could not be fetched in 4 attempts: EndpointConnectionError"):
        fetch(parse(f"s3://{BUCKET}/x"), sha256=SHA, cache=cache)
