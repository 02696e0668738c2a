"""Objects of a real S3 server (moto's) over HTTP, and of a server that fails on the way."""

import hashlib
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import boto3
import pytest

from graftline.data.sources import fetch, parse
from graftline.errors import SourceError, SourceUnavailableError
from tests.data.sources.servers import Answer, FileServer, redirect, status, truncated, whole
from tests.registry.servers import BUCKET, use_credentials

BODY = bytes(range(256)) * 12_000
SHA = hashlib.sha256(BODY).hexdigest()


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_credentials(monkeypatch, tmp_path / "absent")


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


def s3_error(code: str, http_status: int) -> Answer:
    """S3's own answer to a request that it refuses."""
    page = f"<Error><Code>{code}</Code><Message>refused</Message></Error>".encode()

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(http_status)
        request.send_header("Content-Length", str(len(page)))
        request.end_headers()
        request.wfile.write(page)

    return answer


@pytest.mark.parametrize(
    ("code", "http_status"), [("RequestTimeout", 400), ("TooManyRequestsException", 429), ("InsufficientStorage", 507)]
)
def test_what_the_registry_asks_again_is_asked_again_here(
    server: FileServer, cache: Path, monkeypatch: pytest.MonkeyPatch, code: str, http_status: int
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    server.answers[f"/{BUCKET}/x"] = [s3_error(code, http_status), whole(BODY)]

    assert fetch(parse(f"s3://{BUCKET}/x"), sha256=SHA, cache=cache).read_bytes() == BODY


@pytest.mark.parametrize(
    ("code", "http_status", "advice"),
    [("NotImplemented", 501, "lacks this part of S3"), ("ExpiredToken", 400, "log in again")],
)
def test_what_does_not_pass_is_asked_once_and_says_what_to_do(
    server: FileServer, cache: Path, monkeypatch: pytest.MonkeyPatch, code: str, http_status: int, advice: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    server.answers[f"/{BUCKET}/x"] = [s3_error(code, http_status)]

    with pytest.raises(SourceError, match=f"the store answered {http_status} {code}; .*{advice}"):
        fetch(parse(f"s3://{BUCKET}/x"), sha256=SHA, cache=cache)

    assert server.requests[f"/{BUCKET}/x"] == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"AWS_PROFILE": "nobody"},
        {"AWS_ENDPOINT_URL": "no address"},
        {"AWS_ENDPOINT_URL": "http://127.0.0.1:99999"},
        {"AWS_CA_BUNDLE": "/absent.pem", "AWS_ENDPOINT_URL": "https://127.0.0.1:9"},
    ],
)
def test_settings_of_aws_that_cannot_be_used_are_source_errors(
    cache: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SourceError, match=f"s3://{BUCKET}/x"):
        fetch(parse(f"s3://{BUCKET}/x"), sha256=SHA, cache=cache)


def test_redirections_that_lead_in_a_circle_are_a_source_error(
    server: FileServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    server.answers[f"/{BUCKET}/x"] = [redirect(f"{server.url}/{BUCKET}/x")]
    with pytest.raises(SourceError, match=f"s3://{BUCKET}/x: .*AWS_"):
        fetch(parse(f"s3://{BUCKET}/x"), sha256=SHA, cache=cache)
