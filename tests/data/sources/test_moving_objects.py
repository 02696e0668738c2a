"""Objects in S3 and files at https without a digest: what they hold now, asked for as seldom as can be."""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest

from graftline.data.sources import fetch, look, parse
from graftline.errors import SourceError, SourceUnavailableError
from tests.data.sources.servers import FileServer, etagged, status, truncated, whole
from tests.data.sources.test_s3 import s3_error
from tests.registry.servers import BUCKET, use_credentials

OLD, NEW = b'{"prompt": "1"}\n' * 9, b'{"prompt": "2"}\n' * 9
ROWS = f"s3://{BUCKET}/rows.jsonl"


def sha(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_credentials(monkeypatch, tmp_path / "absent")


@pytest.fixture
def bucket(endpoint: str, aws: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Puts an object there; its version, if the bucket keeps versions."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)

    def put(body: bytes, key: str = "rows.jsonl") -> str:
        return str(boto3.client("s3").put_object(Bucket=BUCKET, Key=key, Body=body).get("VersionId"))

    return put


class TestS3:
    def test_an_object_is_taken_as_it_is_and_its_etag_is_told(self, bucket: Callable[..., str], cache: Path) -> None:
        bucket(OLD)
        before = look(parse(ROWS), cache=cache)
        bucket(NEW)
        after = look(parse(ROWS), cache=cache)

        assert (before.digest.hex, after.digest.hex) == (sha(OLD), sha(NEW))
        assert before.version["etag"] == f'"{hashlib.md5(OLD).hexdigest()}"'
        assert before.version["etag"] != after.version["etag"]
        assert fetch(parse(ROWS), sha256=before.digest.hex, cache=cache).read_bytes() == OLD
        assert fetch(parse(ROWS), sha256=None, cache=cache).read_bytes() == NEW

    def test_the_same_etag_downloads_nothing(self, bucket: Callable[..., str], cache: Path) -> None:
        bucket(OLD)
        first = look(parse(ROWS), cache=cache)
        arrived: list[int] = []

        again = look(parse(ROWS), cache=cache, on_progress=lambda done, _: arrived.append(done))

        assert (again, arrived) == (first, [])

    def test_a_version_can_be_had_again_after_the_object_and_the_cache_have_moved_on(
        self, bucket: Callable[..., str], cache: Path, tmp_path: Path
    ) -> None:
        versioning = {"Status": "Enabled"}
        boto3.client("s3").put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration=versioning)
        try:
            made = bucket(OLD)
            found = look(parse(ROWS), cache=cache)
            bucket(NEW)
        finally:
            boto3.client("s3").put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Suspended"})
        assert found.version["version_id"] == made

        source = parse(ROWS).at_version(found.version["version_id"])

        assert fetch(source, sha256=sha(OLD), cache=tmp_path / "other").read_bytes() == OLD
        with pytest.raises(SourceError, match="where it is not, the source has moved since this run"):
            fetch(parse(ROWS), sha256=sha(OLD), cache=tmp_path / "third")

    def test_a_digest_in_the_settings_pins_it(self, bucket: Callable[..., str], cache: Path) -> None:
        bucket(NEW)
        with pytest.raises(SourceError, match=f"has digest sha256:{sha(NEW)}; expected sha256:{sha(OLD)}"):
            fetch(parse(ROWS), sha256=sha(OLD), cache=cache)

    def test_an_object_that_is_gone_is_told_at_once(self, bucket: Callable[..., str], cache: Path) -> None:
        bucket(OLD)
        look(parse(ROWS), cache=cache)
        boto3.client("s3").delete_object(Bucket=BUCKET, Key="rows.jsonl")

        with pytest.raises(SourceError, match=f"{ROWS}: the store answered 404 NoSuchKey; check bucket, key"):
            look(parse(ROWS), cache=cache)

    def test_a_bucket_that_may_not_be_read_is_told_at_once(
        self, aws: None, server: FileServer, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        server.answers[f"/{BUCKET}/rows.jsonl"] = [s3_error("AccessDenied", 403)]
        with pytest.raises(SourceError, match="the store answered 403 AccessDenied; the credentials lack a permission"):
            look(parse(ROWS), cache=cache)
        assert server.requests[f"/{BUCKET}/rows.jsonl"] == 1


@pytest.fixture(params=["s3", "https"])
def address(request: pytest.FixtureRequest, server: FileServer, aws: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """One server that answers at ``/models/rows.jsonl``, as a store of objects and as a web server."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    return ROWS if request.param == "s3" else f"{server.url}/{BUCKET}/rows.jsonl"


PATH = f"/{BUCKET}/rows.jsonl"


class TestBoth:
    def test_what_is_unchanged_is_asked_for_and_not_read(self, server: FileServer, cache: Path, address: str) -> None:
        server.answers[PATH] = [etagged(OLD, '"1"')]
        first = look(parse(address), cache=cache)
        asked = server.requests[PATH]

        assert look(parse(address), cache=cache) == first
        assert server.requests[PATH] == asked + 1

    def test_a_server_that_ignores_the_condition_is_believed_by_its_etag(
        self, server: FileServer, cache: Path, address: str
    ) -> None:
        server.answers[PATH] = [whole(OLD, ETag='"1"')]
        look(parse(address), cache=cache)
        arrived: list[int] = []

        found = look(parse(address), cache=cache, on_progress=lambda done, _: arrived.append(done))

        assert (found.digest.hex, arrived) == (sha(OLD), [])

    @pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"1"'}, {"Last-Modified": "Thu, 26 Nov 2026 01:00:00 GMT"}])
    def test_what_other_bytes_may_be_called_too_is_read_again(
        self, server: FileServer, cache: Path, address: str, headers: dict[str, str]
    ) -> None:
        server.answers[PATH] = [whole(OLD, **headers)]
        assert look(parse(address), cache=cache).digest.hex == sha(OLD)
        server.answers[PATH] = [whole(NEW, **headers)]
        assert look(parse(address), cache=cache).digest.hex == sha(NEW)

    def test_an_object_that_changes_once_while_it_is_read_is_read_again(
        self, server: FileServer, cache: Path, address: str
    ) -> None:
        server.answers[PATH] = [etagged(OLD, '"1"'), etagged(NEW, '"2"')]

        found = look(parse(address), cache=cache)

        assert (found.digest.hex, found.version["etag"]) == (sha(NEW), '"2"')

    def test_an_object_that_always_changes_while_it_is_read_is_an_error(
        self, server: FileServer, cache: Path, address: str
    ) -> None:
        server.answers[PATH] = [etagged(OLD + bytes([at]), f'"{at}"') for at in range(65, 90)]

        with pytest.raises(
            SourceError, match=r"rows\.jsonl changed each of the 2 times that it was read: .*wait until"
        ):
            look(parse(address), cache=cache)

        assert server.requests[PATH] == 4

    def test_servers_that_call_the_same_bytes_differently_are_no_change(
        self, server: FileServer, cache: Path, address: str
    ) -> None:
        # Several machines behind one name, each with ETags of its own.
        server.answers[PATH] = [etagged(OLD, f'"{at}"') for at in range(9)]

        assert look(parse(address), cache=cache).digest.hex == sha(OLD)

    def test_a_cache_that_lost_the_bytes_reads_them_again(self, server: FileServer, cache: Path, address: str) -> None:
        server.answers[PATH] = [etagged(OLD, '"1"')]
        look(parse(address), cache=cache)
        path = fetch(parse(address), sha256=sha(OLD), cache=cache)
        path.write_bytes(b"short")

        assert look(parse(address), cache=cache).digest.hex == sha(OLD)
        assert fetch(parse(address), sha256=sha(OLD), cache=cache).read_bytes() == OLD

    @pytest.mark.parametrize(
        "record", [b"", b"[]", b"\xff", b'{"sha256": 1, "version": 2}', b'{"version": {"etag": 3}}']
    )
    def test_a_record_that_cannot_be_read_is_none(
        self, server: FileServer, cache: Path, address: str, record: bytes
    ) -> None:
        server.answers[PATH] = [etagged(OLD, '"1"')]
        look(parse(address), cache=cache)
        for pin in (cache / "pins").iterdir():
            pin.write_bytes(record)

        assert look(parse(address), cache=cache).digest.hex == sha(OLD)

    def test_what_fails_for_a_moment_is_tried_again_and_what_ends_early_is_not_kept(
        self, server: FileServer, cache: Path, address: str
    ) -> None:
        server.answers[PATH] = [status(503), truncated(OLD, 5), etagged(OLD, '"1"'), status(503), etagged(OLD, '"1"')]

        assert look(parse(address), cache=cache).digest.hex == sha(OLD)

        server.answers[PATH] = [truncated(NEW, 5)]
        with pytest.raises(SourceUnavailableError, match="could not be fetched in 4 attempts"):
            look(parse(address), cache=cache)
        assert list((cache / "partial").glob("*")) == []
        assert [path.name for path in (cache / "entries").glob("*")] == [f"{sha(OLD)}.jsonl"]


def test_secrets_of_an_address_are_in_no_message_log_or_record(
    server: FileServer, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="graftline")
    caplog.set_level(logging.INFO)
    server.answers["/x.jsonl"] = [etagged(OLD + bytes([at]), f'"{at}"') for at in range(65, 90)]
    address = f"{server.url}/x.jsonl?token=t0ps3cret".replace("//", "//user:hunter2@")

    with pytest.raises(SourceError) as caught:
        look(parse(address), cache=cache)
    server.answers["/x.jsonl"] = [etagged(OLD, '"1"')]
    look(parse(address), cache=cache)

    kept = b"".join(path.read_bytes() for path in cache.rglob("*") if path.is_file()).decode()
    for word in ("t0ps3cret", "hunter2"):
        assert word not in str(caught.value)
        assert word not in caplog.text
        assert word not in kept
